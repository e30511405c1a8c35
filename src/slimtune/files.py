"""Layer 5: files of an adapter folder as a set: hashed, checked when read, replaced all at once.

New contents are written beside the old as `.NAME.new` and synced; then the new manifest, `.slimtune.json.new`, which is
the commit; then all are renamed into place. A reader that finds a complete commit uses it, so a save that dies at any
point leaves the old set or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from .errors import FileFormatError, SlimtuneError

__all__ = ["check_files", "parse_json", "read_json", "read_manifest", "read_tensors", "write_files"]

MANIFEST, CONFIG, TENSORS, CARD = "slimtune.json", "adapter_config.json", "adapter_model.safetensors", "README.md"
FORMAT = 1
MAX_JSON_BYTES = 16 * 2**20


def read_bytes(path: Path) -> bytes:
    """The contents of a regular file; FileFormatError for anything else."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FileFormatError(f"{path}: not a regular file")
        return path.read_bytes()
    except FileNotFoundError:
        raise FileFormatError(f"{path}: no such file") from None
    except (OSError, ValueError) as e:
        raise FileFormatError(f"{path}: cannot be read ({e})") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [k for k, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} comes twice")
    return table


def parse_json(data: bytes, path: Path | str) -> dict[str, Any]:
    """A JSON object: at most 16 MB, no duplicate keys, no NaN."""
    if len(data) > MAX_JSON_BYTES:
        raise FileFormatError(f"{path}: {len(data)} bytes, expected at most {MAX_JSON_BYTES}")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(data.decode(), object_pairs_hook=_no_duplicates, parse_constant=refuse)
    except (ValueError, RecursionError) as e:
        raise FileFormatError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(value, dict):
        raise FileFormatError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """`parse_json` of a file."""
    try:
        if os.stat(path).st_size > MAX_JSON_BYTES:
            raise FileFormatError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
    except OSError:
        pass
    return parse_json(read_bytes(path), path)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def share(path: Path) -> None:
    """Give a file in a new folder the mode that the umask gives; safetensors makes files for the owner alone."""
    with contextlib.suppress(OSError):  # file systems without modes
        path.chmod(path.parent.stat().st_mode & 0o666)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _new(folder: Path, name: str) -> Path:
    return folder / f".{name}.new"


def write_files(folder: str | os.PathLike[str], files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> None:
    """Replace a set of files and their manifest as one; other files of the folder are left alone.

    Raises:
        SlimtuneError: the folder cannot be written (full disk, read-only, not a folder); the old set is intact.
    """
    folder = Path(folder)
    record = {name: {"sha256": sha256(data), "bytes": len(data)} for name, data in files.items()}
    journal = json.dumps({**manifest, "files": record}, indent=1).encode()
    state = "what was there before is intact"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _settle(folder)
        for name, data in files.items():
            write_synced(_new(folder, name), data)
        write_synced(_new(folder, MANIFEST), journal)
        sync(folder)
        state = "the new files lie complete beside the old ones and will be read in their place"
        for name in (*files, MANIFEST):
            os.replace(_new(folder, name), folder / name)
        sync(folder)
    except OSError as e:
        if state.endswith("intact"):
            with contextlib.suppress(OSError):
                _discard(folder)
        what = "the disk is full" if e.errno == errno.ENOSPC else (e.strerror or str(e))
        raise SlimtuneError(f"{folder}: cannot be written: {what}; {state}") from None


def _committed(folder: Path) -> dict[str, Path] | None:
    """Where each file of a finished but not yet renamed set lies, None if there is no such set."""
    try:
        record = parse_json(_new(folder, MANIFEST).read_bytes(), MANIFEST)["files"]
        where = {MANIFEST: _new(folder, MANIFEST)}
        for name, entry in record.items():
            if os.path.basename(name) != name:
                return None
            for path in (_new(folder, name), folder / name):
                if path.is_file() and sha256(path.read_bytes()) == entry["sha256"]:
                    where[name] = path
                    break
            else:
                return None
        return where
    except (OSError, KeyError, TypeError, AttributeError, FileFormatError):
        return None


def _discard(folder: Path) -> None:
    for name in (MANIFEST, CONFIG, TENSORS, CARD):
        _new(folder, name).unlink(missing_ok=True)


def _settle(folder: Path) -> None:
    """Finish or drop what an interrupted save left."""
    for name, path in (_committed(folder) or {}).items():
        if path.name != name:
            os.replace(path, folder / name)
    _discard(folder)


def _locate(folder: Path) -> dict[str, Path]:
    known = (MANIFEST, CONFIG, TENSORS, CARD)
    return _committed(folder) or {n: folder / n for n in known if (folder / n).exists()}


# ---------------------------------------------------------------- manifest


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest of an adapter folder, None if it has none (PEFT's own folders do not).

    Raises:
        FileFormatError: a manifest that is damaged or of a newer format.
    """
    folder = Path(path)
    where = _locate(folder)
    if MANIFEST not in where:
        return None
    manifest = read_json(where[MANIFEST])
    if manifest.get("kind") == "compressed":
        raise FileFormatError(f"{folder}: a compressed model, not an adapter: st.load_compressed loads it")
    if manifest.get("format") != FORMAT:
        raise FileFormatError(f"{folder / MANIFEST}: format {manifest.get('format')!r}, expected {FORMAT}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(e, dict) and isinstance(e.get("sha256"), str) and os.path.basename(n) == n for n, e in files.items()
    ):
        raise FileFormatError(f"{folder / MANIFEST}: 'files' is not a table of plain file names and hashes")
    for name in (CONFIG, TENSORS):
        if name not in files:
            raise FileFormatError(f"{folder / MANIFEST}: 'files' does not list {name}")
    if not isinstance(manifest.get("base", {}), dict):
        raise FileFormatError(f"{folder / MANIFEST}: 'base' is not a table")
    return manifest


def check_files(path: str | os.PathLike[str]) -> dict[str, bytes]:
    """Read an adapter folder, every file held against the manifest's hash if there is a manifest.

    Returns:
        The contents by file name.

    Raises:
        FileFormatError: no such folder, a file that is missing, or one whose hash is another.
    """
    folder = Path(path)
    if "\0" in str(folder) or not folder.is_dir():
        raise FileFormatError(f"{folder}: no such folder")
    manifest, where = read_manifest(folder), _locate(folder)
    contents: dict[str, bytes] = {}
    for name in (CONFIG, TENSORS):
        if name not in where:
            inside = sorted(p.parent.name for p in folder.glob(f"*/{TENSORS}"))
            hint = f"; subfolders that hold an adapter: {', '.join(inside[:5])}" if inside else ""
            raise FileFormatError(f"{folder / name}: no such file{hint}")
    for name, entry in (manifest["files"] if manifest else {}).items():
        if name not in where:
            raise FileFormatError(f"{folder / name}: missing, though {MANIFEST} lists it")
        data = read_bytes(where[name])
        if (found := sha256(data)) != entry["sha256"]:
            raise FileFormatError(
                f"{folder / name}: damaged: SHA-256 {found[:16]}... ({len(data)} bytes), "
                f"expected {entry['sha256'][:16]}... ({entry.get('bytes')} bytes)"
            )
        contents[name] = data
    for name in (CONFIG, TENSORS):
        if name not in contents:
            contents[name] = read_bytes(where[name])
    return contents


def read_tensors(data: bytes, path: Path | str) -> dict[str, Tensor]:
    """Tensors of a safetensors file, all finite.

    Raises:
        FileFormatError: not a safetensors file, or a tensor with NaN or infinity.
    """
    try:
        tensors = safetensors.torch.load(data)
    except Exception as e:  # safetensors raises several kinds for a hostile header
        raise FileFormatError(f"{path}: not a valid safetensors file ({e})") from None
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise FileFormatError(f"{path}: {key} holds {bad} values that are not finite")
    return tensors
