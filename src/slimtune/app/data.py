"""From the names in a configuration to training, validation and test tables with checked columns and labels.

Sources: a file, a glob pattern over files (joined in name order), a folder (files or subfolders named train*,
validation* | valid* | val* | dev* | eval*, test*; or one subfolder of images per class; or a folder written by
`datasets.save_to_disk`), an .npz file, or a name on the Hugging Face hub (`name` or `name:config`).

Columns, where the configuration names none, are the first of these that the data has:

* text: text, sentence, sentence1, text1, premise, question1, question, content
* second text: the partner of the first (sentence1 - sentence2, text1 - text2, premise - hypothesis,
  question1 - question2, question - sentence), so a pair is never cut to its first half unseen
* label: label, labels, target, class, category; for regress also score, similarity, similarity_score
* image: image, img, path, file, file_name

Validation rows, where nothing provides them, are held out of the training data: every
1 / validation_fraction-th row in an order drawn from data_seed (else seed), class by class for classification,
before max_train_samples is applied. Samples for max_*_samples are drawn in the same way.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.app.tables import (
    READERS,
    Part,
    Table,
    concatenate,
    read_image_folder,
    read_npz,
    read_table,
    suffix_of,
)
from slimtune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from slimtune.app.config import TrainConfig

TEXT = ("text", "sentence", "sentence1", "text1", "premise", "question1", "question", "content")
PARTNER = {
    "sentence1": "sentence2",
    "text1": "text2",
    "premise": "hypothesis",
    "question1": "question2",
    "question": "sentence",
}
LABEL = ("label", "labels", "target", "class", "category")
SCORE = (*LABEL, "score", "similarity", "similarity_score")
IMAGE = ("image", "img", "path", "file", "file_name")
SPLIT = re.compile(r"(train|training|(validation|valid|val|dev|eval)|test)([-_.].*)?", re.IGNORECASE)
MAX_CLASSES = 10_000


@dataclass(frozen=True)
class Splits:
    """Tables of one dataset. `columns` maps roles (text, pair, label, image) to column names; `notes` say what
    was decided for the user, in sentences for the report."""

    train: Table
    validation: Table
    test: Table | None
    columns: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def items(self) -> list[tuple[str, Table]]:
        named = (("train", self.train), ("validation", self.validation), ("test", self.test))
        return [(name, table) for name, table in named if table is not None]


def load_splits(cfg: TrainConfig) -> Splits:
    """Read, check and split the data of a configuration.

    Raises:
        DataError: unreadable or empty data, a missing column (with the nearest name), all naming file and place.
        ConfigError: a reader or the hub library is not installed.
    """
    notes: list[str] = []
    found = open_dataset(cfg.dataset_name)
    train = _only(found, ("train",), cfg.dataset_name)
    validation = test = None
    if cfg.eval_dataset_name:
        validation = _only(open_dataset(cfg.eval_dataset_name), ("validation", "test"), cfg.eval_dataset_name)
    elif "validation" in found:
        validation = found["validation"]
    if cfg.test_dataset_name:
        test = _only(open_dataset(cfg.test_dataset_name), ("test", "validation"), cfg.test_dataset_name)
    elif "test" in found:
        test = found["test"]

    columns = find_columns(cfg, train)
    for table in (validation, test):
        if table is not None:
            for role, column in columns.items():
                require_column(table, column, role)
    if test is not None and "label" in columns and test is found.get("test"):
        hidden = set(test.column(columns["label"])) <= {-1, None}
        if hidden and len(test):
            notes.append(f"the test split of {cfg.dataset_name} has hidden labels and is not used")
            test = None

    seed = cfg.seed if cfg.data_seed is None else cfg.data_seed
    if validation is None:
        strata = _label_cells(train, columns["label"]) if cfg.task in ("classify", "image-classify") else None
        kept, held = hold_out(len(train), cfg.validation_fraction, seed, strata)
        if not held or not kept:
            raise DataError(
                f"{train.name}: {len(train)} rows cannot be split into training and validation data with "
                f"validation_fraction {cfg.validation_fraction:g}; give more rows or eval_dataset_name"
            )
        train, validation = train.select(kept), train.select(held)
        notes.append(f"validation: {len(held)} rows held out of the training data (seed {seed})")

    train = _sample(train, cfg.max_train_samples, seed)
    validation = _sample(validation, cfg.max_eval_samples, seed)
    test = _sample(test, cfg.max_eval_samples, seed) if test is not None else None
    splits = Splits(train, validation, test, columns, notes)
    for name, table in splits.items():
        if len(table) == 0:
            raise DataError(f"{table.name}: the {name} split is empty")
    return splits


# ---------------------------------------------------------------- sources


def open_dataset(name: str) -> dict[str, Table]:
    """The splits that a name leads to; a source without named splits is {"train": table}."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if path.is_file():
        return read_npz(path) if path.suffix.lower() == ".npz" else {"train": read_table(path)}
    if glob.has_magic(name):
        files = sorted(glob.glob(str(path), recursive=True))
        if not files:
            raise DataError(f"{name}: the pattern matches no file (looked from {Path.cwd()})")
        return {"train": concatenate([read_table(Path(file)) for file in files], name)}
    if suffix_of(path) in {*READERS, ".npz"} or name.startswith((".", "/", "~")) or name.count("/") > 1:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{name}: no such file or folder{_nearest(path.name, beside)}")
    return _open_hub(name)


def _open_folder(path: Path) -> dict[str, Table]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _from_datasets(_datasets().load_from_disk(str(path)), str(path))
    groups: dict[str, list[Path]] = {}
    others = []
    for entry in sorted(path.iterdir()):
        known = entry.is_dir() or suffix_of(entry) in READERS or entry.suffix.lower() == ".npz"
        if not known or entry.name.startswith("."):
            continue
        if match := SPLIT.fullmatch(entry.name):
            split = "validation" if match[2] else match[1].lower().removesuffix("ing")
            groups.setdefault(split, []).append(entry)
        else:
            others.append(entry)
    if "train" in groups:
        return {split: _join(split, entries, path) for split, entries in groups.items()}
    images = read_image_folder(path)
    if images is not None:
        return {"train": images}
    files = [entry for entry in [*others, *chain(*groups.values())] if entry.is_file()]
    if len(files) == 1:
        return open_dataset(str(files[0]))
    listed = ", ".join(p.name for p in files[:8]) or "nothing readable"
    raise DataError(f"{path}: no train* file or folder and no class folders with images; found: {listed}")


def _join(split: str, entries: list[Path], folder: Path) -> Table:
    tables = []
    for entry in entries:
        if entry.is_dir():
            table = read_image_folder(entry)
            files = [p for p in sorted(entry.iterdir()) if suffix_of(p) in READERS]
            if table is None and not files:
                raise DataError(f"{entry}: holds neither class folders with images nor data files")
            tables += [table] if table is not None else [read_table(file) for file in files]
        else:
            tables.append(read_npz(entry)["train"] if entry.suffix.lower() == ".npz" else read_table(entry))
    return concatenate(tables, f"{folder} ({split})")


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("hub datasets need the datasets library: pip install 'slimtune[hf]'") from error
    return datasets


def _open_hub(name: str) -> dict[str, Table]:
    hub = _datasets()
    repository, _, config = name.partition(":")
    try:
        loaded = hub.load_dataset(repository, config or None)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{name}: no such file, and not readable from the hub ({reason})") from error
    return _from_datasets(loaded, name)


def _from_datasets(loaded: Any, name: str) -> dict[str, Table]:
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    found = {}
    for split, data in splits.items():
        if match := SPLIT.fullmatch(split):
            key = "validation" if match[2] else match[1].lower().removesuffix("ing")
            if key in found:
                continue
            classes = {c: list(f.names) for c, f in data.features.items() if hasattr(f, "names")}
            # images stay where they are and are decoded one by one
            columns = {
                c: data[c] if type(feature).__name__ == "Image" else list(data[c])
                for c, feature in data.features.items()
            }
            part = Part(f"{name} ({split})", range(len(data)), "row")
            found[key] = Table(f"{name} ({split})", columns, (part,), classes)
    if not found:
        raise DataError(f"{name}: no train, validation or test split; splits: {', '.join(splits)}")
    return found


def _only(found: dict[str, Table], wanted: Sequence[str], name: str) -> Table:
    for split in wanted:
        if split in found:
            return found[split]
    if len(found) == 1:
        return next(iter(found.values()))
    raise DataError(f"{name}: no {' or '.join(wanted)} split; splits: {', '.join(found)}")


# ---------------------------------------------------------------- columns


def find_columns(cfg: TrainConfig, table: Table) -> dict[str, str]:
    """Roles to column names; an sft table has only `text`, and only where the configuration names it."""
    columns: dict[str, str] = {}
    if cfg.task == "sft":
        if cfg.text_column:
            columns["text"] = require_column(table, cfg.text_column, "text_column")
        return columns
    if cfg.task == "image-classify":
        columns["image"] = _column(table, cfg.image_column, IMAGE, "image_column")
    else:
        columns["text"] = _column(table, cfg.text_column, TEXT, "text_column")
        if cfg.text_pair_column:
            columns["pair"] = require_column(table, cfg.text_pair_column, "text_pair_column")
        elif cfg.text_column is None and PARTNER.get(columns["text"]) in table.columns:
            columns["pair"] = PARTNER[columns["text"]]
    known = SCORE if cfg.task == "regress" else LABEL
    columns["label"] = _column(table, cfg.label_column, known, "label_column")
    return columns


def _column(table: Table, named: str | None, usual: Sequence[str], role: str) -> str:
    if named:
        return require_column(table, named, role)
    for name in usual:
        if name in table.columns:
            return name
    raise DataError(
        f"{table.name}: none of the usual columns ({', '.join(usual)}); columns: {', '.join(table.columns)}; set {role}"
    )


def require_column(table: Table, name: str, role: str) -> str:
    """`name` if the table has it. Raises DataError with the columns there are and the nearest name."""
    if name not in table.columns:
        raise DataError(
            f"{table.name}: no column '{name}' ({role}); columns: {', '.join(table.columns)}"
            f"{_nearest(name, table.columns)}"
        )
    return name


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def read_texts(table: Table, column: str) -> list[str]:
    """A column as text; numbers are written out. Raises DataError naming the row of anything else."""
    texts = []
    for i, cell in enumerate(table.column(column)):
        if isinstance(cell, str):
            texts.append(cell)
        elif isinstance(cell, int | float) and not isinstance(cell, bool):
            texts.append(str(cell))
        else:
            found = "nothing" if cell is None else type(cell).__name__
            raise DataError(f"{table.where(i)}: '{column}' is {found}; expected text")
    return texts


def read_numbers(table: Table, column: str) -> list[float]:
    """A column as finite numbers. Raises DataError naming the row of anything else."""
    numbers = []
    for i, cell in enumerate(table.column(column)):
        try:
            value = float("nan") if cell is None or isinstance(cell, bool) else float(cell)
        except (TypeError, ValueError):
            value = float("nan")
        if not math.isfinite(value):
            raise DataError(f"{table.where(i)}: '{column}' is {_show(cell)}; expected a finite number")
        numbers.append(value)
    return numbers


# ---------------------------------------------------------------- labels


def read_labels(splits: Splits, labels: Sequence[str] | None = None) -> tuple[list[str], dict[str, list[int]]]:
    """Class names, and class numbers per split.

    With `labels` given, a cell is the number of the equal entry; integers count into the list unless every entry
    is itself an integer. Otherwise the source's own names are used. Otherwise integers from 0 are class numbers as
    they stand, and anything else is numbered in the sorted order of the training data's distinct values, those of
    rows that were held out or left out by `max_train_samples` included.

    Raises:
        DataError: fewer than two classes, a missing label, or one outside the set, with its row.
    """
    column = splits.columns["label"]
    whole = {name: _label_cells(replace(table, index=None), column) for name, table in splits.items()}
    cells = {
        name: whole[name] if table.index is None else [whole[name][i] for i in table.index]
        for name, table in splits.items()
    }
    known = list(labels) if labels is not None else splits.train.classes.get(column)
    if known is None:
        values: list[Any] = sorted(set(whole["train"]), key=lambda v: (isinstance(v, str), v))
        if any(isinstance(v, str) for v in values) and not all(isinstance(v, str) for v in values):
            raise DataError(f"{splits.train.name}: the column '{column}' mixes text and numbers: {_show(values[:6])}")
        if len(values) > MAX_CLASSES:
            raise DataError(f"{splits.train.name}: '{column}' has {len(values)} distinct values: is it the label?")
        if isinstance(values[0], int) and values[0] == 0 and values[-1] < MAX_CLASSES:
            values = list(range(values[-1] + 1))
        names, number = [str(v) for v in values], {v: i for i, v in enumerate(values)}
    else:
        names, number = known, {name: i for i, name in enumerate(known)}
        by_value = all(re.fullmatch(r"-?\d+", name) for name in known)
        number |= {int(name): i for i, name in enumerate(known)} if by_value else {i: i for i in range(len(known))}
    if len(names) < 2:
        raise DataError(f"{splits.train.name}: '{column}' has the single value {_show(names)}; expected two or more")
    encoded: dict[str, list[int]] = {}
    for name, table in splits.items():
        for i, cell in enumerate(cells[name]):
            if cell not in number:
                raise DataError(
                    f"{table.where(i)}: the label {_show(cell)} is outside the set: {', '.join(names[:20])}"
                    + (" ..." if len(names) > 20 else "")
                )
        encoded[name] = [number[cell] for cell in cells[name]]
    return names, encoded


def _label_cells(table: Table, column: str) -> list[Any]:
    """Cells as str or int: whole floats and numerals from text formats become integers, booleans their names."""
    cells = table.column(column)
    numerals = all(isinstance(c, str) and re.fullmatch(r"-?\d{1,18}", c) for c in cells)
    plain: list[Any] = []
    for i, cell in enumerate(cells):
        if numerals:
            plain.append(int(cell))
        elif isinstance(cell, bool):
            plain.append(str(cell))
        elif isinstance(cell, float) and cell.is_integer():
            plain.append(int(cell))
        elif isinstance(cell, int) or (isinstance(cell, str) and cell):
            plain.append(cell)
        elif isinstance(cell, float) and math.isfinite(cell):
            raise DataError(f"{table.where(i)}: the label {cell} is not a class; for numbers use task: regress")
        else:
            raise DataError(f"{table.where(i)}: '{column}' is {_show(cell)}; expected a class name or number")
    return plain


def _show(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------- splitting


def shuffled(count: int, seed: int, salt: str = "") -> list[int]:
    """0..count-1 in an order that depends on the arguments alone, on every platform and version."""

    def rank(i: int) -> bytes:
        return hashlib.blake2b(f"{seed}:{salt}:{i}".encode(), digest_size=8).digest()

    return sorted(range(count), key=rank)


def hold_out(
    count: int, fraction: float, seed: int, strata: Sequence[Any] | None = None
) -> tuple[list[int], list[int]]:
    """(kept, held) row numbers, both ascending; of each stratum round(fraction * size) rows are held.

    Small strata keep at least one row; what rounding leaves over or short is not redistributed, except that at
    least one row is held in all.
    """
    order = shuffled(count, seed, "split")
    groups: dict[Any, list[int]] = {}
    for i in order:
        groups.setdefault(None if strata is None else strata[i], []).append(i)
    held = {i for rows in groups.values() for i in rows[: min(round(fraction * len(rows)), len(rows) - 1)]}
    if not held and count > 1:
        held = {order[0]}
    return [i for i in range(count) if i not in held], sorted(held)


def _sample(table: Table, most: int | None, seed: int) -> Table:
    if most is None or len(table) <= most:
        return table
    return table.select(sorted(shuffled(len(table), seed, "sample")[:most]))
