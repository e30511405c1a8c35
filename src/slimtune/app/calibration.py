"""What a recipe learns from the training data before training: batches in a fixed order, and how far it is."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from slimtune.app.config import TrainConfig
from slimtune.app.tasks import Task
from slimtune.app.trainer import random_state_kept
from slimtune.errors import ConfigError
from slimtune.initialisers import Stats
from slimtune.recipe import Recipe

QUIET = 3.0  # seconds; what takes less is not told where there is no bar


@dataclass
class Fitted:
    """A recipe with the ranks that the data gave it, the statistics it starts from, and what that took."""

    recipe: Recipe
    stats: dict[str, Stats] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def batches(cfg: TrainConfig, task: Task) -> list[dict[str, Any]]:
    """The first `calibration_batches` batches of the training data in an order drawn from the data seed, full ones
    only where there is one; random numbers that reading them draws are those of the seed, and put back."""
    rows, size = len(task.train), cfg.per_device_train_batch_size
    seed = cfg.seed if cfg.data_seed is None else cfg.data_seed
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    full = max(1, rows // size)
    with random_state_kept():
        torch.manual_seed(seed)
        chosen = (order[i * size : (i + 1) * size] for i in range(min(cfg.calibration_batches, full)))
        return [dict(task.collator([task.train[i] for i in part])) for part in chosen]


def calibrate(cfg: TrainConfig, task: Task, recipe: Recipe, device: torch.device) -> Fitted:
    """Carry out `st.calibrate.fit` on the model of a task, which is then on `device` and otherwise as it was.

    With several processes each runs the same batches.

    Raises:
        SlimtuneError: what `st.calibrate.fit` raises.
    """
    from slimtune import calibrate as calibration

    if cfg.gradient_checkpointing and not hasattr(task.model, "gradient_checkpointing_enable"):
        raise ConfigError(f"gradient_checkpointing: {type(task.model).__name__} does not support it")
    model, found = task.model.to(device), batches(cfg, task)
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore
        model.train()  # transformers recomputes in this mode only

    def loss(model: torch.nn.Module, batch: dict[str, Any]) -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16):
            return task.loss(model, batch) if task.loss else model(**batch).loss

    began = time.perf_counter()
    with meter("calibrating") as progress:
        fitted, stats = calibration.fit(
            recipe,
            model,
            found,
            loss,
            cfg.targets,
            exclude=cfg.exclude_modules,
            seed=cfg.seed,
            progress=progress,
        )
    examples = min(len(found) * cfg.per_device_train_batch_size, len(task.train))
    facts = {"seconds": round(time.perf_counter() - began, 3), "batches": len(found), "examples": examples}
    return Fitted(fitted, stats, facts)


@contextlib.contextmanager
def meter(what: str) -> Iterator[Callable[[int, int], None]]:
    """Within: progress(done, total) moves a bar on a terminal; elsewhere one line tells what took long. Only on the
    first process."""
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    show = _Bar(what) if first and sys.stderr.isatty() else _Line(what)
    try:
        yield show
    finally:
        show.close(first)


class _Line:
    """Remembers how far it came, and says so at the end if that took a while."""

    def __init__(self, what: str) -> None:
        self.what, self.began, self.done = what, time.perf_counter(), 0

    def __call__(self, done: int, total: int) -> None:
        self.done = done

    def close(self, tell: bool) -> None:
        seconds = time.perf_counter() - self.began
        if tell and self.done and seconds > QUIET:
            print(f"{self.what}: {self.done} done in {seconds:.0f} s", file=sys.stderr, flush=True)


class _Bar:
    """A bar that appears with the first call."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn(self.what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task("", total=None)
            self.bar.start()
        self.bar.update(self.task, completed=done, total=total or None)

    def close(self, tell: bool) -> None:
        if self.bar is not None:
            self.bar.stop()
