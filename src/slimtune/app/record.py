"""What a run folder says, read without trusting it: files may be missing, torn or of a run that was killed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

TIMELINE = ("start", "calibration", "resume", "skip", "save", "stop", "end")
RISING = ("accuracy", "f1", "mcc", "matthews", "pearson", "spearman", "precision", "recall", "score", "r2", "auc")


@dataclass
class Record:
    """A run folder in memory. Every field may be empty."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    rank_events: list[dict[str, Any]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    """What controllers told beside ranks, such as stable ranks."""
    timeline: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        """``finished``, ``diverged``, ``interrupted``, ``stopped``, ``running`` (or killed) or ``empty``."""
        kinds = [event["kind"] for event in self.timeline if event["kind"] != "save"]
        if not kinds and not self.logs:
            return "finished" if self.metrics else "empty"
        last = kinds[-1] if kinds else "start"
        if last == "end":
            return "finished"
        if last == "stop":
            reason = next(str(e.get("reason", "")) for e in reversed(self.timeline) if e["kind"] == "stop")
            known = (word for word in ("diverged", "interrupted") if reason.startswith(word))
            return next(known, "stopped")
        return "running"

    @property
    def info(self) -> dict[str, Any]:
        """What the task found out about its data: ``labels``, ``rows``, ``image_shape`` and more."""
        found = self.metrics.get("info")
        if isinstance(found, dict):
            return found
        return next((e for e in reversed(self.timeline) if e["kind"] == "start"), {})

    @property
    def labels(self) -> list[str] | None:
        """The class names of the run, None where the task has none."""
        found = self.config.get("labels") or self.info.get("labels")
        return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else None

    def examples(self, split: str) -> int | None:
        """How many examples a split was scored on."""
        scored, rows = self.metrics.get(split), self.info.get("rows")
        counts = (t.get(key) for t, key in ((scored, "samples"), (rows, split)) if isinstance(t, dict))
        return next((int(count) for c in counts if (count := number(c))), None)

    @property
    def step(self) -> int:
        """The last step that any event names."""
        return max((int(e.get("step") or 0) for e in (*self.logs, *self.evaluations, *self.timeline)), default=0)

    def rank_history(self) -> tuple[list[int], dict[str, list[int]]]:
        """(steps, ranks by layer from each of these steps on); what an event does not tell stays as it was."""
        told: dict[int, dict[str, int]] = {}
        for event in self.rank_events:
            ranks = event["ranks"] if isinstance(event.get("ranks"), dict) else {}
            known = {name: rank for name, value in ranks.items() if 0 <= (rank := number(value) or 0.0) < 2**31}
            if known and (step := number(event["step"])) is not None:
                told[int(step)] = {name: int(rank) for name, rank in known.items()}
        steps, layers = sorted(told), dict.fromkeys(name for ranks in told.values() for name in ranks)
        history: dict[str, list[int]] = {}
        for name in layers:
            first = next(told[step][name] for step in steps if name in told[step])
            values: list[int] = []
            for step in steps:
                values.append(told[step].get(name, values[-1] if values else first))
            history[name] = values
        return steps, history

    def stable_ranks(self) -> tuple[dict[str, tuple[list[int], list[float]]], int | None]:
        """({layer: (steps, stable ranks)}, the step after which layers got ranks by them, if one did)."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        chosen = None
        for event in sorted((*self.notes, *self.rank_events), key=lambda e: number(e["step"]) or 0.0):
            told = event.get("stable_ranks")
            for name, value in told.items() if isinstance(told, dict) else ():
                if (value := number(value)) is not None:
                    steps, values = found.setdefault(str(name), ([], []))
                    steps.append(int(event["step"]))
                    values.append(value)
            if isinstance(told, dict) and isinstance(event.get("ranks"), dict) and event["ranks"]:
                chosen = int(event["step"])
        return found, chosen

    def series(self, key: str, events: list[dict[str, Any]] | None = None) -> tuple[list[float], list[float]]:
        """(steps, values) of the finite numbers logged under `key`, or under ``eval_`` + `key`."""
        steps, values = [], []
        for event in self.logs if events is None else events:
            value = number(event.get(key, event.get(f"eval_{key}")))
            if value is not None:
                steps.append(float(event.get("step") or 0))
                values.append(value)
        return steps, values


def read_record(run: str | Path) -> Record:
    """Read config.yaml, metrics.json, ranks.json and events.jsonl; what cannot be read becomes one of `problems`.

    When a run was resumed from a checkpoint, what it had logged beyond that step is dropped: it was done again.
    """
    record = Record(Path(run))
    record.config = _mapping(record, "config.yaml", yaml.safe_load)
    record.metrics = _mapping(record, "metrics.json", json.loads)
    ranks = _parse(record, "ranks.json", json.loads)
    rows = ranks.get("layers") if isinstance(ranks, dict) else ranks
    record.ranks = [row for row in rows or [] if isinstance(row, dict) and "name" in row]
    for event in _events(record):
        kind = event["kind"]
        if kind == "resume":
            step = int(number(event.get("step")) or 0)
            record.logs = [e for e in record.logs if e["step"] <= step]
            record.evaluations = [e for e in record.evaluations if e["step"] <= step]
            record.rank_events = [e for e in record.rank_events if e["step"] <= step]
            record.notes = [e for e in record.notes if e["step"] <= step]
        if kind == "log":
            record.logs.append(event)
        elif kind == "eval":
            record.evaluations.append(event)
        elif kind == "note":
            record.notes.append(event)
        elif kind == "ranks":
            record.rank_events.append(event)
        elif kind in TIMELINE:
            record.timeline.append(event)
    return record


def number(value: Any) -> float | None:
    """`value` as a float if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def metric_value(metrics: Any, name: str) -> float | None:
    """A metric from a table of them, with or without the Trainer's prefix."""
    if not isinstance(metrics, dict):
        return None
    return next((v for k in (name, f"eval_{name}", f"test_{name}") if (v := number(metrics.get(k))) is not None), None)


def rises(metric: str) -> bool:
    """Whether more is better."""
    return any(word in metric.lower() for word in RISING)


def _events(record: Record) -> list[dict[str, Any]]:
    path = record.path / "events.jsonl"
    if not path.is_file():
        record.problems.append("events.jsonl is missing: there are no curves")
        return []
    lines = path.read_bytes().splitlines()
    events, torn = [], []
    for i, line in enumerate(lines):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        if isinstance(event, dict) and isinstance(event.get("kind"), str) and number(event.get("step", 0)) is not None:
            events.append({"step": 0, **event})
        elif line.strip():
            torn.append(i + 1)
    if torn == [len(lines)]:
        record.problems.append("the last line of events.jsonl is torn (the run was cut off while writing); left out")
    elif torn:
        record.problems.append(f"events.jsonl: {len(torn)} unreadable lines left out (first: line {torn[0]})")
    return events


def _mapping(record: Record, name: str, parse: Any) -> dict[str, Any]:
    value = _parse(record, name, parse)
    if value is not None and not isinstance(value, dict):
        record.problems.append(f"{name} does not hold a table; left out")
    return value if isinstance(value, dict) else {}


def _parse(record: Record, name: str, parse: Any) -> Any:
    path = record.path / name
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        record.problems.append(f"{name} is missing")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        record.problems.append(f"{name} cannot be read ({str(error).splitlines()[0]})")
    return None
