"""A rank for each layer before training, under a budget. Pure functions of statistics and sizes.

Shapes: O out, I in, R rank; f = O + I is what one rank of a layer costs in parameters.
"""

from __future__ import annotations

import heapq
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, StructureError
from ..initialisers import GradientStats, InputStats, Request
from ..layers import own_class
from ..layouts import layout_of
from ..recipe import Recipe, check_part, is_number
from ..structures.base import check_count
from ..targets import own_modules, select
from ..verbs import build_adapter

__all__ = ["ALLOCATORS", "ESTIMATES", "MEASURES", "Allocator", "budget", "eva", "gora", "with_ranks"]

Ranks = int | Mapping[str, int]

MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "union_mean": lambda W, G: (W * G).abs().mean(),
    "union_frobenius": lambda W, G: torch.linalg.matrix_norm(W * G),
    "union_spectral": lambda W, G: torch.linalg.matrix_norm(W * G, 2),
    "union_nuclear": lambda W, G: torch.linalg.matrix_norm(W * G, "nuc"),
    "gradient_mean": lambda W, G: G.abs().mean(),
    "gradient_frobenius": lambda W, G: torch.linalg.matrix_norm(G),
    "gradient_nuclear": lambda W, G: torch.linalg.matrix_norm(G, "nuc"),
}
"""Exact measures of a layer's importance, functions of W and of the mean gradient G = dL/dW, both (O, I)."""

ESTIMATES = ("gradient_frobenius_sketch", "union_frobenius_probes")
"""Estimates of two of them, with unbiased squares, at the memory of a sketch."""


@dataclass(frozen=True)
class Allocator:
    """A function `(stats, ranks, **options) -> {layer: rank}` that a recipe can name."""

    function: Callable[..., dict[str, int]]
    needs: type[GradientStats] | type[InputStats]
    asks: Callable[..., Request]
    """asks(rank, **options): what it needs of the statistics, `rank` being the largest it may give."""
    most: Callable[..., int]
    """most(rank, **options): the largest rank it may give to a layer, from the largest it is given."""
    keeps_scale: bool = False
    """Whether a layer's scale stays that of the rank it had, its alpha following; else its alpha stays."""


ALLOCATORS: dict[str, Allocator] = {}


def check_allocation(allocation: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Raise StructureError for an allocator that does not exist, or options it does not have or cannot take."""
    functions = {name: entry.function for name, entry in ALLOCATORS.items()}
    for name, options in allocation.items():
        check_part("allocator", name, options, functions, where, own=2)
        functions[name]({}, 1, **options)


def _per_layer(ranks: Ranks, layers: Sequence[str]) -> dict[str, int]:
    given = dict.fromkeys(layers, ranks) if isinstance(ranks, int) else dict(ranks)
    for layer in layers:
        if layer not in given:
            raise StructureError(f"allocate: no rank is given for layer {layer!r}")
        check_count(given[layer], f"allocate: rank of {layer!r}")
    return {layer: given[layer] for layer in layers}


def _check_bounds(floor: object, ceiling: object, what: str, least: int = 1) -> None:
    check_count(floor, f"{what}: floor", least)
    check_count(ceiling, f"{what}: ceiling")
    if ceiling < floor:  # type: ignore[operator]
        raise StructureError(f"{what}: ceiling {ceiling!r} is below floor {floor!r}")


def gora(
    stats: Mapping[str, GradientStats],
    ranks: Ranks,
    *,
    importance: str = "union_mean",
    floor: int = 4,
    ceiling: int = 32,
    rule: str = "budget",
) -> dict[str, int]:
    """Ranks by the share a_i = I_i / sum_j I_j of a layer's importance: ideal_i = a_i sum_j R_j sqrt(f_j) / sqrt(f_i).

    GoRA, He et al. 2025, arXiv 2502.12171, eq. 5 to 8. The published rule rounds the ideal and clips it, and spends
    what it happens to spend; ours starts all layers at the floor and gives one rank after another to the layer
    furthest below its ideal that can still be paid.

    Args:
        stats: of `calibrate.gradients`, with this importance.
        ranks: R_j, the reference: one for all, or one per layer.
        importance: the measure I_i, a name in `MEASURES` or `ESTIMATES`.
        floor: least rank of a layer.
        ceiling: largest; also at most min(O, I), beyond which a rank is wasted.
        rule: "budget": sum_i R_i f_i <= sum_j R_j f_j, with less than one rank's cost left over unless every layer is
            at its ceiling; "paper": clip(round(ideal_i)), eq. 8; "code": that of the authors' code,
            clip(floor(round(a_i sum_j R_j f_j) / f_i)).

    Raises:
        StructureError: bounds that are none, an unknown rule, a measure that was not taken or is not finite, or a
            budget that does not reach the floor.

    Example:
        >>> import torch
        >>> shape = GradientStats(torch.zeros(64, 0), torch.zeros(0, 64))
        >>> stats = {n: replace(shape, importance={"union_mean": i}) for n, i in zip("abcd", (1, 2, 3, 10))}
        >>> gora(stats, 8), gora(stats, 8, rule="paper")
        ({'a': 4, 'b': 4, 'c': 5, 'd': 19}, {'a': 4, 'b': 4, 'c': 6, 'd': 20})
    """
    _check_bounds(floor, ceiling, "gora")
    if rule not in ("budget", "paper", "code"):
        raise StructureError(f"gora: rule must be 'budget', 'paper' or 'code', got {rule!r}")
    if importance not in (*MEASURES, *ESTIMATES):
        known = ", ".join([*MEASURES, *ESTIMATES])
        raise StructureError(f"gora: importance must be one of {known}, got {importance!r}")
    layers = list(stats)
    reference = _per_layer(ranks, layers)
    measures = {n: _measure(stats[n], importance, n) for n in layers}
    whole = sum(measures.values())
    share = {n: measures[n] / whole if whole else 1 / len(layers) for n in layers}
    sizes = {n: (len(stats[n].sketch), stats[n].projection.shape[1]) for n in layers}
    cost = {n: sum(sizes[n]) for n in layers}
    top = {n: min(ceiling, *sizes[n]) for n in layers}
    low = {n: min(floor, top[n]) for n in layers}
    spent = sum(reference[n] * cost[n] for n in layers)
    if rule == "code":
        found = {n: math.floor(round(spent * share[n]) / cost[n]) for n in layers}
        return {n: min(max(found[n], low[n]), top[n]) for n in layers}
    root = sum(reference[n] * math.sqrt(cost[n]) for n in layers)
    ideal = {n: root * share[n] / math.sqrt(cost[n]) for n in layers}
    if rule == "paper":
        return {n: min(max(round(ideal[n]), low[n]), top[n]) for n in layers}
    left = spent - sum(low[n] * cost[n] for n in layers)
    if left < 0:
        raise StructureError(
            f"gora: a floor of {floor} costs {spent - left:,} parameters, the budget of the reference ranks is "
            f"{spent:,}; lower the floor or raise the rank"
        )
    return _fill(low, left, lambda n, r: (r + 1, cost[n]) if r < top[n] else None, lambda n, r: r - ideal[n])


def _measure(stats: GradientStats, importance: str, layer: str) -> float:
    value = stats.importance.get(importance)
    if value is None:
        had = ", ".join(stats.importance) or "none"
        raise StructureError(f"allocate: {layer!r} has no importance {importance!r}; measured: {had}")
    if not (math.isfinite(value) and value >= 0):
        raise StructureError(f"allocate: the importance of {layer!r} is {value}, expected a finite number >= 0")
    return value


def _fill(
    low: Mapping[str, int],
    left: int,
    step: Callable[[str, int], tuple[int, int] | None],
    standing: Callable[[str, int], float],
) -> dict[str, int]:
    """From the floor, one step (next rank, its cost) at a time for the layer that stands lowest, the first of equals,
    among those whose next step can be paid."""
    ranks = dict(low)
    heap = [(standing(n, r), place, n) for place, (n, r) in enumerate(ranks.items())]
    heapq.heapify(heap)
    while heap:
        _, place, n = heapq.heappop(heap)
        taken = step(n, ranks[n])
        if taken is None or taken[1] > left:
            continue  # for good: what is left only shrinks
        ranks[n] = taken[0]
        left -= taken[1]
        heapq.heappush(heap, (standing(n, ranks[n]), place, n))
    return ranks


def eva(
    stats: Mapping[str, InputStats],
    ranks: Ranks,
    *,
    rho: float = 2.0,
    floor: int = 1,
) -> dict[str, int]:
    """The ranks whose share of the inputs' energy, sigma_j^2 / |X|_F^2, is largest over all layers; sum_i R_i is kept.

    EVA, Paischer et al. 2024, arXiv 2410.07170, section 3.2. A layer's scale stays what it was: alpha_i follows R_i.

    Args:
        stats: of `calibrate.inputs`, with at least rho R_i components.
        ranks: the ranks to share out: one for all, or one per layer.
        rho: a layer gets at most round(rho R_i).
        floor: least rank of a layer; at 0, layers may drop out, and are then to be left out of `targets`.

    Raises:
        StructureError: rho below 1, a floor above a layer's rank, or fewer components than ranks to share out.

    Example:
        >>> import torch
        >>> stats = {n: InputStats(torch.eye(4), torch.tensor(s), 100.0) for n, s in
        ...     {"a": [9.0, 3.0, 2.0, 1.0], "b": [4.0, 1.0, 1.0, 1.0]}.items()}
        >>> eva(stats, 2)
        {'a': 3, 'b': 1}
    """
    check_count(floor, "eva: floor", 0)
    if not is_number(rho) or not 1 <= rho < math.inf:
        raise StructureError(f"eva: rho must be a number of at least 1, got {rho!r}")
    layers = list(stats)
    reference = _per_layer(ranks, layers)
    top = {n: min(round(rho * reference[n]), len(stats[n].singular_values)) for n in layers}
    total = sum(reference.values())
    for n in layers:
        if floor > min(reference[n], top[n]):
            raise StructureError(
                f"eva: floor {floor} is above the rank of {n!r}, {reference[n]}, or what its inputs have"
            )
    if sum(top.values()) < total:
        raise StructureError(
            f"eva: {total} ranks to share out, the inputs have {sum(top.values())} components; calibrate more of them"
        )
    energy = {n: stats[n].total or 1.0 for n in layers}  # inputs that are all zero explain nothing
    ratios = {n: (stats[n].singular_values.double().square() / energy[n]).tolist() for n in layers}
    low = dict.fromkeys(layers, floor)
    return _fill(
        low,
        total - floor * len(layers),
        lambda n, r: (r + 1, 1) if r < top[n] else None,
        lambda n, r: -ratios[n][r] if r < top[n] else math.inf,
    )


def budget(
    model: nn.Module,
    recipe: Recipe,
    parameters: int,
    targets: str | Sequence[str] = "all-linear",
    *,
    exclude: str | Sequence[str] = (),
    importance: Mapping[str, float] | None = None,
    floor: int = 1,
    ceiling: int | None = None,
) -> dict[str, int]:
    """Ranks for any recipe whose option `rank` sets its size, of at most so many parameters in all.

    Sizes are counted on the recipe itself, on the meta device. All layers start at the floor; then the one with the
    least (R_i + 1/2) / w_i is raised to the next rank its structure takes, as long as one can be paid: equal weights
    w_i give equal ranks up to one step, others ranks in proportion (Sainte-Lague). What is left over is less than any
    layer's next step.

    Args:
        parameters: the budget of the adapter alone.
        importance: {layer: w_i >= 0}, such as a measure of `calibrate.gradients`; 1 for all when None.
        floor: least rank of a layer.
        ceiling: largest; min(O, I) when None, and never more than that.

    Returns:
        {layer: rank}; `with_ranks` puts them into the recipe.

    Raises:
        ConfigError: less than the floor costs. StructureError: a recipe without ranks, an importance that is missing
            or negative. TargetError: as `adapt`.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 24))
        >>> ranks = st.allocate.budget(model, st.lora(), 150, ["0", "2"]); ranks
        {'0': 3, '2': 3}
        >>> _ = st.adapt(model, st.allocate.with_ranks(st.lora(), ranks), ["0", "2"]); st.summary(model).trainable
        144
    """
    check_count(parameters, "budget: parameters")
    _check_bounds(floor, ceiling or floor, "budget")
    _rank_of(recipe)
    own = own_modules(model)
    layers = select(model, targets, exclude)
    weights = {n: 1.0 if importance is None else importance.get(n, -1.0) for n in layers}
    for n, w in weights.items():
        if not (math.isfinite(w) and w >= 0):
            raise StructureError(f"budget: the importance of {n!r} is missing, negative or not finite")
    recipes = {n: recipe.for_layer(n, own[n], model) for n in layers}
    shapes = {n: layout_of(own_class(own[n])).sizes(own[n]) for n in layers}  # type: ignore[union-attr]
    kinds = {n: repr((own_class(own[n]), shapes[n], one.options)) for n, one in recipes.items()}
    sizes: dict[tuple[str, int], int | None] = {}

    def size(n: str, rank: int) -> int | None:
        """Parameters of a layer at a rank; None where its structure does not take that rank."""
        key = kinds[n], rank  # a model has few kinds of layers
        if key not in sizes:
            one = replace(recipes[n], options={**recipes[n].options, "rank": rank})
            try:
                sizes[key] = sum(p.numel() for p in build_adapter(own[n], n, one, "meta").parameters())
            except StructureError:
                sizes[key] = None
        return sizes[key]

    def above(n: str, rank: int) -> int | None:
        """The next rank that is larger and that the structure takes."""
        return next((r for r in range(rank + 1, top[n] + 1) if size(n, r) is not None), None)

    top, low = {}, {}
    for n in layers:
        most = min(shapes[n])
        top[n] = most if ceiling is None else min(ceiling, most)
        start = above(n, min(floor, top[n]) - 1)
        if start is None:
            raise StructureError(f"budget: {n}: {recipe.name} takes no rank from {floor} to {top[n]}")
        low[n] = start
    least = sum(size(n, r) or 0 for n, r in low.items())
    if least > parameters:
        raise ConfigError(
            f"budget: {recipe.name} on {len(layers)} layers costs at least {least:,} parameters, "
            f"the budget is {parameters:,}; lower the floor or choose fewer targets"
        )

    def step(n: str, rank: int) -> tuple[int, int] | None:
        new = above(n, rank)
        return None if new is None else (new, (size(n, new) or 0) - (size(n, rank) or 0))

    return _fill(low, parameters - least, step, lambda n, r: (r + 0.5) / weights[n] if weights[n] else math.inf)


def _rank_of(recipe: Recipe) -> int:
    """The option `rank` of a recipe."""
    known = inspect.signature(recipe.structure).parameters
    if "rank" not in known:
        raise StructureError(f"{recipe.name}: {recipe.structure.__name__} has no option rank, so none can be allocated")
    return recipe.options.get("rank", known["rank"].default)


def with_ranks(recipe: Recipe, ranks: Mapping[str, int], keep_scale: bool = False) -> Recipe:
    """A recipe with these ranks, {layer's full name: R}, as `overrides`.

    Args:
        keep_scale: let alpha_i follow R_i, so that s = alpha / R**rank_power stays that of the rank it had; otherwise
            alpha stays, and the rule for s holds.

    Raises:
        StructureError: a recipe without ranks, or a rank below 1.

    Example:
        >>> import slimtune as st
        >>> st.allocate.with_ranks(st.lora(rank=4, alpha=8), {"up": 2}, keep_scale=True).for_layer("up").scale(2)
        2.0
    """
    overrides: dict[str, Mapping[str, Any]] = {k: dict(v) for k, v in recipe.overrides.items()}
    for layer in sorted(ranks, key=len):  # a name that ends in another one is longer, and later entries win
        rank = ranks[layer]
        if rank == 0:
            raise StructureError(f"{recipe.name}: {layer!r} is given no rank; leave it out of the targets")
        check_count(rank, f"{recipe.name}: rank of {layer!r}")
        pattern = re.sub(r"([*?[])", r"[\1]", layer)
        before = recipe.for_layer(layer)
        changes = {**overrides.pop(pattern, {}), "rank": rank}
        if keep_scale:
            changes["alpha"] = before.alpha * (rank / _rank_of(before)) ** recipe.rank_power
        _rank_of(before)
        overrides[pattern] = changes
    return replace(recipe, overrides=overrides)


ALLOCATORS["gora"] = Allocator(
    gora,
    GradientStats,
    lambda rank, importance="union_mean", **_: Request(importance=(importance,)),
    lambda rank, ceiling=32, **_: ceiling,
)
ALLOCATORS["eva"] = Allocator(
    eva,
    InputStats,
    lambda rank, **_: Request(components=rank),
    lambda rank, rho=2.0, **_: round(rho * rank),
    keeps_scale=True,
)
