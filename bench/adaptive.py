"""Methods that move ranks, gradients or starting values, against fixed LoRA, at one budget on real data.

    python -m bench.adaptive                       # every run that has no result yet
    python -m bench.adaptive --tasks trec --methods lora,gora
    python -m bench.adaptive --page                # print the tables of docs/results.md

Needs `python examples/prepare_data.py FOLDER` once. Every method gets the same parameters (LoRA's at rank 8), the same
learning rates to choose from, by validation with one seed, and then the same seeds at its rate; everything else of a
task is the same for all. A run is `slimtune train` as anyone would type it; `bench/results/adaptive/` keeps one file
per run, with its command.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "adaptive"
PICTURES = ROOT / "docs" / "images" / "adaptive"
RATES = (1.5e-4, 5e-4, 1.5e-3, 4.5e-3, 1.35e-2)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Task:
    """One of `examples/`, shortened; `metric` is that of validation and test."""

    title: str
    config: str
    overrides: tuple[str, ...]
    metric: str
    higher_is_better: bool = True
    rates: tuple[float, ...] = RATES


TASKS: dict[str, Task] = {
    "trec": Task("TREC, accuracy", "trec.yaml", ("per_device_train_batch_size=8", "max_steps=120"), "accuracy"),
    "cola": Task(
        "CoLA, Matthews", "cola.yaml", ("per_device_train_batch_size=16", "max_steps=300"), "mcc", rates=RATES[1:4]
    ),
    "rte": Task("RTE, accuracy", "rte.yaml", ("max_length=64", "max_steps=100"), "accuracy", rates=RATES[1:4]),
    "shakespeare": Task(
        "Shakespeare, nats",
        "shakespeare.yaml",
        ("per_device_train_batch_size=8", "max_steps=80", "max_eval_samples=100"),
        "loss",
        False,
    ),
}

METHODS: dict[str, str] = {
    "lora": "{rank: 8}",
    "adalora": "{rank: 8}",
    "elalora": "{rank: 8}",
    "ardlora": "{rank: 8, heads: 1, budget: 1.0}",
    "gora": "{rank: 8}",
    "lorapro": "{rank: 8}",
    "lorapro-full": "{rank: 8, form: full}",
    "pissa": "{rank: 8}",
    "loraga": "{rank: 8}",
}


@dataclass(frozen=True)
class Run:
    """One training run."""

    task: str
    method: str
    rate: float
    seed: int

    @property
    def path(self) -> Path:
        """Where its result is kept."""
        return RESULTS / f"{self.task}-{self.method}-{self.rate:g}-{self.seed}.json"

    @property
    def settings(self) -> list[str]:
        """What is changed in the example's configuration."""
        return [
            *("load_best_model_at_end=false", "evaluate_base=false", "num_train_epochs=3"),
            *TASKS[self.task].overrides,
            f"method={self.method.partition('-')[0]}",
            f"method_options={METHODS[self.method]}",
            f"learning_rate={self.rate:g}",
            f"seed={self.seed}",
        ]


def carry_out(run: Run) -> dict[str, Any]:
    """Train in this process; the row for the result file."""
    from slimtune.app.config import load_config
    from slimtune.app.train import train

    task = TASKS[run.task]
    shown = " ".join(f"'{s}'" if " " in s else s for s in run.settings)
    row: dict[str, Any] = {
        "task": run.task,
        "method": run.method,
        "rate": run.rate,
        "seed": run.seed,
        "command": f"slimtune train --config examples/{task.config} {shown}",
    }
    folder = Path(tempfile.mkdtemp(prefix="adaptive-"))
    start = time.time()
    try:
        done = train(load_config(ROOT / "examples" / task.config, [*run.settings, f"output_dir={folder / 'run'}"]))
        found = done.metrics
        row |= {
            "validation": found["validation"][task.metric],
            "test": found["test"][task.metric],
            "samples": found["test"]["samples"],
            "trainable_parameters": found["trainable_parameters"],
            "layers": json.loads((folder / "run" / "ranks.json").read_text()),
            "seconds_per_step": found["seconds_per_step"],
        }
        if run.seed == SEEDS[0]:
            _keep_picture(folder / "run" / "plots", run, {layer["rank"] for layer in row["layers"]})
    except Exception as error:  # a diverged run is a result too
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return row | {"seconds": round(time.time() - start, 1)}


def _keep_picture(plots: Path, run: Run, ranks: set[int | None]) -> None:
    """Ranks over time where they moved, those at the end where they only differ, nothing where they are all alike."""
    moved, differ = plots / "ranks.png", plots / "layers.png"
    picture = moved if moved.exists() else differ if len(ranks - {None}) > 1 else None
    if picture is not None:
        PICTURES.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, PICTURES / f"{run.task}-{run.method}-{run.rate:g}.png")


def rows() -> list[dict[str, Any]]:
    """All that was measured."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def best_rate(task: str, method: str) -> float | None:
    """The rate with the best validation of the first seed; None until every rate was tried."""
    tried = {r["rate"]: r for r in rows() if (r["task"], r["method"], r["seed"]) == (task, method, SEEDS[0])}
    if not set(tried) >= set(TASKS[task].rates):
        return None
    sign = 1 if TASKS[task].higher_is_better else -1
    good = [(sign * r["validation"], -rate) for rate, r in tried.items() if "validation" in r]
    return -max(good)[1] if good else None


def missing(tasks: Sequence[str], methods: Sequence[str]) -> Iterable[Run]:
    """Runs to do now: all rates with the first seed, then the other seeds at the best one."""
    for task in tasks:
        for method in methods:
            rate = best_rate(task, method)
            wanted = [Run(task, method, r, SEEDS[0]) for r in TASKS[task].rates]
            if rate is not None:
                wanted += [Run(task, method, rate, seed) for seed in SEEDS[1:]]
            yield from (run for run in wanted if not run.path.exists())


def table() -> str:
    """Test results: mean and standard deviation over the seeds, one row per method."""
    known = rows()
    tasks = [t for t in TASKS if any(r["task"] == t for r in known)]
    lines = [f"| method | {' | '.join(TASKS[t].title for t in tasks)} |", "| --- |" + " ---: |" * len(tasks)]
    for method in METHODS:
        cells = []
        for task in tasks:
            rate = best_rate(task, method)
            mine = [r for r in known if (r["task"], r["method"], r["rate"]) == (task, method, rate)]
            values = [r["test"] for r in mine if "test" in r]
            failed = len(mine) - len(values)
            if not values:
                cells.append("")
                continue
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" + (f" ({failed} failed)" if failed else ""))
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rates() -> str:
    """The rate each method chose, and what validation said of every rate."""
    known = rows()
    tasks = [t for t in TASKS if any(r["task"] == t for r in known)]
    lines = [f"| method | {' | '.join(tasks)} |", "| --- |" + " --- |" * len(tasks)]
    for method in METHODS:
        cells = []
        for task in tasks:
            tried = {r["rate"]: r for r in known if (r["task"], r["method"], r["seed"]) == (task, method, SEEDS[0])}
            chosen = best_rate(task, method)
            shown = [
                (f"**{r:g}: {v:.3f}**" if r == chosen else f"{r:g}: {v:.3f}")
                if (v := row.get("validation")) is not None
                else f"{r:g}: diverged"
                for r, row in sorted(tried.items())
            ]
            cells.append(", ".join(shown))
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--page", action="store_true")
    told = parser.parse_args(arguments)
    if told.page:
        print(table(), rates(), sep="\n")
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(ROOT)
    tasks, methods = told.tasks.split(","), told.methods.split(",")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(told.processes, context) as pool:
        under_way: dict[Any, Run] = {}
        while True:
            for run in missing(tasks, methods):
                if len(under_way) < told.processes and run not in under_way.values():
                    under_way[pool.submit(carry_out, run)] = run
            if not under_way:
                return
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                run, row = under_way.pop(future), future.result()
                run.path.write_text(json.dumps(row) + "\n")
                shown = row.get("error") or f"{row['validation']:.4f} {row['test']:.4f}"
                print(f"{run.path.stem:40} {shown}  {row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
