"""Files become tables: rows in columns, each row remembering the file and line it came from.

Read: .jsonl .ndjson .json .csv .tsv .txt .parquet, each also with .gz, and .npz for images.
TSV follows its standard (no quoting); .txt is one row per line, empty lines skipped, in the column `text`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slimtune.errors import ConfigError, DataError

IMAGE_SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"])
NPZ_SPLITS = {"": "train", "train_": "train", "validation_": "validation", "test_": "test"}


@dataclass(frozen=True)
class Part:
    """Consecutive rows that came from one file; `lines` are 1-based file lines, or row numbers from `unit` files."""

    file: str
    lines: Sequence[int]
    unit: str = "line"

    def where(self, i: int) -> str:
        return f"{self.file}:{self.lines[i]}" if self.unit == "line" else f"{self.file}, {self.unit} {self.lines[i]}"


@dataclass(frozen=True)
class Table:
    """Columns of equal length. A cell that a row does not have is None.

    `classes` names the values of integer label columns where the source says so (image folders, hub datasets).
    """

    name: str
    columns: Mapping[str, Sequence[Any]]
    parts: tuple[Part, ...]
    classes: dict[str, list[str]] = field(default_factory=dict)
    index: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.index) if self.index is not None else sum(len(part.lines) for part in self.parts)

    def column(self, name: str) -> list[Any]:
        cells = self.columns[name]
        return list(cells) if self.index is None else [cells[i] for i in self.index]

    def row(self, i: int) -> dict[str, Any]:
        i = i if self.index is None else self.index[i]
        return {name: cells[i] for name, cells in self.columns.items()}

    def where(self, i: int) -> str:
        """The place of row `i`, as `file:line`."""
        i = i if self.index is None else self.index[i]
        for part in self.parts:
            if i < len(part.lines):
                return part.where(i)
            i -= len(part.lines)
        raise IndexError(i)

    def select(self, rows: Sequence[int]) -> Table:
        index = list(rows) if self.index is None else [self.index[i] for i in rows]
        return replace(self, index=index)


def suffix_of(path: Path) -> str:
    """The data suffix in lower case: `train.jsonl.gz` -> `.jsonl`."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def read_table(path: Path) -> Table:
    """One tabular file as a table. Raises DataError naming the file, and the line where there is one."""
    suffix = suffix_of(path)
    if suffix not in READERS:
        raise DataError(f"{path}: cannot read '{suffix or path.name}' files; known: {', '.join(sorted(READERS))}, .npz")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty")
        table = READERS[suffix](path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(table) == 0:
        raise DataError(f"{path}: holds no rows")
    return table


def concatenate(tables: list[Table], name: str) -> Table:
    """The rows of several tables in order; all must have the same columns."""
    first = tables[0]
    if len(tables) == 1:
        return first
    for other in tables[1:]:
        if difference := sorted(set(first.columns) ^ set(other.columns)):
            raise DataError(f"{other.name}: its columns differ from those of {first.name} in: {', '.join(difference)}")
    columns = {key: [cell for table in tables for cell in table.columns[key]] for key in first.columns}
    return Table(name, columns, tuple(part for table in tables for part in table.parts), first.classes)


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with _open(path) as stream:
        for number, raw in enumerate(stream, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = raw[error.start]
                raise DataError(f"{path}:{number}: not UTF-8 (byte 0x{byte:02x} at {error.start})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"the key '{next(k for k in names if names.count(k) > 1)}' appears twice")
    return row


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not a JSON value ({error})") from error


def _from_rows(path: Path, rows: list[dict[str, Any]], lines: Sequence[int], unit: str = "line") -> Table:
    keys = dict.fromkeys(key for row in rows for key in row)
    return Table(str(path), {key: [row.get(key) for row in rows] for key in keys}, (Part(str(path), lines, unit),))


def _jsonl(path: Path) -> Table:
    rows, numbers = [], []
    for number, line in _lines(path):
        if line.strip():
            row = _parse(line, f"{path}:{number}")
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: expected an object of columns, found {type(row).__name__}")
            rows.append(row)
            numbers.append(number)
    return _from_rows(path, rows, numbers)


def _json(path: Path) -> Table:
    text = "".join(line for _, line in _lines(path))
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].startswith("{"):
        try:
            json.loads(lines[0])
        except ValueError:
            pass
        else:
            return _jsonl(path)
    value = _parse(text, str(path))
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        return _from_rows(path, value, range(1, len(value) + 1), "row")
    if isinstance(value, dict) and value and all(isinstance(cells, list) for cells in value.values()):
        lengths = {key: len(cells) for key, cells in value.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{path}: columns of different lengths: {lengths}")
        return Table(str(path), value, (Part(str(path), range(1, min(lengths.values()) + 1), "row"),))
    raise DataError(f"{path}: expected a list of objects or an object of lists, found {type(value).__name__}")


def _csv(path: Path, **dialect: Any) -> Table:
    csv.field_size_limit(1 << 30)
    starts: list[int] = []
    lines = _lines(path)

    def text() -> Iterator[str]:
        for number, line in lines:
            starts.append(number)
            yield line

    reader = csv.reader(text(), strict=True, **dialect)
    rows: list[list[str]] = []
    numbers: list[int] = []
    header: list[str] | None = None
    try:
        for fields in reader:
            first, starts[:] = starts[0], []
            if not fields:
                continue
            if header is None:
                header = fields
                if twice := sorted({name for name in header if header.count(name) > 1}):
                    raise DataError(f"{path}:{first}: the column '{twice[0]}' appears twice")
            elif len(fields) != len(header):
                raise DataError(f"{path}:{first}: {len(fields)} fields where the header has {len(header)}")
            else:
                rows.append(fields)
                numbers.append(first)
    except csv.Error as error:
        raise DataError(f"{path}:{starts[0] if starts else reader.line_num}: {error}") from error
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header or ())}
    return Table(str(path), columns, (Part(str(path), numbers),))


def _tsv(path: Path) -> Table:
    return _csv(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _txt(path: Path) -> Table:
    kept = [(number, line.rstrip("\r\n")) for number, line in _lines(path) if line.strip()]
    return Table(str(path), {"text": [line for _, line in kept]}, (Part(str(path), [number for number, _ in kept]),))


def _parquet(path: Path) -> Table:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{path}: reading Parquet needs pyarrow: pip install 'slimtune[hf]'") from error
    with _open(path) as stream:
        data = stream.read()
    try:
        table = parquet.read_table(io.BytesIO(data))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    if twice := sorted({name for name in table.column_names if table.column_names.count(name) > 1}):
        raise DataError(f"{path}: the column '{twice[0]}' appears twice")
    return Table(str(path), table.to_pydict(), (Part(str(path), range(1, table.num_rows + 1), "row"),))


READERS = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".txt": _txt,
    ".parquet": _parquet,
}


def read_npz(path: Path) -> dict[str, Table]:
    """Images and labels of an .npz file by split.

    Keys: `images`, `labels`, or the same with `train_`, `validation_`, `test_` before them;
    images uint8 (N, H, W, C) or (N, H, W), labels integer (N,). Raises DataError.
    """
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a readable .npz file of plain arrays ({error})") from error
    found = {}
    for prefix, split in NPZ_SPLITS.items():
        keys = (f"{prefix}images", f"{prefix}labels")
        if not any(key in arrays for key in keys):
            continue
        for key in keys:
            if key not in arrays:
                raise DataError(f"{path}: no array '{key}'; arrays: {', '.join(arrays)}")
        images, labels = (arrays[key] for key in keys)
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise DataError(
                f"{path}: '{prefix}images' is {images.dtype} of shape {images.shape}; "
                "expected uint8 (N, H, W) or (N, H, W, C)"
            )
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images):
            raise DataError(
                f"{path}: '{prefix}labels' is {labels.dtype} of shape {labels.shape}; "
                f"expected {len(images)} integers, one per image"
            )
        images = images if images.ndim == 4 else images[..., None]
        name = str(path) if split == "train" else f"{path} ({split})"
        part = Part(str(path), range(len(images)), f"{prefix}images")
        found[split] = Table(name, {"image": images, "label": labels.tolist()}, (part,))
    if not found:
        raise DataError(f"{path}: no arrays 'images' and 'labels' (or 'train_images', ...): {', '.join(arrays)}")
    return found


def read_image_folder(path: Path) -> Table | None:
    """A folder whose subfolders are classes, as (image path, class); None when it holds no images that way."""
    classes = sorted(p for p in path.iterdir() if p.is_dir())
    files = [
        (str(file), c.name) for c in classes for file in sorted(c.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        return None
    if empty := sorted({c.name for c in classes} - {name for _, name in files}):
        raise DataError(f"{path / empty[0]}: a class folder without images")
    columns = {"image": [f for f, _ in files], "label": [name for _, name in files]}
    return Table(str(path), columns, (Part(str(path), range(len(files)), "image"),))
