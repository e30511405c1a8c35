"""A class from a text or a pair of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F

from slimtune.app.data import load_splits, read_labels
from slimtune.app.tasks import metrics
from slimtune.app.tasks.base import Task, choose_metric, counts, first_output, mean_loss, probe
from slimtune.app.tasks.models import build_base
from slimtune.app.tasks.text import PadCollator, encode_splits, length_limit, text_info

if TYPE_CHECKING:
    from slimtune.app.config import TrainConfig

METRICS = {"accuracy": True, "f1": True, "mcc": True}


def compute_metrics(prediction: Any) -> dict[str, float]:
    """accuracy, f1 (macro), mcc from logits (N, K) and labels (N)."""
    return metrics.classification(np.asarray(prediction.label_ids), np.asarray(prediction.predictions).argmax(-1))


def build(cfg: TrainConfig) -> Task:
    metric, greater = choose_metric(cfg, METRICS, "accuracy")
    splits = load_splits(cfg)
    names, labels = read_labels(splits, cfg.labels)
    base = build_base(cfg, names)
    length = length_limit(cfg, base.processing, base.model)
    rows, cut = encode_splits(splits, base.processing, length, labels)
    collator = PadCollator(base.processing.pad_token_id)
    if cfg.model_factory:
        probe(base, collator([rows["train"][0]]), len(names), "one score per label")
    return Task(
        name=cfg.task,
        model=base.model,
        processing=base.processing,
        train=rows["train"],
        validation=rows["validation"],
        test=rows.get("test"),
        collator=collator,
        compute_metrics=compute_metrics,
        preprocess_logits=first_output,
        loss=mean_loss(base.call, lambda logits, targets: F.cross_entropy(logits, targets, reduction="none")),
        head=base.head,
        fresh=base.fresh,
        metric=metric,
        greater_is_better=greater,
        info={
            "labels": names,
            "label_counts": counts(names, labels),
            "fresh": base.fresh,
            **text_info(splits, rows, cut, length),
        },
    )
