"""What a compression has reached, layer by layer, so that the same command goes on where it was stopped.

`state/` in the output folder holds one table and one safetensors file per finished layer or set of statistics, each
written beside its place, synced, and renamed; the table with their hashes is written last. It is removed at the end.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.errors import ConfigError, SlimtuneError
from slimtune.files import write_synced

if TYPE_CHECKING:
    from torch import Tensor

    from slimtune.app.compress.config import CompressConfig

FOLDER, TABLE, RECORD, CONFIG = "state", "state.json", "compress.json", "compress.yaml"
FORMAT = 1
FREE = frozenset(["output_dir", "plan_only", "dense", "latency_runs", "tolerance", "resume", "memory"])
PLANNING = frozenset(["keep", "allocation", "multiple", "ranks", "skip"])  # may change until a layer is finished


def finished(cfg: CompressConfig) -> dict[str, Any] | None:
    """The record of a compression that is complete, None if there is none or `resume` is false.

    Raises:
        ConfigError: it was made with other settings.
    """
    run = Path(cfg.output_dir)
    if not cfg.resume or cfg.plan_only:
        return None
    try:
        record = json.loads((run / RECORD).read_text(encoding="utf-8"))
        before = dict(record["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    same(cfg, before, f"the finished compression in {run}", FREE - {"dense"})
    return dict(record)


def same(cfg: CompressConfig, before: Mapping[str, Any], where: str, free: frozenset[str]) -> None:
    """Raise ConfigError, naming every setting that differs, unless all but the `free` ones are as they were."""
    now, fields = cfg.resolved(), type(cfg).model_fields
    then = {k: before[k] if k in before else fields[k].get_default(call_default_factory=True) for k in now}
    differing = [key for key in now if key not in free and then[key] != now[key]]
    if differing:
        lines = ", ".join(f"{key} was {then[key]!r}, is {now[key]!r}" for key in differing)
        raise ConfigError(
            f"cannot continue {where} with other settings: {lines}; put them back, choose another output_dir, or "
            "start afresh with resume=false, which discards what lies there"
        )


class State:
    """Reads and writes `state/`. Opening it discards an earlier one where the configuration says so.

    Raises:
        ConfigError: what lies there was made with other settings.
        SlimtuneError: the folder cannot be written.
    """

    def __init__(self, cfg: CompressConfig) -> None:
        self.run = Path(cfg.output_dir)
        self.folder = self.run / FOLDER
        self.table: dict[str, Any] = {"format": FORMAT, "config": cfg.resolved(), "values": {}, "files": {}}
        self.continued = False
        if cfg.resume:
            self._take(cfg)
        with writing(self.run):
            if not self.continued:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_table()

    def _take(self, cfg: CompressConfig) -> None:
        try:
            found = json.loads((self.folder / TABLE).read_text(encoding="utf-8"))
            known = found["format"] == FORMAT and isinstance(found["values"], dict) and isinstance(found["files"], dict)
        except (OSError, ValueError, KeyError, TypeError):
            return
        if not known:
            return
        begun = any(name.startswith("layer/") for name in found["files"])
        same(cfg, found["config"], f"what was begun in {self.run}", FREE if begun else FREE | PLANNING)
        self.table["values"], self.table["files"] = found["values"], found["files"]
        self.continued = True

    def value(self, name: str) -> Any:
        """A small JSON value that was kept, None if there is none."""
        return self.table["values"].get(name)

    def keep_value(self, name: str, value: Any) -> None:
        """Keep a small JSON value."""
        self.table["values"][name] = value
        with writing(self.run):
            self._write_table()

    def note(self, name: str) -> dict[str, Any] | None:
        """What was kept beside the tensors of that name, None if there are none."""
        entry = self.table["files"].get(name)
        return None if entry is None else dict(entry["note"])

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        """Tensors that were kept; None if there are none, or if their file is damaged, which is told."""
        from safetensors.torch import load

        entry = self.table["files"].get(name)
        if entry is None:
            return None
        path = self.folder / str(entry["file"])
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() == entry["sha256"]:
                return load(data)
            reason = "damaged"
        except OSError as error:
            reason = error.strerror or "unreadable"
        print(f"{path}: {reason}; {name} is done again", file=sys.stderr)
        del self.table["files"][name]
        return None

    def keep(self, name: str, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
        """Keep tensors and a small JSON table under a name.

        Raises:
            SlimtuneError: the folder cannot be written; what was kept before is intact.
        """
        from safetensors.torch import save

        data = save({key: t.detach().cpu().contiguous() for key, t in tensors.items()})
        file = hashlib.sha256(name.encode()).hexdigest()[:16] + ".safetensors"
        with writing(self.run):
            _replace(self.folder / file, data)
            entry = {"file": file, "sha256": hashlib.sha256(data).hexdigest(), "note": dict(note)}
            self.table["files"][name] = entry
            self._write_table()

    def drop(self, prefix: str) -> None:
        """Forget everything whose name starts so, and free its disk."""
        gone = {name: entry for name, entry in self.table["files"].items() if name.startswith(prefix)}
        if not gone:
            return
        for name in gone:
            del self.table["files"][name]
        with writing(self.run):
            self._write_table()
            for entry in gone.values():
                (self.folder / str(entry["file"])).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_table(self) -> None:
        _replace(self.folder / TABLE, json.dumps(self.table, indent=1).encode())


def _replace(path: Path, data: bytes) -> None:
    new = path.with_name(f".{path.name}.tmp")
    write_synced(new, data)
    os.replace(new, path)


@contextlib.contextmanager
def writing(run: Path) -> Iterator[None]:
    """Turn a failed write into one error that says why and what is left."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else error.strerror or str(error)
        raise SlimtuneError(
            f"output_dir: cannot write to {run}: {what}; what was finished is kept, the same command continues"
        ) from error
