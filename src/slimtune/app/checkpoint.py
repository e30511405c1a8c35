"""Crash-safe checkpoint folders.

A checkpoint is built in a hidden sibling folder, every file is flushed to the disk, the manifest (sha256 and size
of every file) is written last, and only then the folder gets its name, by one rename. Whatever kills the process or
fills the disk at any moment, a folder that carries the name is whole; `verify` proves it, `newest_good` finds it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from slimtune.errors import SlimtuneError
from slimtune.files import hash_file, share, sync

MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")


def staging(final: Path) -> Path:
    """The hidden sibling in which `final` is built."""
    return final.with_name(f".{final.name}.tmp")


def prepare(final: Path) -> Path:
    """Make an empty staging folder for `final` and return it."""
    folder = staging(final)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def seal(folder: Path, step: int) -> None:
    """Flush every file below `folder` to the disk, then write the manifest of their hashes."""
    files: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST):
        digest = hash_file(path)
        share(path)
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"sha256": digest, "bytes": path.stat().st_size}
    for path in sorted(p for p in folder.rglob("*") if p.is_dir()):
        sync(path)
    text = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def publish(folder: Path, final: Path) -> None:
    """Give a sealed folder its final name in one step; a checkpoint of that name is replaced."""
    if final.exists():
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
        os.replace(folder, final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(folder, final)
    sync(final.parent)


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint; an empty list when every file has the size and hash of the manifest.

    Files the manifest does not name are not looked at.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        version = manifest["format"]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except OSError as error:
        return [f"{MANIFEST}: {error.strerror}"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [f"{MANIFEST} is damaged"]
    if version != FORMAT:
        return [f"{MANIFEST} has format {version!r}, expected {FORMAT}"]
    problems = []
    for name, (size, digest) in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            problems.append(f"{MANIFEST} names a file outside the folder: {name!r}")
        elif not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{name} has {path.stat().st_size:,} bytes, expected {size:,}")
        elif (found := hash_file(path)) != digest:
            problems.append(f"{name} has sha256 {found[:12]}..., expected {str(digest)[:12]}...")
    return problems


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, newest (highest step) first."""
    found = [(int(m[1]), p) for p in _children(run) if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def newest_good(run: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest undamaged checkpoint, or None, and every newer one that was skipped, with the reason."""
    skipped: list[tuple[Path, str]] = []
    for path in checkpoints(run):
        problems = verify(path)
        if not problems:
            return path, skipped
        skipped.append((path, "; ".join(problems)))
    return None, skipped


def step_of(path: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def clean(run: Path) -> None:
    """Remove what a killed save left behind; a checkpoint that was being replaced gets its name back."""
    for path in _children(run):
        if re.fullmatch(r"\.(checkpoint-\d+|model)\.old", path.name):
            name = path.with_name(path.name[1:-4])
            if not name.exists():
                os.replace(path, name)
                continue
        elif not re.fullmatch(r"\.(checkpoint-\d+|model)\.tmp", path.name):
            continue
        shutil.rmtree(path, ignore_errors=True)


def rotate(run: Path, limit: int, keep: Iterable[Path] = ()) -> None:
    """Delete the oldest checkpoints beyond `limit`, but none in `keep` and never the newest undamaged one."""
    protected = {path.resolve() for path in keep}
    good, _ = newest_good(run)
    if good is not None:
        protected.add(good.resolve())
    for path in checkpoints(run)[limit:]:
        if path.resolve() not in protected:
            doomed = path.with_name(f".{path.name}.tmp")  # hidden first: a half-deleted folder has no name
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


@contextlib.contextmanager
def failing_clearly(final: Path, run: Path) -> Iterator[None]:
    """Turn a failed save into one error that names the cause and what the run still has; leave no half folder."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError, SlimtuneError) as error:
        shutil.rmtree(staging(final), ignore_errors=True)
        left = next(iter(checkpoints(run)), None)
        state = f"the last one, {left}, is untouched" if left else "there is no earlier one"
        raise SlimtuneError(f"cannot write checkpoint {final}: {_cause(error, run)}; {state}") from error


def _cause(error: Exception, run: Path) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    with contextlib.suppress(OSError):
        full = full or shutil.disk_usage(run).free < 2**20
    if full:
        return "the disk is full"
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error).splitlines()[0]


def _children(run: Path) -> list[Path]:
    return sorted(run.iterdir()) if run.is_dir() else []
