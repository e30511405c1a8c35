"""What a recipe learns from the training data before training: batches in a fixed order, and how far it is."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from slimtune.app.config import TrainConfig
from slimtune.app.tasks import Task
from slimtune.app.trainer import random_state_kept
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
            cfg.target_modules,
            exclude=cfg.exclude_modules,
            seed=cfg.seed,
            progress=progress,
        )
    examples = min(len(found) * cfg.per_device_train_batch_size, len(task.train))
    facts = {"seconds": round(time.perf_counter() - began, 3), "batches": len(found), "examples": examples}
    return Fitted(fitted, stats, facts)


@contextlib.contextmanager
def meter(what: str) -> Iterator[Any]:
    """Within: progress(done, total) moves a bar on a terminal; elsewhere one line tells what took long. Only on the
    first process."""
    began, last = time.perf_counter(), (0, 0)
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    if not (first and sys.stderr.isatty()):

        def count(done: int, total: int) -> None:
            nonlocal last
            last = done, total

        yield count
        seconds = time.perf_counter() - began
        if first and seconds > QUIET:
            print(f"{what}: {last[0]} of {last[1] or last[0]} done in {seconds:.0f} s", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)
