"""The whole model under torch.compile."""

from __future__ import annotations

import time

import torch
from torch._dynamo.utils import counters

from bench.model import Column
from bench.timing import clock_for, interleave, ratios, spread, step

__all__ = ["compiled_step"]


def compiled_step(limit: Column, column: Column, rounds: int, device: str) -> dict[str, object]:
    """The compiled step of `column` over the eager step of `limit`; graphs made; seconds to compile."""
    torch._dynamo.reset()
    counters.clear()
    eager, clock = column.model, clock_for(device)
    column.model = torch.compile(eager)
    try:
        start = time.perf_counter()
        for _ in range(2):
            step(column, clock)
        seconds = time.perf_counter() - start
        step(limit, clock)
        graphs = counters["stats"]["unique_graphs"]
        samples = interleave(lambda c: step(c, clock), limit, [column], rounds)
    finally:
        column.model = eager
        torch._dynamo.reset()
    return {"ratio": spread(ratios(samples, column, "step")), "graphs": graphs, "seconds": seconds}
