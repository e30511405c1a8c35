"""Every method on real data: `slimtune train` with `method: NAME` and nothing else changed.

    python -m bench.real                                   # what is missing of all tasks x all methods
    python -m bench.real --tasks trec,cola --methods c3a   # these again
    python -m bench.real --page                            # print the tables of docs/methods.md

Needs `python examples/prepare_data.py FOLDER` once. Each run is a process of its own on one thread; its figures go to
`bench/results/real/<task>-<method>.json`. Within a task everything but the method is the same: data, order, head and
its rate, schedule, number of steps, seed. The adapter's learning rate is the recipe's own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "real"


@dataclass(frozen=True)
class RealTask:
    """One example, shortened.

    Attributes:
        title: shown above the column.
        config: of `examples/`.
        overrides: on top of it; the learning rates stay each method's own.
        metric: of the test set.
        baseline: what the frozen base reaches: "head" (a run that trains the new head only) or "base" (untouched).
    """

    title: str
    config: str
    overrides: tuple[str, ...]
    metric: str
    baseline: str = "head"
    higher_is_better: bool = True


TASKS: dict[str, RealTask] = {
    "trec": RealTask("TREC, accuracy", "trec.yaml", ("per_device_train_batch_size=8", "max_steps=200"), "accuracy"),
    "cola": RealTask("CoLA, Matthews", "cola.yaml", ("per_device_train_batch_size=8", "max_steps=500"), "mcc"),
    "rte": RealTask(
        "RTE, accuracy", "rte.yaml", ("max_length=80", "max_steps=200", "max_eval_samples=300"), "accuracy"
    ),
    "jpeg_cifar": RealTask(
        "JPEG-CIFAR, accuracy",
        "jpeg_cifar.yaml",
        ("per_device_train_batch_size=64", "max_steps=80", "modules_to_save=[linear]", "max_eval_samples=2500"),
        "accuracy",
    ),
    "shakespeare": RealTask(
        "Shakespeare, nats",
        "shakespeare.yaml",
        ("per_device_train_batch_size=8", "max_steps=80"),
        "loss",
        "base",
        False,
    ),
}


def methods() -> list[str]:
    """Every recipe, after the baseline."""
    from slimtune.recipes import RECIPES

    return ["head", *sorted(RECIPES)]


HEAD_RATES = (1e-3, 1e-2, 1e-1)
"""The baseline gets the best of three rates, by validation."""


def measure(task: str, method: str, threads: int) -> dict[str, Any]:
    """The row for a result file. A method that refuses the model's layers gives a row with the refusal."""
    if method != "head":
        return run(task, threads, f"method={method}")
    every = [run(task, threads, "method=head", "target_modules=all-linear", f"learning_rate={r}") for r in HEAD_RATES]
    return max(every, key=lambda row: row.get("validation", -1.0))


def run(task: str, threads: int, *more: str) -> dict[str, Any]:
    """One run of `slimtune train`."""
    plan = TASKS[task]
    method = more[0].removeprefix("method=")
    overrides = ["learning_rate=null", "method_options={}", "num_train_epochs=3", *plan.overrides, *more]
    command = ["slimtune", "train", "--config", f"examples/{plan.config}", *overrides]
    row: dict[str, Any] = {"task": task, "method": method, "command": " ".join(command)}
    folder = Path(tempfile.mkdtemp(prefix="real-"))
    start = time.time()
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command, f"output_dir={folder / 'run'}"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or done.stdout.strip().splitlines()
            return {**row, "error": lines[-1] if lines else f"exit code {done.returncode}"}
        found = json.loads((folder / "run" / "metrics.json").read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    base = found.get("base_test") or {}
    return {
        **row,
        "metric": plan.metric,
        "test": found["test"][plan.metric],
        "validation": found["validation"][plan.metric],
        "base": base.get(plan.metric),
        "samples": found["test"]["samples"],
        "adapter_bytes": found["adapter_bytes"],
        "trainable_parameters": found["trainable_parameters"],
        "seconds_per_step": found["seconds_per_step"],
        "peak_memory_bytes": found["peak_memory_bytes"],
        "steps": found["steps"],
        "seconds": round(time.time() - start, 1),
    }


def rows() -> dict[tuple[str, str], dict[str, Any]]:
    """All that was measured, by (task, method)."""
    found = (json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json")))
    return {(row["task"], row["method"]): row for row in found}


def table() -> str:
    """Test results, one row per method; bold: better than the frozen base."""
    known = rows()
    tasks = {name: plan for name, plan in TASKS.items() if any(task == name for task, _ in known)}
    lines = [
        f"| method | {' | '.join(t.title for t in tasks.values())} |",
        "| --- |" + " ---: |" * len(tasks),
        f"| frozen base | {' | '.join(_shown(_baseline(known, t)) for t in tasks)} |",
    ]
    for method in methods()[1:]:
        cells = []
        for task, plan in tasks.items():
            row, bar = known.get((task, method)), _baseline(known, task)
            if row is None or "error" in row:
                cells.append("refused" if row else "")
                continue
            better = bar is not None and (row["test"] > bar) == plan.higher_is_better and row["test"] != bar
            cells.append(f"**{_shown(row['test'])}**" if better else _shown(row["test"]))
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def costs() -> str:
    """Parameters of the adapter (the head apart), peak memory of the process and size of the file."""
    known, shown = rows(), ("trec", "jpeg_cifar", "shakespeare")
    lines = [
        "| method | " + " | ".join(f"{t}: parameters | memory, MB | file, kB" for t in shown) + " |",
        "| --- |" + " ---: |" * 3 * len(shown),
    ]
    for method in methods()[1:]:
        cells = []
        for task in shown:
            row, head = known.get((task, method), {}), known.get((task, "head"), {})
            if "test" not in row:
                cells += [""] * 3
                continue
            own = row["trainable_parameters"] - head.get("trainable_parameters", 0)
            cells += [f"{own:,}", f"{row['peak_memory_bytes'] / 2**20:,.0f}", f"{row['adapter_bytes'] / 1e3:,.0f}"]
        if any(cells):
            lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _baseline(known: dict[tuple[str, str], dict[str, Any]], task: str) -> float | None:
    if TASKS[task].baseline == "head":
        return known.get((task, "head"), {}).get("test")
    return next((row["base"] for (t, _), row in known.items() if t == task and row.get("base") is not None), None)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", help="default: those without a result")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page", action="store_true")
    told = parser.parse_args(arguments)
    if told.page:
        print(table(), costs(), sep="\n")
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    for method in told.methods.split(",") if told.methods else methods():
        for task in told.tasks.split(","):
            path = RESULTS / f"{task}-{method}.json"
            if (path.exists() and not told.methods) or (method == "head" and TASKS[task].baseline != "head"):
                continue
            row = measure(task, method, told.threads)
            path.write_text(json.dumps(row, indent=1) + "\n")
            print(task, method, row.get("error") or f"{row['test']:.4f}  {row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
