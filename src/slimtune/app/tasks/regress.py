"""A number from a text or a pair of texts; mean squared error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from slimtune.app.data import load_splits, read_numbers
from slimtune.app.tasks import metrics
from slimtune.app.tasks.base import Task, choose_metric, first_output, mean_loss, probe
from slimtune.app.tasks.models import build_base
from slimtune.app.tasks.text import PadCollator, encode_splits, length_limit, text_info

if TYPE_CHECKING:
    from slimtune.app.config import TrainConfig

METRICS = {"pearson": True, "spearman": True, "mse": False}


def compute_metrics(prediction: Any) -> dict[str, float]:
    """pearson, spearman, mse from predictions (N, 1) or (N) and labels (N)."""
    labels = np.asarray(prediction.label_ids)
    return metrics.regression(labels, np.asarray(prediction.predictions).reshape(len(labels), -1)[:, 0])


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.reshape(len(labels), -1)[:, 0] - labels) ** 2


def build(cfg: TrainConfig) -> Task:
    metric, greater = choose_metric(cfg, METRICS, "pearson")
    splits = load_splits(cfg)
    numbers = {name: read_numbers(table, splits.columns["label"]) for name, table in splits.items()}
    base = build_base(cfg)
    length = length_limit(cfg, base.processing, base.model)
    rows, cut = encode_splits(splits, base.processing, length, numbers)
    collator = PadCollator(base.processing.pad_token_id, torch.float32)
    if cfg.model_factory:
        probe(base, collator([rows["train"][0]]), 1, "one number")
    train = np.asarray(numbers["train"])
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
        loss=mean_loss(base.call, squared_error),
        head=base.head,
        fresh=base.fresh,
        metric=metric,
        greater_is_better=greater,
        info={
            "label_range": [float(train.min()), float(train.max())],
            "label_mean": float(train.mean()),
            "label_std": float(train.std()),
            "fresh": base.fresh,
            **text_info(splits, rows, cut, length),
        },
    )
