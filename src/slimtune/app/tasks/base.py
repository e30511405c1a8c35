"""What a task hands to the Trainer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimtune.errors import ConfigError

if TYPE_CHECKING:
    from slimtune.app.config import TrainConfig


@dataclass(frozen=True)
class Base:
    """A model, not yet adapted, and how to ask it for logits.

    Attributes:
        processing: the tokenizer, or the image settings (mean, std, size).
        fresh: modules whose weights were not in the file and are newly drawn.
        head: modules to train in full beside an adapter: `fresh`, else the task head of a transformers model.
        call: (model, inputs) -> logits; `labels` among the inputs are not passed on.
    """

    model: nn.Module
    processing: Any
    fresh: list[str]
    head: list[str]
    call: Callable[[nn.Module, dict[str, Any]], Tensor]


@dataclass
class Task:
    """Everything a run needs besides its method. The Trainer must be given `remove_unused_columns=False`,
    `label_names` and `callbacks`, and keep frozen batch norms on their stored statistics.

    Attributes:
        loss: (model, inputs, return_outputs=False, num_items_in_batch=None) -> loss or (loss, outputs): the mean
            over the batch, or with `num_items_in_batch` the sum divided by it; None: the model's own is right.
        metric: name of the main metric, without `eval_`.
        info: JSON-able facts for the report.
    """

    name: str
    model: nn.Module
    processing: Any
    train: Any
    validation: Any
    test: Any
    collator: Callable[[list[Any]], dict[str, Tensor]]
    compute_metrics: Callable[[Any], dict[str, float]]
    preprocess_logits: Callable[[Any, Any], Tensor]
    loss: Callable[..., Any] | None
    head: list[str]
    fresh: list[str]
    metric: str
    greater_is_better: bool
    info: dict[str, Any]
    label_names: list[str] = field(default_factory=lambda: ["labels"])
    callbacks: list[Any] = field(default_factory=list)


def brief(error: BaseException) -> str:
    """The type of somebody else's error and the first line of what it says."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}"


def choose_metric(cfg: TrainConfig, offered: dict[str, bool], default: str) -> tuple[str, bool]:
    """(name, greater is better) of the metric that decides. `offered` maps names to greater-is-better.

    Raises:
        ConfigError: metric_for_best_model is none of them.
    """
    known = {"loss": False, **offered}
    name = (cfg.metric_for_best_model or default).removeprefix("eval_")
    if name not in known:
        raise ConfigError(f"metric_for_best_model: task {cfg.task} has no metric '{name}'; known: {', '.join(known)}")
    return name, known[name]


def first_output(logits: Any, labels: Any = None) -> Tensor:
    """The logits when a model returns more than them."""
    return logits[0] if isinstance(logits, tuple | list) else logits


def mean_loss(call: Callable[..., Tensor], each: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """A Trainer loss from `each`: (logits (B, *), labels (B)) -> loss per example (B), in fp32.

    transformers' own heads average over the batch even where the Trainer expects a sum over accumulated batches;
    this one does as it is asked.
    """

    def loss(
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        logits = call(model, inputs)
        losses = each(logits.float(), inputs["labels"])
        value = losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch
        return (value, {"loss": value, "logits": logits}) if return_outputs else value

    return loss


@torch.no_grad()
def probe(base: Base, inputs: dict[str, Tensor], outputs: int, what: str) -> None:
    """Run a factory's model once. Raises ConfigError unless it gives (B, ..., >= `outputs`) finite numbers."""
    shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items() if name != "labels"}
    training = base.model.training
    base.model.eval()
    try:
        logits = base.call(base.model, inputs)
    except Exception as error:
        raise ConfigError(f"model_factory: the model fails on a batch of {shapes}: {brief(error)}") from error
    finally:
        base.model.train(training)
    batch = len(inputs["labels"])
    if not isinstance(logits, Tensor) or logits.ndim < 2 or len(logits) != batch or logits.shape[-1] < outputs:
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(
            f"model_factory: a batch of {shapes} gives {found}; expected ({batch}, ..., {outputs}): {what}"
        )


def counts(names: Sequence[str], encoded: dict[str, list[int]]) -> dict[str, dict[str, int]]:
    """Rows per class name and split."""
    return {
        split: {names[i]: count for i, count in sorted(Counter(numbers).items())} for split, numbers in encoded.items()
    }
