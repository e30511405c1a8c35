"""Where a method's overhead goes: time per operation, ours (or PEFT's) minus the limit.

python -m bench.profile --method dora --dtype bf16
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from bench.cases import CASES
from bench.model import COLUMNS, DTYPES, SIZES, Column, build

__all__ = ["by_operation", "main"]


def by_operation(column: Column, steps: int, device: str) -> tuple[Counter[str], Counter[str]]:
    """(milliseconds, calls) per step of every operation's own time."""
    on_gpu = device.startswith("cuda")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    for _ in range(2):
        column.forward().backward()
        column.clear()
    with profile(activities=activities) as prof:
        for _ in range(steps):
            column.forward().backward()
            column.clear()
    milliseconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in prof.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        milliseconds[event.key] += own / 1000 / steps
        calls[event.key] += event.count / steps
    return milliseconds, calls


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=CASES, required=True)
    parser.add_argument("--column", choices=COLUMNS[1:], default="ours")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--lines", type=int, default=20)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    size = SIZES[options.size or options.device.split(":")[0]]
    ms, calls = {}, {}
    for name in ("limit", options.column):
        column = build(name, options.method, size, options.dtype, options.device)
        ms[name], calls[name] = by_operation(column, options.steps, options.device)
    total = ms["limit"].total()
    print(
        f"{options.method}, {options.dtype}, ms per step; the limit takes {total:.1f} ms under the profiler"
    )
    print(
        f"{'operation':<46}{'limit':>9}{'calls':>7}{options.column:>9}{'calls':>7}{'extra':>9}{'% limit':>9}"
    )
    extra = {key: ms[options.column][key] - ms["limit"][key] for key in ms["limit"] | ms[options.column]}
    for key in sorted(extra, key=lambda k: -abs(extra[k]))[: options.lines]:
        numbers = [f"{ms[n][key]:>9.2f}{calls[n][key]:>7.0f}" for n in ("limit", options.column)]
        print(f"{key[:45]:<46}{''.join(numbers)}{extra[key]:>9.2f}{100 * extra[key] / total:>9.2f}")
    print(
        f"{'total':<46}{total:>9.2f}{'':>7}{ms[options.column].total():>9.2f}{'':>7}{sum(extra.values()):>9.2f}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
