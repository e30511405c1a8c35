"""Where a run starts: at the beginning, at a checkpoint, or not at all because it is finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from slimtune.app import checkpoint
from slimtune.app.config import TrainConfig
from slimtune.app.events import FILE as EVENTS
from slimtune.errors import ConfigError, FileFormatError

RUN_STATE = "run_state.json"
CONFIG = "config.yaml"
METRICS = "metrics.json"

FREE = frozenset(  # may differ between a run and its continuation: they do not touch what is learned
    [
        "output_dir",
        "resume_from_checkpoint",
        "test_dataset_name",
        "max_eval_samples",
        "per_device_eval_batch_size",
        "gradient_checkpointing",
        "logging_steps",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "evaluate_base",
        "load_best_model_at_end",
        "metric_for_best_model",
        "early_stopping_patience",
        "dataloader_num_workers",
        "report_to",
    ]
)

MEASURED = (  # free to differ, but a finished run is measured again
    "test_dataset_name",
    "max_eval_samples",
    "evaluate_base",
    "load_best_model_at_end",
    "metric_for_best_model",
)


@dataclass
class Beginning:
    """`path` is the checkpoint to continue from, None for step 0; `finished` are the metrics of a complete run."""

    path: Path | None = None
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    finished: dict[str, Any] | None = None

    @property
    def step(self) -> int:
        return checkpoint.step_of(self.path) if self.path else 0


def find_beginning(cfg: TrainConfig) -> Beginning:
    """Decide from `resume_from_checkpoint` and what lies in `output_dir`; reads only.

    Raises:
        ConfigError: the run there, or the checkpoint named, was made with other settings.
        FileFormatError: the checkpoint named is damaged.
    """
    run, wanted = Path(cfg.output_dir), cfg.resume_from_checkpoint
    if wanted is False:
        return Beginning()
    if isinstance(wanted, str) and wanted != "auto":
        named = Path(wanted)
        problems = checkpoint.verify(named)
        if problems:
            raise FileFormatError(f"resume_from_checkpoint: {named} is damaged: {'; '.join(problems)}")
        return _compatible(cfg, Beginning(named, [], read_state(named)))
    metrics = _finished(run)
    path, skipped = checkpoint.newest_good(run)
    if metrics is not None:
        before = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
        _same(cfg, before, f"the finished run in {run}")
        now = cfg.resolved()
        if path is None or all(before.get(key) == now[key] for key in MEASURED):
            return Beginning(finished=metrics)
    if path is None:
        return Beginning(None, skipped)
    return _compatible(cfg, Beginning(path, skipped, read_state(path)))


def check_surroundings(beginning: Beginning, here: Mapping[str, int]) -> None:
    """Raises ConfigError unless data and processes are as many as the checkpoint was made with."""
    for key, value in here.items():
        before = beginning.state.get(key, value)
        if before != value:
            raise ConfigError(f"cannot continue {beginning.path}: {key} was {before:,}, is {value:,}")


def start_afresh(run: Path) -> None:
    """Discard the checkpoints and results of an earlier run in this folder; its events are kept under a number."""
    for path in checkpoint.checkpoints(run):
        shutil.rmtree(path)
    events = run / EVENTS
    if events.exists():  # a run's own results, not somebody's folder of the same name
        for name in (METRICS, "ranks.json", "report.html"):
            (run / name).unlink(missing_ok=True)
        for name in ("adapter", "model", "plots"):
            shutil.rmtree(run / name, ignore_errors=True)
    if events.exists() and events.stat().st_size:
        number = next(n for n in range(1, 10**6) if not (run / f"events-{n}.jsonl").exists())
        events.rename(run / f"events-{number}.jsonl")


def read_state(folder: Path) -> dict[str, Any]:
    """`run_state.json` of a checkpoint.

    Raises:
        FileFormatError: there is none: not a checkpoint of `slimtune train`.
    """
    try:
        return dict(json.loads((folder / RUN_STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise FileFormatError(f"{folder} is not a checkpoint of slimtune train: {RUN_STATE}: {error}") from None


def relevant(cfg: TrainConfig) -> dict[str, Any]:
    """The settings on which the trained weights depend."""
    return {key: value for key, value in cfg.resolved().items() if key not in FREE}


def _compatible(cfg: TrainConfig, beginning: Beginning) -> Beginning:
    _same(cfg, beginning.state.get("config", {}), str(beginning.path))
    return beginning


def _same(cfg: TrainConfig, before: Mapping[str, Any], where: str) -> None:
    now = relevant(cfg)
    fields = TrainConfig.model_fields  # a run of an earlier version has its default for a key it does not name
    then = {key: before[key] if key in before else fields[key].get_default(call_default_factory=True) for key in now}
    differing = [key for key in now if then[key] != now[key]]
    if differing:
        lines = ", ".join(f"{key} was {then[key]!r}, is {now[key]!r}" for key in differing)
        raise ConfigError(
            f"cannot continue {where} with other settings: {lines}; put them back, choose another output_dir, or "
            "start afresh with resume_from_checkpoint=false, which discards the checkpoints there"
        )


def _finished(run: Path) -> dict[str, Any] | None:
    try:
        metrics = json.loads((run / METRICS).read_text(encoding="utf-8"))
        (run / CONFIG).stat()
    except (OSError, ValueError):
        return None
    return metrics if isinstance(metrics, dict) and (run / EVENTS).exists() else None
