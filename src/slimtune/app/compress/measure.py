"""What a compression costs and gains, measured: outputs of layers, scores of the task, seconds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimtune.app.tasks import Task

Forward = Callable[[nn.Module, dict[str, Any]], Any]
Batch = dict[str, Any]


def batches(task: Task, rows: Any, order: Sequence[int], size: int) -> Iterator[Batch]:
    """Rows of a data set as batches."""
    for start in range(0, len(order), size):
        yield dict(task.collator([rows[i] for i in order[start : start + size]]))


def to_device(batch: Mapping[str, Any], device: torch.device) -> Batch:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within: evaluation mode and no gradients."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, training in modes:
            m.training = training


# ---------------------------------------------------------------- the task


@dataclass
class Scores:
    """The task's metrics on one split, and which examples were right where that is a question."""

    metrics: dict[str, float]
    right: list[bool] = field(default_factory=list)


def score(task: Task, rows: Any, size: int, device: torch.device, done: Callable[[int, int], None]) -> Scores:
    """The metrics that `slimtune train` measures, of the model as it is."""
    found: list[np.ndarray[Any, Any]] = []
    labels: list[np.ndarray[Any, Any]] = []
    total, count = 0.0, math.ceil(len(rows) / size)
    with evaluating(task.model):
        for number, batch in enumerate(batches(task, rows, range(len(rows)), size), 1):
            batch = to_device(batch, device)
            loss, logits = loss_of(task, batch)
            total += float(loss) * len(batch["labels"])
            found.append(task.preprocess_logits(logits, batch["labels"]).double().cpu().numpy())
            labels.append(batch["labels"].cpu().numpy())
            done(number, count)
    predictions, targets = np.concatenate(found), _joined(labels)
    metrics = {"loss": total / len(rows)}
    metrics |= task.compute_metrics(SimpleNamespace(predictions=predictions, label_ids=targets))
    classes = task.name in ("classify", "image-classify")
    right = (predictions.argmax(-1) == targets).tolist() if classes else []
    return Scores({**{k: float(v) for k, v in metrics.items()}, "samples": len(rows)}, right)


def mean_loss(task: Task, batches: Sequence[Batch], device: torch.device) -> float:
    """The loss of the model as it is, mean over batches."""
    with evaluating(task.model):
        return statistics.fmean(float(loss_of(task, to_device(batch, device))[0]) for batch in batches)


def loss_of(task: Task, batch: Batch) -> tuple[Tensor, Any]:
    """(mean loss, logits) of a batch on the model's device."""
    if task.loss is not None:
        loss, outputs = task.loss(task.model, batch, True)
        return loss, outputs["logits"]
    outputs = task.model(**batch)
    return outputs.loss, outputs.logits


def _joined(labels: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    if labels[0].ndim == 1:
        return np.concatenate(labels)
    width = max(part.shape[1] for part in labels)
    return np.concatenate([np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=-100) for p in labels])


# ---------------------------------------------------------------- layers beside what takes their place


def exchange(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put these modules in the places of those names."""
    for name, module in layers.items():
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, module)


# ---------------------------------------------------------------- seconds


@dataclass
class Pair:
    """Median seconds of two calls taken in turns, and the quartiles of first / second over the turns."""

    dense: float
    compressed: float
    low: float
    high: float

    @property
    def speed(self) -> float:
        """How many times as fast the second is."""
        return self.dense / self.compressed


def compare(
    calls: Sequence[Callable[[], Any]], runs: int, device: torch.device, prepare: Callable[[int], None] | None = None
) -> Pair:
    """Time two calls in turns, each first every other time, after two turns that do not count. `prepare(which)` comes
    before a call and is not timed."""
    spent: list[list[float]] = [[], []]
    for turn in range(runs + 2):
        for which in (0, 1) if turn % 2 else (1, 0):
            if prepare is not None:
                prepare(which)
            _wait(device)
            began = time.perf_counter()
            calls[which]()
            _wait(device)
            if turn >= 2:
                spent[which].append(time.perf_counter() - began)
    ratios = sorted(a / b for a, b in zip(*spent, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    dense, compressed = (statistics.median(times) for times in spent)
    return Pair(dense, compressed, low, high)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def latency(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch, forward: Forward, runs: int, device: torch.device
) -> Pair:
    """A forward pass of the model with its own layers and with `layers` in their places."""
    own = {name: model.get_submodule(name) for name in layers}
    sides = (own, layers)
    for module in layers.values():
        module.eval()
    with evaluating(model):
        try:
            return compare(
                [lambda: forward(model, batch)] * 2, runs, device, lambda which: exchange(model, sides[which])
            )
        finally:
            exchange(model, own)


def layer_latencies(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch, forward: Forward, runs: int, device: torch.device
) -> dict[str, Pair]:
    """{layer: seconds} on the inputs that the batch gives it; layers of one kind share a time."""
    inputs: dict[str, Tensor] = {}

    def listen(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[name] = (args[0] if args else kwargs["input"]).detach()

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(listen(n), with_kwargs=True) for n in layers]
    known: dict[Any, Pair] = {}
    found = {}
    with evaluating(model):
        try:
            forward(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        for name, twin in layers.items():
            if name not in inputs:
                continue
            module, x = model.get_submodule(name), inputs.pop(name)
            twin.eval()
            key = repr((module, repr(getattr(twin, "structure", None)), x.shape, x.dtype))
            if key not in known:
                known[key] = compare([partial(module, x), partial(twin, x)], runs, device)
            found[name] = known[key]
    return found
