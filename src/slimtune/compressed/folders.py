"""Folders that are read strictly and replaced as a whole."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ConfigError, FileFormatError, SlimtuneError
from ..files import FORMAT, MANIFEST, hash_file, read_json, sync

KIND = "compressed"
SHARD = re.compile(r"compressed-\d{5}\.safetensors")


def beside(path: Path, what: str) -> Path:
    return path.absolute().with_name(f".{path.absolute().name}.{what}")


def present(path: Path) -> Path:
    """`path`, or where a save that was interrupted between two renames has left it."""
    return path if path.exists() or not beside(path, "old").is_dir() else beside(path, "old")


def check_target(path: Path) -> None:
    if "\0" in str(path) or not path.absolute().name:
        raise ConfigError(f"{path!s}: not the name of a folder")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is not a folder")
    if path.is_dir() and any(path.iterdir()) and not is_compressed(path):
        raise ConfigError(f"{path} exists and holds something else than a compressed model")


def publish(folder: Path, final: Path) -> None:
    """Give a finished folder its name; one that has it goes only then."""
    old = beside(final, "old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(folder, final)
    sync(final.absolute().parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        what = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
        raise SlimtuneError(f"{path}: cannot be written: {what}; what was there before is intact") from None


def check_path(name: object, path: Path) -> str:
    """A relative path that stays inside its folder.

    Raises:
        FileFormatError: anything else.
    """
    plain = isinstance(name, str) and 0 < len(name) < 256 and not set(name) & set("\0\\:")
    parts = PurePosixPath(name).parts if plain else ()  # type: ignore[arg-type]
    if not parts or parts[0] == "/" or ".." in parts or str(PurePosixPath(*parts)) != name:
        raise FileFormatError(f"{path}: {str(name)[:80]!r} is no path inside the folder")
    return str(name)


# ---------------------------------------------------------------- reading


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is meant to be a compressed model, whole or not."""
    folder = present(Path(path))
    try:
        if any(folder.glob("compressed*.safetensors")):
            return True
        return read_json(folder / MANIFEST).get("kind") == KIND
    except (FileFormatError, OSError, ValueError):
        return False


@dataclass(frozen=True)
class CompressedFolder:
    """A compressed model on the disk: its manifest, read strictly, and its tensors' places."""

    path: Path
    manifest: dict[str, Any]
    tensors: dict[str, Path] = field(repr=False)
    """{key: the file that holds it}."""
    shapes: dict[str, tuple[int, ...]] = field(repr=False)

    @property
    def structures(self) -> dict[str, Any]:
        """As `describe_structures` gives them."""
        return dict(self.manifest["structures"])

    @property
    def tied(self) -> dict[str, str]:
        """{key without a tensor of its own: the key it shares one with}."""
        return dict(self.manifest["tied"])

    @property
    def facts(self) -> dict[str, Any]:
        """What was told of the compression."""
        return dict(self.manifest["facts"])

    @property
    def model_class(self) -> str | None:
        """The transformers class, None if it is of another library."""
        return self.manifest["model"].get("class")  # type: ignore[no-any-return]

    def problems(self) -> list[str]:
        """What is wrong with its files: sizes, hashes, numbers that are not finite. Empty when it is whole."""
        found = []
        for name, entry in self.manifest["files"].items():
            file = self.path / name
            if (size := file.stat().st_size) != entry["bytes"]:
                found.append(f"{name}: damaged: {size:,} bytes, expected {entry['bytes']:,}")
            elif (digest := hash_file(file)) != entry["sha256"]:
                found.append(f"{name}: damaged: SHA-256 {digest[:16]}..., expected {entry['sha256'][:16]}...")
        return found or [f"{self.tensors[key].name}: {key} is not finite" for key, t in self.each() if not _finite(t)]

    def each(self, keys: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor), one at a time."""
        for file in dict.fromkeys(self.tensors.values()):
            with safe_open(str(file), "pt") as stored:
                for key in stored.keys():  # noqa: SIM118
                    if keys is None or key in keys:
                        yield key, stored.get_tensor(key)


def read_compressed(path: str | os.PathLike[str]) -> CompressedFolder:
    """The manifest of a compressed model and where its tensors are; hashes are left to `problems`.

    Raises:
        FileFormatError: no such folder, or one that is not a compressed model, or torn; naming the file, what was
            expected and what was found.
    """
    if "\0" in str(path) or not present(Path(path)).is_dir():
        raise FileFormatError(f"{path}: no such folder")
    folder = present(Path(path))
    where = folder / MANIFEST
    if not where.exists():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise FileFormatError(f"{folder}: not a compressed model: no {MANIFEST}; it holds {found}")
    manifest = read_json(where)
    if manifest.get("kind") != KIND:
        hint = "; st.load attaches it to its base" if "adapter" in manifest else ""
        raise FileFormatError(f"{where}: kind {str(manifest.get('kind'))[:40]!r}, expected {KIND!r}{hint}")
    if manifest.get("format") != FORMAT:
        raise FileFormatError(f"{where}: format {str(manifest.get('format'))[:40]!r}, expected {FORMAT}")
    for key in ("model", "structures", "tied", "facts", "files"):
        if not isinstance(manifest.get(key), dict):
            raise FileFormatError(f"{where}: {key!r} is not a table")
    for name, entry in manifest["files"].items():
        check_path(name, where)
        whole = isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and type(entry.get("bytes")) is int
        if not whole:
            raise FileFormatError(f"{where}: 'files' has no hash and size for {name}")
        if not (folder / name).is_file() or not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise FileFormatError(f"{folder / name}: missing, though {MANIFEST} lists it")
    if not all(isinstance(entry, dict) for entry in manifest["structures"].values()):
        raise FileFormatError(f"{where}: 'structures' is not a table of tables")
    if not all(isinstance(kept, str) for kept in manifest["tied"].values()):
        raise FileFormatError(f"{where}: 'tied' is not a table of names")
    tensors: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in manifest["files"]:
        if not SHARD.fullmatch(name):
            continue
        try:
            with safe_open(str(folder / name), "pt") as stored:
                for key in stored.keys():  # noqa: SIM118
                    if key in tensors:
                        raise FileFormatError(f"{folder / name}: {key} comes a second time")
                    tensors[key] = folder / name
                    shapes[key] = tuple(stored.get_slice(key).get_shape())
        except (SafetensorError, OSError) as error:
            raise FileFormatError(f"{folder / name}: not a valid safetensors file ({error})") from None
    if not tensors:
        raise FileFormatError(f"{where}: 'files' lists no compressed-00001.safetensors")
    return CompressedFolder(folder, manifest, tensors, shapes)


def _finite(t: Tensor) -> bool:
    return not t.is_floating_point() or t.dtype.itemsize < 2 or bool(t.isfinite().all())
