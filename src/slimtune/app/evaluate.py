"""Measurements outside the training loop's own."""

from __future__ import annotations

import contextlib
from typing import Any

import slimtune as st
from slimtune.app.callbacks import plain
from slimtune.app.tasks import Task
from slimtune.app.trainer import SlimTrainer


def evaluate(trainer: SlimTrainer, dataset: Any, split: str) -> dict[str, float]:
    """The plain metrics of one data set, with the number of its rows."""
    trainer.split = split
    try:
        found = plain(trainer.evaluate(dataset, metric_key_prefix=split))
    finally:
        trainer.split = "validation"
    return {**found, "samples": len(dataset)}


def measure_base(trainer: SlimTrainer, task: Task, adapter: bool) -> dict[str, Any]:
    """What the model scores before any training, by split.

    Empty where a run without an adapter is being continued: its untouched weights are gone.
    """
    if not adapter and trainer.state.global_step:
        return {}
    with st.disabled(trainer.model) if adapter else contextlib.nullcontext():
        return {
            "validation": evaluate(trainer, task.validation, "base"),
            "test": evaluate(trainer, task.test, "base") if task.test is not None else None,
        }
