"""The log of a run: one JSON object per line, only ever appended to."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from slimtune.errors import SlimtuneError

FILE = "events.jsonl"


class Events:
    """Appends to `run/events.jsonl`; a disabled one (not the first process) does nothing.

    A line is {"time": seconds since 1970, "step": optimizer step, "kind": ..., ...}. A number that is not finite is
    written as null. A line torn by a crash is closed, so that it spoils no other line.
    """

    def __init__(self, run: Path, enabled: bool = True):
        self.path = run / FILE
        self.enabled = enabled
        if enabled and self.path.exists() and self.path.stat().st_size:
            with self.path.open("rb+") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one event.

        Raises:
            SlimtuneError: the file cannot be written.
        """
        if not self.enabled:
            return
        event = {"time": round(time.time(), 3), "step": step, "kind": kind, **values}
        line = json.dumps(_finite(event), allow_nan=False) + "\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(line.encode())
        except OSError as error:
            raise SlimtuneError(f"cannot write {self.path}: {error.strerror}") from error


def read(run: Path) -> list[dict[str, Any]]:
    """The events of a run in the order written; lines that are not a JSON object are left out."""
    events = []
    path = run / FILE
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict):
                events.append(event)
    return events


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
