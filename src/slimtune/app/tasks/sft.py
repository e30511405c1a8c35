"""The next token: text, or an answer after its prompt, with the loss on the answer only.

A token is trained on when any of its characters lies in a trained span. The end token is added to (and trained on
after) whole texts and completions. Rows longer than max_length lose their end; rows that then have no trained token
are left out, and data without any trained token is refused. With `packing`, whole texts are joined in order, each
with its end token, and cut into blocks of max_length; attention runs across the joints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.app.data import load_splits
from slimtune.app.tables import Table
from slimtune.app.tasks.base import Base, Task, choose_metric, first_output, probe
from slimtune.app.tasks.chat import Sample, form_of, read_samples
from slimtune.app.tasks.models import build_base
from slimtune.app.tasks.text import CHUNK, IGNORED, PadCollator, Ragged, length_limit
from slimtune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from slimtune.app.config import TrainConfig

METRICS = {"perplexity": False, "nats_per_char": False, "token_accuracy": True}
SHOWN = 80  # characters of the first row in the report


class MaskedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """input_ids, and labels equal to them where trained, -100 elsewhere; nothing predicts the first token."""

    def __init__(self, tokens: Ragged, trained: Ragged):
        self.tokens, self.trained = tokens, trained

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids = self.tokens[i]
        labels = np.where(self.trained[i], ids, IGNORED)
        labels[:1] = IGNORED
        return {"input_ids": ids, "labels": labels}


def build(cfg: TrainConfig) -> Task:
    metric, greater = choose_metric(cfg, METRICS, "loss")
    splits = load_splits(cfg)
    base = build_base(cfg)
    length = length_limit(cfg, base.processing, base.model)
    rows, facts = {}, {}
    for name, table in splits.items():
        rows[name], facts[name] = encode(table, base.processing, length, cfg)
    collator = PadCollator(base.processing.pad_token_id)
    if cfg.model_factory:
        probe(base, collator([rows["train"][0]]), len(base.processing), "one score per token of the vocabulary")
    form = facts["train"].pop("form")
    return Task(
        name=cfg.task,
        model=base.model,
        processing=base.processing,
        train=rows["train"],
        validation=rows["validation"],
        test=rows.get("test"),
        collator=collator,
        compute_metrics=_Metrics(base.processing),
        preprocess_logits=score_tokens,
        loss=_loss(base) if cfg.model_factory else None,
        head=base.head,
        fresh=base.fresh,
        metric=metric,
        greater_is_better=greater,
        info={
            "form": form,
            "rows": {name: len(table) for name, table in splits.items()},
            "max_length": length,
            "packing": cfg.packing,
            "tokens": {name: {k: v for k, v in fact.items() if k != "form"} for name, fact in facts.items()},
            "first_row": show(rows["train"][0], base.processing),
            "fresh": base.fresh,
            "notes": splits.notes,
        },
    )


# ---------------------------------------------------------------- encoding


def encode(table: Table, tokenizer: Any, length: int, cfg: TrainConfig) -> tuple[MaskedRows, dict[str, Any]]:
    """(rows, facts) of one split. Facts: form, tokens, trained tokens, rows cut, rows left out.

    Raises:
        DataError: no trained token is left, with the reasons counted; or packing of rows that have a prompt.
    """
    form = form_of(table, cfg.text_column)
    samples = read_samples(table, form, tokenizer)
    whole = all(sample.spans is None for sample in samples)
    if cfg.packing and not whole:
        raise ConfigError(f"packing: only whole texts are packed; {table.name} has the form {', '.join(form)}")
    tokens, trained = tokenize(samples, tokenizer)
    if cfg.packing:
        tokens, trained = pack(tokens, trained, length)
    cut = sum(len(row) > length for row in tokens)
    silent = sum(not any(mask[1:]) for mask in trained)
    kept = [(row[:length], mask[:length]) for row, mask in zip(tokens, trained, strict=True) if any(mask[1:length])]
    if not kept:
        raise DataError(
            f"{table.name}: no token is left to train on: of {len(tokens)} rows {silent} have nothing after the "
            f"prompt and {len(tokens) - silent} have prompts that fill max_length ({length})"
        )
    data = MaskedRows(Ragged([row for row, _ in kept]), Ragged([mask for _, mask in kept], np.bool_))
    facts = {
        "form": ", ".join(form),
        "tokens": sum(len(row) for row, _ in kept),
        "trained_tokens": sum(sum(mask[1:]) for _, mask in kept),
        "truncated_rows": cut,
        "rows_left_out": len(tokens) - len(kept),
    }
    return data, facts


def tokenize(samples: Sequence[Sample], tokenizer: Any) -> tuple[list[list[int]], list[list[bool]]]:
    """(token ids, trained or not) of each sample, not cut, with the end token where the text has no template.

    Raises:
        ConfigError: spans need character offsets, which only fast tokenizers (tokenizer.json) give.
    """
    masked = any(sample.spans is not None for sample in samples)
    if masked and not tokenizer.is_fast:
        raise ConfigError("loss on the completion needs a fast tokenizer (a tokenizer.json in the model folder)")
    end = tokenizer.eos_token_id
    tokens, trained = [], []
    for start in range(0, len(samples), CHUNK):
        chunk = samples[start : start + CHUNK]
        batch = tokenizer(
            [sample.text for sample in chunk],
            add_special_tokens=not chunk[0].templated,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=masked,
            verbose=False,
        )
        for i, sample in enumerate(chunk):
            ids = list(batch["input_ids"][i])
            if sample.spans is None:
                mask = [True] * len(ids)
            else:
                mask = in_spans(batch["offset_mapping"][i], sample.spans)
                if mask and ids[-1] == end and _trains_end(sample):
                    mask[-1] = True
            if end is not None and not sample.templated and (not ids or ids[-1] != end):
                ids.append(end)
                mask.append(_trains_end(sample))
            tokens.append(ids)
            trained.append(mask)
    return tokens, trained


def _trains_end(sample: Sample) -> bool:
    """Whether the end token follows trained text; alone it would teach to say nothing."""
    if sample.spans is None:
        return True
    return any(low < high for low, high in sample.spans) and sample.spans[-1][1] == len(sample.text)


def in_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """For each token's [start, end): does it share a character with a span?"""
    start, end = np.asarray(offsets, np.int64).reshape(-1, 2).T
    shared = np.zeros(len(start), np.bool_)
    for low, high in spans:
        shared |= (start < high) & (end > low) & (end > start)
    return shared.tolist()


def pack(tokens: list[list[int]], trained: list[list[bool]], length: int) -> tuple[list[list[int]], list[list[bool]]]:
    """Rows joined in order and cut into blocks of `length`; the last block may be shorter."""
    ids = [token for row in tokens for token in row]
    mask = [flag for row in trained for flag in row]
    starts = range(0, len(ids), length)
    return [ids[i : i + length] for i in starts], [mask[i : i + length] for i in starts]


def show(row: dict[str, Any], tokenizer: Any) -> dict[str, str]:
    """The end of the first row's context and the beginning of what is trained, for a human to check."""
    labels = np.asarray(row["labels"])
    first = int((labels != IGNORED).argmax())
    context = tokenizer.decode(row["input_ids"][:first].tolist())
    trained = tokenizer.decode(labels[labels != IGNORED].tolist())
    return {"context": context[-SHOWN:], "trained": trained[:SHOWN]}


# ---------------------------------------------------------------- loss and metrics


def _loss(base: Base) -> Any:
    """Cross entropy of the next token for models that do not compute it themselves."""

    def loss(
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        logits = base.call(model, inputs)
        targets = inputs["labels"][:, 1:].flatten()
        total = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum")
        items = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        value = total / items
        return (value, {"loss": value, "logits": logits}) if return_outputs else value

    return loss


def score_tokens(logits: Any, labels: Tensor) -> Tensor:
    """(B, 3): summed nats, right guesses, and number of trained tokens; all the metrics need of (B, L, V) logits."""
    logits = first_output(logits)
    rows = []
    for scores, targets in zip(logits[:, :-1], labels[:, 1:], strict=True):  # (L - 1, V), (L - 1)
        kept = targets != IGNORED
        scores, targets = scores[kept].float(), targets[kept]
        nats = F.cross_entropy(scores, targets, reduction="sum")
        right = (scores.argmax(-1) == targets).sum() if len(targets) else nats.new_zeros(())
        rows.append(torch.stack([nats.double(), right.double(), kept.sum().double()]))
    return torch.stack(rows)


class _Metrics:
    """loss (nats per trained token over the whole split), perplexity, nats_per_char, token_accuracy."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __call__(self, prediction: Any) -> dict[str, float]:
        nats, right, count = np.asarray(prediction.predictions, np.float64).sum(0)
        loss = float(nats / count)
        found = {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "token_accuracy": float(right / count),
        }
        if characters := self.characters(prediction.label_ids):
            found["nats_per_char"] = float(nats / characters)
        return found

    def characters(self, labels: Any) -> int:
        """Length of the text that the trained tokens spell; special tokens count nothing."""
        rows = [row[row != IGNORED].tolist() for row in np.asarray(labels)]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return sum(map(len, texts))
