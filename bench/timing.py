"""Interleaved step times as ratios to their neighbours.

A shared machine drifts: a step is therefore compared only with the two limit steps run right before and after
it, and on a CPU its time is the process's own CPU time, which does not count waiting for other processes.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.model import Column

__all__ = [
    "CpuClock",
    "CudaClock",
    "Sample",
    "clock_for",
    "interleave",
    "keep_freed_memory",
    "ratios",
    "spread",
    "step",
]

Sample = dict[str, float]
"""Seconds: forward, backward, controllers, step (their sum), optimizer, wall (real time of all)."""


def keep_freed_memory() -> bool:
    """Make glibc's malloc keep what is freed, as a GPU's caching allocator does. False where there is no glibc.

    Otherwise whether a step pays for page faults (20,000 of them, 0.2 s, in some) hangs on what ran before it.
    """
    trim_threshold, mmap_max = -1, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))


class CpuClock:
    """CPU seconds of this process, all threads."""

    def mark(self) -> float:
        return time.process_time()

    def between(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """Seconds on the GPU's own clock, by events."""

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000


def clock_for(device: str) -> CpuClock | CudaClock:
    return CudaClock() if device.startswith("cuda") else CpuClock()


def step(column: Column, clock: CpuClock | CudaClock) -> Sample:
    """One training step of `column`, timed in its parts."""
    start_wall = time.perf_counter()
    marks = [clock.mark()]
    loss = column.forward()
    marks.append(clock.mark())
    loss.backward()
    marks.append(clock.mark())
    column.before_update()
    marks.append(clock.mark())
    column.update()
    marks.append(clock.mark())
    column.after_update()
    marks.append(clock.mark())
    forward, backward, before, optimizer, after = (clock.between(a, b) for a, b in itertools.pairwise(marks))
    wall = time.perf_counter() - start_wall
    column.clear()
    return {
        "forward": forward,
        "backward": backward,
        "controllers": before + after,
        "step": forward + backward + before + after,
        "optimizer": optimizer,
        "wall": wall,
    }


def interleave(
    run: Callable[[Any], Sample], limit: Any, others: Sequence[Any], rounds: int
) -> list[tuple[Any, Sample]]:
    """(what, sample) in the order limit, other, limit, ..., limit; each of `others` once per round."""
    sequence = [limit]
    for _ in range(rounds):
        for other in others:
            sequence += [other, limit]
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        return [(what, run(what)) for what in sequence]
    finally:
        if enabled:
            gc.enable()


def ratios(samples: list[tuple[Any, Sample]], what: Any, part: str, of: str | None = None) -> list[float]:
    """`part` of each step of `what` over the mean `of` (default: the same part) of its two neighbours."""
    of = of or part
    return [
        2 * sample[part] / (samples[i - 1][1][of] + samples[i + 1][1][of])
        for i, (who, sample) in enumerate(samples)
        if who is what
    ]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        values = [*values, *values]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}
