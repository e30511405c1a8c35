"""What a training step keeps and what it needs at its peak.

`python -m bench.memory '{"column": "ours", ...}'` measures the peak of one cell in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from dataclasses import asdict
from typing import Any

import torch

from bench.model import Column, Size, build

__all__ = ["peak_bytes", "peak_in_fresh_process", "saved_bytes"]


class _Kept:
    """What a saved tensor becomes in the graph; it dies with the node that saved it."""

    def __init__(self, t: torch.Tensor) -> None:
        self.tensor = t


def saved_bytes(column: Column) -> int:
    """Bytes of the storages that autograd holds once forward is done, each once, weights apart.

    What a Function puts on its `ctx` by hand escapes this count; the peak does not.
    """
    weights = {t.untyped_storage().data_ptr() for t in [*column.model.parameters(), *column.model.buffers()]}
    saved: list[weakref.ref[_Kept]] = []

    def pack(t: torch.Tensor) -> _Kept:
        kept = _Kept(t)
        saved.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        loss = column.forward()
    alive = [kept.tensor.untyped_storage() for ref in saved if (kept := ref()) is not None]
    total = sum({s.data_ptr(): s.nbytes() for s in alive if s.data_ptr() not in weights}.values())
    loss.backward()
    column.clear()
    return total


def peak_bytes(column: Column, device: str) -> dict[str, int]:
    """Most bytes allocated at once during a step (forward, backward, AdamW), over what was there before it.

    One step is run first, so that optimizer state is counted as already there. `high_water` is the growth of
    the process's resident high-water mark over that first step (CPU only, a lower bound).
    """
    result = {}
    if device.startswith("cuda"):
        _full_step(column)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _full_step(column)
        torch.cuda.synchronize()
        result["peak"] = torch.cuda.max_memory_allocated() - before
        return result
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _full_step(column)
    unit = 1 if sys.platform == "darwin" else 1024
    result["high_water"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        _full_step(column)
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    result["peak"] = peak
    return result


def _full_step(column: Column) -> None:
    column.forward().backward()
    column.before_update()
    column.update()
    column.after_update()
    column.clear()


def peak_in_fresh_process(column: str, method: str, size: Size, dtype: str, device: str) -> dict[str, int]:
    """`peak_bytes` of one cell, in a process that does nothing else."""
    cell = {"column": column, "method": method, "size": asdict(size), "dtype": dtype, "device": device}
    run = subprocess.run(
        [sys.executable, "-m", "bench.memory", json.dumps(cell)], capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise RuntimeError(f"memory of {column} {method} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def _main(cell: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    column = build(cell["column"], cell["method"], Size(**cell["size"]), cell["dtype"], cell["device"])
    print(json.dumps(peak_bytes(column, cell["device"])))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
