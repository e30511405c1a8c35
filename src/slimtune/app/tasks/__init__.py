"""Tasks: what a run learns. Each task is one file with one function `build(cfg) -> Task`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from slimtune.app.tasks.base import Base, Task

if TYPE_CHECKING:
    from slimtune.app.config import TrainConfig

__all__ = ["TASKS", "Base", "Task", "build_base", "build_task"]

TASKS = {"classify": "classify", "regress": "regress", "sft": "sft", "image-classify": "image"}


def build_task(cfg: TrainConfig) -> Task:
    """Read the data, load the model and put together everything a Trainer needs.

    Raises:
        DataError, ConfigError, FileFormatError: naming the file, column, row, folder or factory at fault.
    """
    return import_module(f"{__name__}.{TASKS[cfg.task]}").build(cfg)


def build_base(cfg: TrainConfig, labels: list[str] | None = None) -> Base:
    """The model of a configuration without its data, for loading an adapter on it again.

    Args:
        labels: the class names of the run, `Task.info["labels"]`; None for regress and sft.
    """
    from slimtune.app.tasks.models import build_base as build

    return build(cfg, labels)
