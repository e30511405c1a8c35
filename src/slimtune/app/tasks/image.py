"""A class from an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

from slimtune.app.data import load_splits, read_labels
from slimtune.app.tasks.base import Task, choose_metric, counts, first_output, mean_loss, probe
from slimtune.app.tasks.classify import METRICS, compute_metrics
from slimtune.app.tasks.models import build_base
from slimtune.app.tasks.pixels import ImageCollator, Pixels
from slimtune.errors import ConfigError

if TYPE_CHECKING:
    from slimtune.app.config import TrainConfig


def build(cfg: TrainConfig) -> Task:
    metric, greater = choose_metric(cfg, METRICS, "accuracy")
    splits = load_splits(cfg)
    names, labels = read_labels(splits, cfg.labels)
    base = build_base(cfg, names)
    channels = None if cfg.model_factory else getattr(base.model.config, "num_channels", 3)
    rows = {
        name: Pixels(
            table,
            splits.columns["image"],
            labels[name],
            size=base.processing["size"],
            channels=channels,
            training=name == "train" and cfg.augment,
        )
        for name, table in splits.items()
    }
    shape = rows["train"][0][0].shape
    mean, std = (
        per_channel(field, given or base.processing[key] or [default], shape[2])
        for field, key, given, default in (
            ("image_mean", "mean", cfg.image_mean, 0.0),
            ("image_std", "std", cfg.image_std, 1.0),
        )
    )
    collator = ImageCollator(mean, std, cfg.augment, cfg.seed if cfg.data_seed is None else cfg.data_seed)
    if cfg.model_factory:
        probe(base, collator([rows["train"][0]]), len(names), "one score per label")
    return Task(
        name=cfg.task,
        model=base.model,
        processing={"mean": mean, "std": std, "size": base.processing["size"]},
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
        callbacks=[epoch_callback(rows["train"])] if cfg.augment else [],
        info={
            "labels": names,
            "label_counts": counts(names, labels),
            "rows": {name: len(table) for name, table in splits.items()},
            "columns": splits.columns,
            "image_shape": list(shape),
            "image_mean": mean,
            "image_std": std,
            "augment": cfg.augment,
            "fresh": base.fresh,
            "notes": splits.notes,
        },
    )


def per_channel(field: str, values: list[float], channels: int) -> list[float]:
    """One value per channel; a single value serves all. Raises ConfigError when the count is another."""
    if len(values) not in (1, channels):
        raise ConfigError(f"{field}: {len(values)} values for images with {channels} channels")
    return list(values) * channels if len(values) == 1 else list(values)


def epoch_callback(data: Pixels) -> Any:
    """Tells the training rows their epoch, also in a run that resumes inside one."""
    from transformers import TrainerCallback

    class EpochCallback(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            data.set_epoch(int(state.epoch or 0))

    return EpochCallback()
