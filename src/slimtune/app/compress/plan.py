"""What is to become of each layer of a model: its rank, its size, and the error that is expected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from slimtune.allocate import Price
from slimtune.app.compress.config import CompressConfig
from slimtune.compress import SizeReport, shared_weights
from slimtune.errors import ConfigError, TargetError
from slimtune.factors import FACTORS, Factors, Part
from slimtune.recipe import matches
from slimtune.structured import check_holdable
from slimtune.targets import own_modules, select


@dataclass
class Layer:
    """One targeted layer. `rank` is None where it stays dense, and `reason` says why.

    Attributes:
        shape: (O, I) of the weight; a convolution's I is its input channels per group times its kernel.
        break_even: the rank at which it would be as large as before.
        before, after: numbers in weight and bias.
        predicted: relative error expected, measured: that of the outputs, sqrt(E|y' - y|^2 / E|y - E y|^2).
        weight: |W' - W| / |W|.
        dense_ms, compressed_ms: of one call at the batch size; `slower` when three of four turns said so.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    break_even: float
    largest: int
    before: int
    rank: int | None = None
    after: int = 0
    reason: str = ""
    predicted: float | None = None
    measured: float | None = None
    weight: float | None = None
    dense_ms: float | None = None
    compressed_ms: float | None = None
    slower: bool = False

    def stay(self, reason: str) -> None:
        """Leave it dense."""
        self.rank, self.after, self.reason, self.predicted = None, self.before, reason, None


@dataclass
class Plan(SizeReport):
    """The targeted layers in the model's order, and the size of the whole model."""

    layers: list[Layer] = field(default_factory=list)
    model: int = 0
    prices: dict[str, Price] = field(default_factory=dict)

    @property
    def chosen(self) -> list[Layer]:
        """Those that are factorised."""
        return [layer for layer in self.layers if layer.rank is not None]

    @property
    def model_after(self) -> int:
        return self.model - self.before + self.after

    def __str__(self) -> str:
        return "\n".join([*table(self.layers), *self.totals()])

    def totals(self) -> list[str]:
        """What it comes to, in sentences."""
        count = len(self.chosen)
        lines = [
            f"{count} of {len(self.layers)} layers factorised: {self.before:,} -> {self.after:,} parameters "
            f"({share(self.after, self.before)} kept)",
            f"model: {self.model:,} -> {self.model_after:,} parameters ({share(self.model_after, self.model)} kept)",
        ]
        kept: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.rank is None:
                kept.setdefault(layer.reason, []).append(layer.name)
        for reason, names in kept.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"dense: {shown}: {reason}")
        return lines


def share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


HEADS = ("layer", "shape", "rank", "break-even", "before", "after", "predicted", "measured", "weights", "speed")


def table(layers: Iterable[Layer], heads: Sequence[str] = HEADS) -> list[str]:
    """A line per layer; columns that would be empty are left out."""
    cells = [[*heads], *(row(layer) for layer in layers)]
    shown = [i for i in range(len(heads)) if any(line[i] != "-" for line in cells[1:])]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    return [
        "  ".join(line[i].ljust(widths[i]) if i == 0 else line[i].rjust(widths[i]) for i in shown) for line in cells
    ]


def row(layer: Layer) -> list[str]:
    """The cells of a layer, in the order of HEADS."""

    def error(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    speed = layer.dense_ms / layer.compressed_ms if layer.dense_ms and layer.compressed_ms else None
    return [
        layer.name,
        "x".join(map(str, layer.shape)),
        "dense" if layer.rank is None else str(layer.rank),
        f"{layer.break_even:.1f}",
        f"{layer.before:,}",
        f"{layer.after:,}",
        error(layer.predicted),
        error(layer.measured),
        error(layer.weight),
        "-" if speed is None else f"{speed:.2f}x",
    ]


# ---------------------------------------------------------------- layers


def make_factors(cfg: CompressConfig) -> Factors:
    """What replaces the weights, for a method that needs nothing but them.

    Raises:
        ConfigError: an option's value that it does not take.
    """
    options = dict(cfg.method_options)
    made: Any = FACTORS[cfg.method]
    if "form" not in options and cfg.form != "channel":
        options["form"] = cfg.form
    try:
        return made(**options)  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method_options: {cfg.method}: {error}") from error


def find_layers(model: nn.Module, cfg: CompressConfig) -> dict[str, str]:
    """{targeted layer: why it stays dense, or ""}, in the model's order.

    Raises:
        TargetError: targets that match nothing, or that name a layer that cannot be factorised; none is left.
    """
    own, shared = own_modules(model), shared_weights(model)
    found: dict[str, str] = {}
    for name in select(model, cfg.target_modules, cfg.exclude_modules):
        module: Any = own[name]
        try:
            check_holdable(module, name)
            if id(module.weight) in shared:
                raise TargetError(f"{name!r} cannot be factorised: another module uses its weight")
        except TargetError as error:
            if cfg.target_modules != "all-linear":
                raise
            found[name] = str(error).partition("factorised: ")[2] or str(error)
            continue
        found[name] = "skip" if any(matches(name, pattern) for pattern in cfg.skipped) else ""
    if all(found.values()) and not cfg.ranks:
        raise TargetError("no layer is left to compress: " + "; ".join(sorted(set(found.values()))))
    return found


def new_plan(reasons: Mapping[str, str], parts: Callable[[str], tuple[str, Part, Price]], model: int) -> Plan:
    """A plan in which no rank is decided; `parts` gives a layer's kind, weight and price, and `model` is the number of
    the model's parameters."""
    plan = Plan(model=model)
    for name, reason in reasons.items():
        kind, part, priced = parts(name)
        O, I = part.W.shape
        even = (priced.before - priced.bias) / priced.per_rank
        plan.layers.append(Layer(name, kind, (O, I), even, priced.largest, priced.before, None, priced.before, reason))
        plan.prices[name] = priced
    return plan


# ---------------------------------------------------------------- ranks


def explicit(cfg: CompressConfig, layers: Iterable[str]) -> dict[str, int]:
    """Ranks that the configuration names.

    Raises:
        TargetError: a pattern that matches no layer.
    """
    found: dict[str, int] = {}
    for pattern, rank in cfg.ranks.items():
        names = [name for name in layers if matches(name, pattern)]
        if not names:
            raise TargetError(f"ranks: {pattern!r} matches none of the {len(list(layers))} targeted layers")
        found |= dict.fromkeys(names, rank)
    return found


def shared_out(cfg: CompressConfig, plan: Plan, given: Mapping[str, int]) -> tuple[dict[str, Price], float]:
    """(prices of the layers whose rank follows `keep`, the share that is left to them), so that with those that stay
    dense and those whose rank is given it comes to `keep` in all.

    Raises:
        ConfigError: what stays dense or is given takes all of it.
    """
    free = {x.name: plan.prices[x.name] for x in plan.layers if not x.reason and x.name not in given}
    taken = sum(plan.prices[x.name].after(given.get(x.name)) for x in plan.layers if x.name not in free)
    total = plan.before
    left = cfg.keep * total - taken
    if free and left <= 0:
        raise ConfigError(
            f"keep: {cfg.keep:g} of {total:,} parameters are {cfg.keep * total:,.0f}, but layers that stay dense or "
            f"have ranks of their own take {taken:,}; raise keep, shorten skip, or move layers to exclude_modules"
        )
    return free, min(1.0, left / sum(p.before for p in free.values())) if free else 1.0


def decide(plan: Plan, ranks: Mapping[str, int], given: Mapping[str, int]) -> None:
    """Put ranks into a plan; where they would make nothing smaller the layer stays dense."""
    for layer in plan.layers:
        if layer.reason and layer.name not in given:
            continue
        rank, price = given.get(layer.name, ranks.get(layer.name)), plan.prices[layer.name]
        if rank is None:
            layer.stay("parameters are worth more there than elsewhere")
        elif rank > layer.largest:
            layer.stay(f"rank {rank} would not make it smaller")
        else:
            layer.rank, layer.reason, layer.after = rank, "", price.after(rank)
            if price.errors is not None:
                layer.predicted = max(0.0, float(price.errors[min(rank, len(price.errors) - 1)])) ** 0.5


def hash_of(weight: torch.Tensor) -> str:
    """SHA-256 of a weight's bytes, to know it again."""
    import hashlib

    flat = weight.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()
