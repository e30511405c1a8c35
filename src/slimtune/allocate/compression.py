"""Ranks for layers that are compressed, under a budget. Pure functions of prices.

Shapes: O out, I in, R rank.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from ..compress import part_of
from ..errors import ConfigError, StructureError, TargetError
from ..factors import Factors, Part, svd
from ..factors.base import check_finite
from ..recipe import is_number, matches
from ..structured import check_holdable
from ..structures.base import check_count
from ..targets import own_modules, select

__all__ = ["Foreseeing", "Price", "fixed", "parameters", "price", "prices", "tail", "uniform"]

T = TypeVar("T")


@runtime_checkable
class Foreseeing(Protocol):
    """Factors that know their errors: `st.factors.afm`, `st.factors.svd`."""

    def errors(self, part: Part) -> Tensor:
        """Squared errors at ranks 0, 1, ...; falling."""
        ...


@dataclass(frozen=True)
class Price:
    """What a layer costs at each rank, in numbers to keep and in error.

    Attributes:
        before: numbers of the weight and the bias as they are, which is what a layer left dense keeps.
        per_rank: numbers that one rank takes.
        bias: numbers of the bias afterwards, an added one included.
        largest: the largest rank that makes the layer smaller.
        errors: (K + 1,), squared errors at ranks 0 to K, as shares: of the output's variance for `afm`, of |W|_F^2 for
            `svd`. None if the factors do not know.
        energy: what they are shares of.
    """

    before: int
    per_rank: float
    bias: int
    largest: int
    errors: Tensor | None = None
    energy: float = 1.0

    def after(self, rank: int | None) -> int:
        """Numbers at a rank; those of the dense layer for None, and for a rank that does not make it smaller."""
        return self.before if rank is None or rank > self.largest else round(self.per_rank * rank) + self.bias


def price(part: Part, factors: Factors) -> Price:
    """The price of one layer.

    Example:
        >>> import torch
        >>> price(Part("layer", torch.eye(8), torch.zeros(8)), svd()).after(2)
        40
    """
    bias = 0 if part.bias is None else part.bias.numel()
    added = factors.added(part) if isinstance(factors, _Adding) else 0
    per_rank, largest = factors.sizes(part)
    errors, energy = None, 1.0
    if isinstance(factors, Foreseeing):
        errors = factors.errors(part)
        energy = factors.energy(part) if isinstance(factors, _Energy) else float(errors[0])
        errors = errors / (energy or 1.0)
    return Price(part.W.numel() + bias, per_rank, bias + added, largest, errors, energy)


@runtime_checkable
class _Adding(Protocol):
    def added(self, part: Part) -> int: ...


@runtime_checkable
class _Energy(Protocol):
    def energy(self, part: Part) -> float: ...


def prices(
    model: nn.Module,
    factors: Factors | None = None,
    targets: str | Sequence[str] = "all-linear",
    *,
    exclude: str | Sequence[str] = (),
) -> dict[str, Price]:
    """The price of every layer that `targets` mean, in the model's order.

    Args:
        factors: what would take the weights' places; `svd()` when None.
        targets, exclude: as for `adapt`, and convolutions.

    Raises:
        TargetError: as `adapt`, or a layer that cannot be factorised. DivergenceError: a weight that is not finite.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> found = prices(model, targets=["0", "2"])
        >>> [(p.before, p.largest) for p in found.values()]
        [(4160, 31), (650, 8)]
    """
    own = own_modules(model)
    found = {}
    for name in select(model, targets, exclude):
        check_holdable(own[name], name)
        found[name] = price(check_finite(part_of(own[name], name)), factors or svd())
    return found


def parameters(prices: Mapping[str, Price], ranks: Mapping[str, int]) -> int:
    """Numbers that the layers keep: those with a rank at that rank, the others dense.

    Example:
        >>> parameters({"a": Price(100, 20, 0, 4), "b": Price(100, 20, 0, 4)}, {"a": 2})
        140
    """
    return sum(p.after(ranks.get(n)) for n, p in prices.items())


def uniform(
    prices: Mapping[str, Price], keep: float | Mapping[str, float] = 0.8, *, multiple: int = 1
) -> dict[str, int]:
    """The same share of every layer's parameters: the largest R with R per_rank + bias <= keep * before.

    Args:
        keep: the share, in (0, 1]; or {glob: share}, of which the first that fits a layer counts. A layer that none
            fits, or whose share is 1, stays dense, as where R would not make it smaller.
        multiple: R is rounded down to one where that leaves any; at least 1.

    Returns:
        {layer: R} of the layers to factorise.

    Raises:
        ConfigError: a share outside (0, 1]. TargetError: a glob that fits no layer.

    Example:
        >>> shape = Price(64 * 64, 128, 0, 31)
        >>> uniform({"q_proj": shape, "v_proj": shape}, {"v_proj": 1.0, "*": 0.5})
        {'q_proj': 16}
        >>> uniform({"q_proj": shape}, 0.7, multiple=8)
        {'q_proj': 16}
    """
    check_count(multiple, "uniform: multiple")
    ranks = {}
    for name, share in _per_layer(prices, keep, lambda v: _check_share(v, "uniform")).items():
        p = prices[name]
        # a hair more, lest a share such as 0.7 that no binary fraction holds lose a rank
        rank = max(1, int((share * p.before * (1 + 1e-12) - p.bias) / p.per_rank))
        rank = rank // multiple * multiple or rank
        if share < 1 and rank <= p.largest:
            ranks[name] = rank
    return ranks


def fixed(prices: Mapping[str, Price], rank: int | Mapping[str, int]) -> dict[str, int]:
    """One rank for all layers, or {glob: rank}, of which the first that fits a layer counts; where it makes it smaller.

    Raises:
        StructureError: a rank below 1. TargetError: a glob that fits no layer.

    Example:
        >>> fixed({"a": Price(4096, 128, 0, 31), "b": Price(640, 74, 0, 8)}, 16)
        {'a': 16}
    """
    chosen = _per_layer(prices, rank, lambda v: check_count(v, "fixed: rank"))
    return {n: r for n, r in chosen.items() if r <= prices[n].largest}


def _check_share(value: object, what: str) -> None:
    if not is_number(value) or not 0 < value <= 1:  # type: ignore[operator]
        raise ConfigError(f"{what}: keep must be a share in (0, 1], got {value!r}")


def _per_layer(prices: Mapping[str, Price], given: T | Mapping[str, T], check: Callable[[T], object]) -> dict[str, T]:
    table: Mapping[str, T] = given if isinstance(given, Mapping) else {"*": given}
    for pattern, value in table.items():
        check(value)
        if prices and not any(matches(n, pattern) for n in prices):
            raise TargetError(f"{pattern!r} fits none of the {len(prices)} layers, such as {next(iter(prices))!r}")
    found = {}
    for name in prices:
        fitting = [p for p in table if matches(name, p)]
        if fitting:
            found[name] = table[fitting[0]]
    return found


def tail(
    prices: Mapping[str, Price],
    keep: float = 0.8,
    *,
    weights: Mapping[str, float] | None = None,
    multiple: int = 1,
    floor: int = 1,
) -> dict[str, int]:
    """The ranks of least sum_l w_l errors_l(R_l) under one budget for all layers, greedily: R costs what it keeps.

    sum_l after_l(R_l) <= keep * sum_l before_l. All layers start at the floor; then the step that saves most error
    for a parameter is taken, again and again, along the lower convex hull of each layer's (parameters, error), whose
    last point is the dense layer without error. Where the steps of a hull no longer fit, single steps fill up what is
    left. On the hulls greedy is optimal (Everett 1963); what the budget does not pay for is less than one step.

    Args:
        keep: the share of the layers' parameters, in (0, 1].
        weights: {layer: w >= 0}; 1 for all when None. Errors are shares of a layer's variance, so a cost of squared
            errors such as `calibrate.fisher` is to be multiplied by the price's energy.
        multiple: ranks are multiples of it, where a layer has any below its break-even.
        floor: least rank.

    Returns:
        {layer: R} of the layers to factorise; the others stay dense.

    Raises:
        ConfigError: a share outside (0, 1], or one that does not pay for the floor.
        StructureError: prices without errors, a weight that is missing, negative or not finite, a count that is none.

    Example:
        >>> import torch
        >>> steep, flat = torch.tensor([1.0, 0.1, 0.01, 0.0]), torch.tensor([1.0, 0.6, 0.3, 0.1])
        >>> tail({"a": Price(100, 20, 0, 4, steep), "b": Price(100, 20, 0, 4, flat)}, 0.4)
        {'a': 1, 'b': 3}
    """
    _check_share(keep, "tail")
    check_count(multiple, "tail: multiple")
    check_count(floor, "tail: floor")
    points = {}
    for name, p in prices.items():
        w = 1.0 if weights is None else weights.get(name, -1.0)
        if p.errors is None:
            raise StructureError(f"tail: the error of {name!r} at a rank is not known; use afm or svd, or uniform")
        if not (is_number(w) and math.isfinite(w) and w >= 0):
            raise StructureError(f"tail: the weight of {name!r} is missing, negative or not finite")
        points[name] = _points(p, w, multiple, floor)
    left = keep * sum(p.before for p in prices.values()) * (1 + 1e-12) - sum(first[0][1] for first in points.values())
    if left < 0:
        least, before = sum(first[0][1] for first in points.values()), sum(p.before for p in prices.values())
        raise ConfigError(
            f"tail: the lowest ranks keep {least:,} parameters, above {keep:g} of the {before:,} there are"
        )
    at = dict.fromkeys(points, 0)
    left = _descend({n: _hull(points[n]) for n in points}, points, at, left)
    _descend({n: list(range(len(points[n]))) for n in points}, points, at, left)
    chosen = {n: points[n][i][0] for n, i in at.items()}
    return {n: r for n, r in chosen.items() if r is not None}


Point = tuple[int | None, int, float]
"""(rank, None for dense; numbers; weighted error)."""


def _points(p: Price, weight: float, multiple: int, floor: int) -> list[Point]:
    errors: Tensor = p.errors  # type: ignore[assignment]
    known = [float(e) * weight for e in errors]
    first = -(-floor // multiple) * multiple
    ranks: list[int] = list(range(first, p.largest + 1, multiple))
    if not ranks and p.largest >= floor:
        ranks = [floor]
    points: list[Point] = [(r, p.after(r), known[min(r, len(known) - 1)]) for r in ranks]
    return [*points, (None, p.before, 0.0)]


def _hull(points: Sequence[Point]) -> list[int]:
    """The places of the lower convex hull of (numbers, error), from the first to the last."""
    hull: list[int] = []
    for i, (_, cost, error) in enumerate(points):
        while len(hull) > 1:
            (_, c0, e0), (_, c1, e1) = points[hull[-2]], points[hull[-1]]
            if (e0 - e1) * (cost - c1) > (e1 - error) * (c1 - c0):
                break
            hull.pop()
        hull.append(i)
    return hull


def _descend(
    paths: Mapping[str, Sequence[int]], points: Mapping[str, Sequence[Point]], at: dict[str, int], left: float
) -> float:
    """Take the step of most error saved for a number, while one can be paid; what is left then."""

    def next_step(name: str) -> tuple[float, int] | None:
        to = next((i for i in paths[name] if i > at[name]), None)
        if to is None:
            return None
        (_, c0, e0), (_, c1, e1) = points[name][at[name]], points[name][to]
        return (e1 - e0) / max(c1 - c0, 1), to

    heap = [(step[0], place, n) for place, n in enumerate(paths) if (step := next_step(n))]
    heapq.heapify(heap)
    while heap:
        _, place, n = heapq.heappop(heap)
        step = next_step(n)
        assert step is not None
        cost = points[n][step[1]][1] - points[n][at[n]][1]
        if cost > left:
            continue  # for good: what is left only shrinks
        left -= cost
        at[n] = step[1]
        if (more := next_step(n)) is not None:
            heapq.heappush(heap, (more[0], place, n))
    return left
