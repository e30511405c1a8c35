"""Measure, keep the figures as JSON, write the page.

python -m bench.run --methods lora,dora --dtype bf16 --rounds 15
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import sys
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench import compiled, memory, parity, report, small
from bench.cases import CASES
from bench.model import COLUMNS, DTYPES, SIZES, Size, build
from bench.timing import clock_for, interleave, keep_freed_memory, ratios, spread, step

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results"
MEASURES = ("step", "memory", "lifecycle", "call", "startup", "compile")
DEFAULT_MEASURES = MEASURES[:-1]


def measure_step(method: str, size: Size, dtype: str, device: str, rounds: int, wanted: list[str]) -> dict[str, Any]:
    """Forward, backward and optimizer of every column, as ratios to the limit's neighbouring steps."""
    clock = clock_for(device)
    columns = {name: build(name, method, size, dtype, device) for name in wanted}
    limit, others = columns["limit"], [c for n, c in columns.items() if n != "limit"]
    for column in columns.values():
        for _ in range(2):
            step(column, clock)
    samples = interleave(lambda c: step(c, clock), limit, others, rounds)
    alone = [s for who, s in samples if who is limit]
    result: dict[str, Any] = {
        "limit": {
            "seconds": spread([s["step"] for s in alone]),
            "wall_seconds": spread([s["wall"] for s in alone]),
        }
    }
    for column in others:
        result[column.name] = {
            "ratio": spread(ratios(samples, column, "step")),
            "forward": spread(ratios(samples, column, "forward")),
            "backward": spread(ratios(samples, column, "backward")),
            "controllers": spread(ratios(samples, column, "controllers", of="step")),
            "optimizer": spread(ratios(samples, column, "optimizer", of="step")),
            "wall": spread(ratios(samples, column, "wall")),
            "trained": sum(p.numel() for p in column.trained),
        }
    result["rounds"] = rounds
    return result


def measure_memory(method: str, size: Size, dtype: str, device: str, wanted: list[str]) -> dict[str, Any]:
    """Bytes kept for the backward pass, and the peak of one step in a fresh process."""
    return {
        name: {
            "saved": _saved(name, method if name != "limit" else "", size, dtype, device),
            **_peak(name, method if name != "limit" else "", size, dtype, device),
        }
        for name in wanted
    }


@functools.cache
def _saved(column: str, method: str, size: Size, dtype: str, device: str) -> int:
    return memory.saved_bytes(build(column, method, size, dtype, device))


@functools.cache
def _peak(column: str, method: str, size: Size, dtype: str, device: str) -> dict[str, int]:
    return memory.peak_in_fresh_process(column, method, size, dtype, device)


def measure_lifecycle(method: str, size: Size, dtype: str, device: str, wanted: list[str]) -> dict[str, Any]:
    return {c: small.lifecycle(c, method, size, dtype, device) for c in wanted if c != "limit"}


def measure_compile(method: str, size: Size, dtype: str, device: str, rounds: int, wanted: list[str]) -> dict[str, Any]:
    result = {"limit": _compiled_limit(size, dtype, device, rounds)}
    limit = build("limit", method, size, dtype, device)
    for name in wanted:
        if name != "limit":
            result[name] = compiled.compiled_step(limit, build(name, method, size, dtype, device), rounds, device)
    return result


@functools.cache
def _compiled_limit(size: Size, dtype: str, device: str, rounds: int) -> dict[str, Any]:
    eager, column = (build("limit", "", size, dtype, device) for _ in range(2))
    return compiled.compiled_step(eager, column, rounds, device)


def environment(device: str) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    versions = {name: version(name) for name in ("slimtune", "torch", "peft", "transformers")}
    machine = {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name(device)
    return {"machine": machine, "python": platform.python_version(), "versions": versions}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def keep(path: Path, measures: dict[str, Any], made: dict[str, Any], **about: Any) -> None:
    """Put `measures` into the file, each with how it was made; older ones of other names stay."""
    content = json.loads(path.read_text()) if path.exists() else {}
    if any(content.get(key) != value for key, value in about.items()):
        content = {}
    content.update(about)
    content.update({name: {**values, "made": made} for name, values in measures.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(CASES), help="comma separated; default: every row of cases.py")
    parser.add_argument("--dtype", default="fp32,bf16", help="fp32, bf16 or both, comma separated (default: both)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--size", choices=SIZES, help="default: the device's own")
    for field in fields(Size):
        parser.add_argument(f"--{field.name}", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--columns", default=",".join(COLUMNS), help="which of limit, peft, ours")
    parser.add_argument("--rounds", type=int, default=11, help="steps of each column (default 11)")
    parser.add_argument("--measure", default=",".join(DEFAULT_MEASURES), help=f"of {', '.join(MEASURES)}")
    parser.add_argument("--compile", action="store_true", help="also measure under torch.compile (minutes)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--out", type=Path, default=Path("docs/performance.md"), help="the page")
    parser.add_argument("--report-only", action="store_true", help="write the page from the JSON files")
    options = parser.parse_args(argv)
    options.measures = options.measure.split(",") + ["compile"] * options.compile
    for name, values, known in (
        ("--methods", options.methods.split(","), CASES),
        ("--dtype", options.dtype.split(","), DTYPES),
        ("--columns", options.columns.split(","), COLUMNS),
        ("--measure", options.measures, MEASURES),
    ):
        if unknown := [v for v in values if v not in known]:
            parser.error(f"{name}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    if "limit" not in options.columns.split(","):
        parser.error("--columns: every figure is a ratio to limit, so limit must be among them")
    size = SIZES[options.size or ("cuda" if options.device.startswith("cuda") else "cpu")]
    chosen = {f.name: getattr(options, f.name) for f in fields(Size) if getattr(options, f.name) is not None}
    options.model = replace(size, **chosen)
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if not options.report_only:
        measure(options, " ".join(["python -m bench.run", *(sys.argv[1:] if argv is None else argv)]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(report.page(options.results))
    print(f"wrote {options.out}")
    return 0


def measure(options: argparse.Namespace, command: str) -> None:
    device, size = options.device, options.model
    if device == "cpu":
        torch.set_num_threads(1)
        keep_freed_memory()
    made = {"command": command, "date": datetime.date.today().isoformat(), **environment(device)}
    kind = device.split(":")[0]
    for dtype in options.dtype.split(","):
        for method in options.methods.split(","):
            print(f"{kind} {dtype} {method}:", end="", flush=True)
            wanted = [c for c in options.columns.split(",") if c != "peft" or CASES[method].peft is not None]
            about = {"device": kind, "dtype": dtype, "method": method, "model": asdict(size)}
            path = options.results / f"{kind}-{dtype}-{method}.json"
            common = (method, size, dtype, device)
            steps: dict[str, Any] = {
                "step": lambda c=common, w=wanted: measure_step(*c, options.rounds, w),
                "memory": lambda c=common, w=wanted: measure_memory(*c, w),
                "lifecycle": lambda c=common, w=wanted: measure_lifecycle(*c, w),
                "call": lambda c=common, w=wanted: small.tiny_call(c[0], device, w),
                "compile": lambda c=common, w=wanted: measure_compile(*c, options.rounds, w),
            }
            if set(wanted) == set(COLUMNS):
                keep(path, {"parity": {"difference": parity.difference(method, device)}}, made, **about)
                print(" parity", end="", flush=True)
            for name, run in steps.items():
                if name in options.measures:
                    keep(path, {name: run()}, made, **about)
                    print(f" {name}", end="", flush=True)
            print()
    if "startup" in options.measures and "ours" in options.columns.split(","):
        keep(options.results / "startup.json", {"startup": small.startup()}, made)


if __name__ == "__main__":
    raise SystemExit(main())
