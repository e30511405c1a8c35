"""Token rows: compact storage, padding, and encoding of single texts and pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from slimtune.app.data import Splits, read_texts
from slimtune.errors import ConfigError

if TYPE_CHECKING:
    from slimtune.app.config import TrainConfig

IGNORED = -100
DEFAULT_LENGTH = 512
CHUNK = 512
Array = np.ndarray[Any, Any]


class Ragged:
    """Integer rows of different lengths in one flat array."""

    def __init__(self, rows: Sequence[Sequence[int]], dtype: Any = np.int32):
        self.ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
        self.flat = np.empty(int(self.ends[-1]) if len(rows) else 0, dtype)
        for row, end in zip(rows, self.ends, strict=True):
            self.flat[end - len(row) : end] = row

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def longest(self) -> int:
        return int(np.diff(self.ends, prepend=0).max(initial=0))

    def __getitem__(self, i: int) -> Array:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.flat[self.ends[i - 1] if i else 0 : self.ends[i]]


class TokenRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows for the collator: `fields` are token-wise (input_ids, ...), `labels` one number a row."""

    def __init__(self, fields: dict[str, Ragged], labels: Sequence[float]):
        self.fields, self.labels = fields, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**{name: rows[i] for name, rows in self.fields.items()}, "labels": self.labels[i]}


class PadCollator:
    """Rows to tensors (B, L), padded on the right to the longest of the batch; one-number labels become (B,)."""

    def __init__(self, pad_token_id: int, label_dtype: torch.dtype = torch.long):
        self.fill = {"input_ids": pad_token_id, "labels": IGNORED}
        self.label_dtype = label_dtype

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        batch = {}
        for name in rows[0]:
            cells = [row[name] for row in rows]
            if np.ndim(cells[0]) == 0:
                batch[name] = torch.tensor(cells, dtype=self.label_dtype)
                continue
            padded = np.full((len(rows), max(lengths)), self.fill.get(name, 0), np.int64)
            for i, cell in enumerate(cells):
                padded[i, : len(cell)] = cell
            batch[name] = torch.from_numpy(padded)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        batch["attention_mask"] = mask.long()
        return batch


def length_limit(cfg: TrainConfig, tokenizer: Any, model: nn.Module) -> int:
    """max_length, or what model and tokenizer can take, at most 512. Raises ConfigError when max_length is more."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    known = [n for n in (tokenizer.model_max_length, positions) if n is not None and n < 10**9]
    if cfg.max_length is None:
        return min([*known, DEFAULT_LENGTH])
    if known and cfg.max_length > min(known):
        raise ConfigError(f"max_length: {cfg.max_length} is more than the {min(known)} tokens the model can take")
    return cfg.max_length


def encode_splits(
    splits: Splits, tokenizer: Any, length: int, labels: Mapping[str, Sequence[float]]
) -> tuple[dict[str, TokenRows], dict[str, int]]:
    """(rows per split, number of texts cut to `length` per split)."""
    encoded, cut = {}, {}
    for name, table in splits.items():
        texts = read_texts(table, splits.columns["text"])
        pairs = read_texts(table, splits.columns["pair"]) if "pair" in splits.columns else None
        fields: dict[str, list[list[int]]] = {}
        cut[name] = 0
        for start in range(0, len(texts), CHUNK):
            chunk = slice(start, start + CHUNK)
            batch = tokenizer(
                texts[chunk],
                pairs[chunk] if pairs is not None else None,
                truncation=True,
                max_length=length,
                return_attention_mask=False,
            )
            for key, rows in batch.items():
                fields.setdefault(key, []).extend(rows)
            cut[name] += sum(bool(e.overflowing) for e in batch.encodings or ())
        encoded[name] = TokenRows({key: Ragged(rows) for key, rows in fields.items()}, labels[name])
    return encoded, cut


def text_info(splits: Splits, rows: dict[str, TokenRows], cut: dict[str, int], length: int) -> dict[str, Any]:
    return {
        "rows": {name: len(table) for name, table in splits.items()},
        "columns": splits.columns,
        "max_length": length,
        "longest": {name: data.fields["input_ids"].longest for name, data in rows.items()},
        "truncated": cut,
        "notes": splits.notes,
    }
