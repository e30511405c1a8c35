"""The demo's data: which standard-library module does this docstring belong to?

The running Python carries the data set. Source files are parsed, never imported or executed.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slimtune.errors import DataError

SOURCES = {  # label -> file or package, in every Python from 3.10 on
    "asyncio": "asyncio",
    "datetime": "datetime.py _pydatetime.py",
    "decimal": "_pydecimal.py",
    "email": "email",
    "http": "http",
    "importlib": "importlib",
    "inspect": "inspect.py",
    "ipaddress": "ipaddress.py",
    "logging": "logging",
    "mailbox": "mailbox.py",
    "multiprocessing": "multiprocessing",
    "pathlib": "pathlib.py pathlib",
    "pydoc": "pydoc.py",
    "statistics": "statistics.py",
    "tarfile": "tarfile.py",
    "threading": "threading.py",
    "turtle": "turtle.py",
    "typing": "typing.py",
    "unittest": "unittest",
    "urllib": "urllib",
    "xml": "xml",
    "zipfile": "zipfile.py zipfile",
}
MASK = "___"  # stands where a text names one of the modules, its own or another
CAP = 130  # examples per module
MIN_WORDS = 6
MAX_CHARACTERS = 240
TEST_SHARE, VALIDATION_SHARE = 0.25, 0.08
MIN_TRAIN, MIN_TEST = 1000, 300


@dataclass(frozen=True)
class StdlibTask:
    """Paths of the three JSONL files (columns ``text``, ``label``), the rows in each, and the labels."""

    train: Path
    validation: Path
    test: Path
    counts: dict[str, int]
    labels: tuple[str, ...]


def write_stdlib_task(folder: str | Path, library: str | Path | None = None) -> StdlibTask:
    """Write ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` into `folder`.

    At most 120 docstrings per module; the split depends on each text alone, so the same Python gives the
    same files and a docstring that two Python versions share falls into the same split in both.

    Args:
        folder: created when missing.
        library: standard library folder; default: the running Python's own.

    Raises:
        DataError: fewer than 1000 training or 300 test rows, as when the sources are not installed.
    """
    library = Path(library or sysconfig.get_path("stdlib"))
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    for text, label in _rows(library):
        splits[_split(text)].append({"text": text, "label": label})
    counts = {name: len(rows) for name, rows in splits.items()}
    if counts["train"] < MIN_TRAIN or counts["test"] < MIN_TEST:
        raise DataError(
            f"the standard library sources under {library} give {counts['train']} training and {counts['test']} "
            f"test docstrings; the demo needs {MIN_TRAIN} and {MIN_TEST}: is this Python installed without its sources?"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in splits}
    for name, rows in splits.items():
        temporary = paths[name].with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
        os.replace(temporary, paths[name])
    labels = tuple(sorted({row["label"] for rows in splits.values() for row in rows}))
    return StdlibTask(paths["train"], paths["validation"], paths["test"], counts, labels)


def _rows(library: Path) -> list[tuple[str, str]]:
    """(text, label) pairs without repeats, in an order that depends on the texts alone."""
    owners: dict[str, set[str]] = defaultdict(set)
    texts: dict[str, tuple[str, str]] = {}
    for label, places in SOURCES.items():
        for docstring in _docstrings(library, places):
            text = _clean(docstring)
            if len(text.replace(MASK, "").split()) < MIN_WORDS:
                continue
            opening = _opening(text)
            owners[opening].add(label)
            texts.setdefault(opening, (text, label))
    unique = [row for opening, row in texts.items() if len(owners[opening]) == 1]
    taken: Counter[str] = Counter()
    rows = []
    for text, label in sorted(unique, key=lambda row: _digest(row[0])):
        if taken[label] < CAP:
            taken[label] += 1
            rows.append((text, label))
    return rows


def _docstrings(library: Path, places: str) -> Iterator[str]:
    """Docstrings of the classes and functions in the listed files and packages, in file and source order."""
    for place in places.split():
        path = library / place
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path] if path.is_file() else []
        for file in files:
            if {"test", "tests"} & set(file.relative_to(library).parts):
                continue
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    docstring = ast.get_docstring(node)
                    if docstring:
                        yield docstring


def _clean(docstring: str) -> str:
    """One line, shortened, every module name masked whatever its case, inside longer words too."""
    masked = re.sub("|".join(SOURCES), MASK, docstring, flags=re.IGNORECASE)
    return " ".join(masked.split())[:MAX_CHARACTERS]


def _opening(text: str) -> str:
    """The first ten words without case or punctuation: texts that share it count as the same text."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower())[:10])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _split(text: str) -> str:
    position = int(_digest("split:" + _opening(text))[:8], 16) / 16**8
    if position < TEST_SHARE:
        return "test"
    return "validation" if position < TEST_SHARE + VALIDATION_SHARE else "train"
