"""Where a method's overhead goes: time per operation, ours (or PEFT's) minus the limit.

python -m bench.profile --method dora --dtype bf16
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch.profiler import ProfilerActivity, profile

from bench.cases import CASES
from bench.model import COLUMNS, DTYPES, SIZES, Column, build
from bench.timing import keep_freed_memory

__all__ = ["by_operation", "main"]

Table = dict[str, tuple[float, float]]
"""Operation -> (milliseconds, calls) of one step; an operation's time is its own, without what it calls."""


def by_operation(columns: list[Column], steps: int, device: str) -> list[Table]:
    """For each column the median over `steps` steps, taken in turns."""
    on_gpu = device.startswith("cuda")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    seen: list[list[Table]] = [[] for _ in columns]
    for turn in range(steps + 2):
        for column, tables in zip(columns, seen, strict=True):
            with profile(activities=activities) as prof:
                column.forward().backward()
            column.clear()
            if turn >= 2:
                own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
                tables.append({e.key: (getattr(e, own) / 1000, e.count) for e in prof.key_averages()})
    return [_median(tables) for tables in seen]


def _median(tables: list[Table]) -> Table:
    keys = {key for table in tables for key in table}
    return {
        key: tuple(statistics.median(values) for values in zip(*(t.get(key, (0, 0)) for t in tables), strict=True))
        for key in keys
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=CASES, required=True)
    parser.add_argument("--column", choices=COLUMNS[1:], default="ours")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--lines", type=int, default=16)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory()
    size = SIZES[options.size or options.device.split(":")[0]]
    columns = [build(name, options.method, size, options.dtype, options.device) for name in ("limit", options.column)]
    limit, method = by_operation(columns, options.steps, options.device)
    total = sum(ms for ms, _ in limit.values())
    print(f"{options.method}, {options.dtype}: own time per step in ms; the limit takes {total:.1f}")
    print(f"{'operation':<46}{'limit':>9}{'calls':>7}{options.column:>9}{'calls':>7}{'extra':>9}{'% limit':>9}")
    none = (0.0, 0.0)
    rows = [(key, limit.get(key, none), method.get(key, none)) for key in {**limit, **method}]
    rows.sort(key=lambda row: -abs(row[2][0] - row[1][0]))
    sums = [sum(row[i][j] for row in rows) for i in (1, 2) for j in (0, 1)]
    for key, (a, m), (b, n) in [*rows[: options.lines], ("total", tuple(sums[:2]), tuple(sums[2:]))]:
        print(f"{key[:45]:<46}{a:>9.2f}{m:>7.0f}{b:>9.2f}{n:>7.0f}{b - a:>9.2f}{100 * (b - a) / total:>9.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
