"""What a model's data say about its layers before training: mean gradients and inputs, streamed.

Shapes: O out, I in, K kept directions, R rank, T rows of a batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..allocate import ALLOCATORS, ESTIMATES, MEASURES, Allocator, check_allocation, with_ranks
from ..errors import ConfigError, DataError, DivergenceError, StructureError, TargetError
from ..initialisers import INITIALISERS, GradientStats, Initialiser, InputStats, Request, Stats, check
from ..layers import Host, own_class
from ..ops import truncated_svd
from ..ops.processes import agreed, several, summed
from ..ranks import seeded
from ..recipe import Recipe
from ..structures.base import check_count
from ..taps import (
    Left,
    Loss,
    Probed,
    Products,
    Progress,
    Right,
    counter,
    home,
    length,
    passes_over,
    sum_dtype,
)
from ..targets import own_modules, select
from ..verbs import adapt, build_adapter, remove

__all__ = ["fit", "gradients", "inputs", "own_forward"]


def gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    targets: str | Sequence[str] = "all-linear",
    *,
    exclude: str | Sequence[str] = (),
    sketch: int = 0,
    directions: int = 0,
    power: int = 0,
    importance: Sequence[str] = (),
    probes: int = 4,
    memory: int = 2**31,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, GradientStats]:
    """Products of every layer's mean gradient G = (1/N) sum_t dL_t/dW, (O, I), with thin matrices.

    GoRA, He et al. 2025, arXiv 2502.12171, section 3.2, but streamed: a layer's input is multiplied by A as it comes
    by, and (O + I) K numbers are kept of it instead of O I. Sums are fp32 (fp64 on an fp64 base), whatever the base;
    packed bases serve as well. The passes run in evaluation mode with all weights frozen and random numbers fixed by
    `seed`, so that every pass sees the same gradients; afterwards weights, modes, hooks, `requires_grad` and random
    numbers are as before. Active adapters stay active: the gradient is that of the weight a new adapter would meet.

    Cost: a pass takes one forward pass and one backward pass for the inputs. Sketch and estimates need one pass,
    directions two and 2 more per `power`, exact measures as many as layers in groups of `memory` bytes; they share
    passes. With torch.distributed initialised each process gives its own batches, and sums are over all.

    Args:
        batches: whatever `loss` takes; kept in a list where more than one pass is needed. Tensors are moved to the
            model's device.
        loss: loss(model, batch) -> 0-d mean loss of the batch, or (loss, weight) to weigh batches of unequal sizes;
            model(**batch).loss when None.
        sketch: K of `sketch` = G A^T and `projection` = A, drawn from the layer's name and `seed`.
        directions: K of `left` = Q = qr(G A^T) and `right` = Q^T G; at most min(O, I).
        power: rounds of Q = qr(G qr(G^T Q)), for singular values that fall slowly.
        importance: names in `allocate.MEASURES`, exact, "gradient_frobenius_sketch" (from at least 16 rows of A) or
            "union_frobenius_probes" (from random signs; a forward product of the layer for each, linear layers only).
        probes: how many random signs.
        memory: bytes of full mean gradients kept at once for exact measures; one layer's at least.
        progress: progress(batches done, batches of all passes), 0 for a number not known.

    Returns:
        {layer: statistics}, in the model's order.

    Raises:
        ConfigError: an unknown measure. StructureError: a count that is none.
        TargetError: as `adapt`; the loss depends on none of the layers. A layer it does not reach is warned of.
        DataError: no batches, or nothing to take a loss from.
        DivergenceError: a loss or a layer's gradient that is not finite.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> batches = [torch.randn(8, 6) for _ in range(3)]
        >>> stats = st.calibrate.gradients(model, batches, lambda m, x: m(x).square().mean(), ["0"], sketch=2)
        >>> stats["0"].sketch.shape, stats["0"].batches
        (torch.Size([4, 2]), 3)
    """
    for value, what in ((sketch, "sketch"), (directions, "directions"), (power, "power"), (memory, "memory")):
        check_count(value, f"calibrate: {what}", 0)
    check_count(probes, "calibrate: probes")
    for measure in importance:
        if measure not in MEASURES and measure not in ESTIMATES:
            known = ", ".join([*MEASURES, *ESTIMATES])
            raise ConfigError(f"calibrate: unknown importance {measure!r}; known: {known}")
    if not (sketch or directions or importance):
        raise ConfigError("calibrate: nothing is asked for; give sketch, directions or importance")
    names = select(model, targets, exclude)
    turns = 2 + 2 * power if directions else 0
    with passes_over(model, names, loss, seed) as run:
        groups = _groups(run.layers, memory) if set(importance) & set(MEASURES) else []
        stages = max(1, len(groups), turns)
        if stages > 1 and not isinstance(batches, (list, tuple)):
            batches = list(batches)
        done = counter(progress, stages * length(batches))
        stats = {n: _nothing(host) for n, host in run.layers.items()}
        for stage in range(stages):
            products: Products = {n: {} for n in names}
            for n, host in run.layers.items():
                O, I = host.layout.sizes(host)
                k, dtype, own = min(directions, O, I), sum_dtype(host), stats[n]
                if stage == 0:
                    rows = max(sketch, k, 16 if "gradient_frobenius_sketch" in importance else 0)
                    if rows:
                        products[n]["sketch"] = Left(_projection(rows, I, seed, n).to(dtype))
                    if "union_frobenius_probes" in importance:
                        signs = torch.rand(probes, I, generator=seeded(seed, n, "signs")).sub_(0.5).sign_()
                        products[n]["probes"] = Probed(signs.to(dtype))
                elif stage < turns and own.left is not None:
                    if stage % 2:
                        products[n]["right"] = Right(own.left, dtype)
                    else:
                        products[n]["left"] = Left(torch.linalg.qr(own.right.t())[0].t())  # type: ignore[union-attr]
                if stage < len(groups) and n in groups[stage]:
                    products[n]["whole"] = Right(None, dtype)
            count = run.gradients(batches, products, done)
            for n, host in run.layers.items():
                k = min(directions, *host.layout.sizes(host))
                totals = {key: p.total for key, p in products[n].items() if p.total is not None}
                span = totals.get("sketch", totals.get("left"))
                if span is not None and k:
                    stats[n].left = torch.linalg.qr(span[:, :k])[0]
                if "right" in totals:
                    stats[n].right = totals["right"]
                if "sketch" in totals:
                    A = products[n]["sketch"].A[:sketch]  # type: ignore[attr-defined]
                    stats[n].sketch, stats[n].projection = totals["sketch"][:, :sketch].clone(), A.clone()
                stats[n].importance |= _importance(host, totals, importance)
                stats[n].batches = count
    return stats


def _nothing(host: Host) -> GradientStats:
    O, I = host.layout.sizes(host)
    empty = torch.zeros(0, dtype=sum_dtype(host), device=home(host))
    return GradientStats(empty.new_zeros(O, 0), empty.new_zeros(0, I))


def _importance(host: Host, totals: Mapping[str, Tensor], wanted: Sequence[str]) -> dict[str, float]:
    """What one pass's totals say of a layer's importance."""
    found = {}
    if "whole" in totals:
        G = totals["whole"]
        W = host.map().weight(G.dtype).detach().to(G.device)
        found = {m: MEASURES[m](W, G).item() for m in wanted if m in MEASURES}
    if "sketch" in totals and "gradient_frobenius_sketch" in wanted:
        Y = totals["sketch"]  # E[a^2] = 1 / (3 I)
        found["gradient_frobenius_sketch"] = (3 * host.layout.sizes(host)[1] * Y.square().sum(0).mean()).sqrt().item()
    if "probes" in totals:
        found["union_frobenius_probes"] = totals["probes"].square().sum(0).mean().sqrt().item()
    return found


def _projection(rows: int, I: int, seed: int, layer: str) -> Tensor:
    """(K, I) of U(-1/sqrt(I), 1/sqrt(I)); fewer rows are the first of more."""
    return (2 * torch.rand(rows, I, generator=seeded(seed, layer)) - 1) / math.sqrt(I)


def _groups(layers: Mapping[str, Host], memory: int) -> list[list[str]]:
    groups: list[list[str]] = []
    left = 0
    for n, host in layers.items():
        size = math.prod(host.layout.sizes(host)) * sum_dtype(host).itemsize
        if not groups or size > left:
            groups.append([])
            left = memory
        groups[-1].append(n)
        left -= size
    return groups


# ---------------------------------------------------------------- inputs


def inputs(
    model: nn.Module,
    batches: Iterable[Any],
    targets: str | Sequence[str] = "all-linear",
    *,
    exclude: str | Sequence[str] = (),
    components: int,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, InputStats]:
    """The leading right singular vectors of every layer's inputs X, (T, I), streamed: no gradient, one forward pass.

    EVA, Paischer et al. 2024, arXiv 2410.07170, section 3.1: after each batch the rows seen so far are replaced by
    2 K + 8 rows of the same leading directions (Ross et al. 2008, incremental SVD, without a mean), which is exact
    while X has no higher rank. Rows that a batch's "attention_mask" marks as padding do not count. Layers that are
    handed one and the same tensor are computed once. With torch.distributed initialised, what each process has seen is
    joined at the end. The model is left as it was, as by `gradients`.

    Args:
        components: K.
        forward: forward(model, batch); model(**batch) for a mapping and model(batch) otherwise when None.
        progress: progress(batches done, batches), 0 for a number not known.

    Raises:
        StructureError: components below 1.
        TargetError: as `adapt`, or a layer that is neither a Linear nor a transformers Conv1D.
        DataError: no batches, or a layer no input reaches.
        DivergenceError: inputs that are not finite.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> stats = st.calibrate.inputs(model, [torch.randn(8, 6) for _ in range(3)], ["0"], components=2)
        >>> stats["0"].components.shape, stats["0"].rows
        (torch.Size([2, 6]), 24)
    """
    check_count(components, "calibrate: components")
    names = select(model, targets, exclude)
    run_forward = forward or own_forward
    with passes_over(model, names, None, seed) as run:
        for n, host in run.layers.items():
            if not host.map().is_matrix:
                raise TargetError(f"{n!r} ({own_class(host).__name__}): inputs are kept of linear layers only")
        done = counter(progress, length(batches))
        parts = {n: _Inputs(n, 2 * components + 8) for n in names}
        handles = [run.layers[n].register_forward_pre_hook(parts[n].see, with_kwargs=True) for n in names]
        try:
            for _, batch in run.each(batches):
                seen: dict[Any, Any] = {}
                for part in parts.values():
                    part.mask, part.seen = own_mask(batch), seen
                with torch.no_grad():
                    run_forward(run.model, batch)
                seen.clear()
                done()
        finally:
            for handle in handles:
                handle.remove()
        return {n: part.stats(components) for n, part in parts.items()}


class _Inputs:
    """The leading directions of what one layer has been given."""

    def __init__(self, layer: str, size: int) -> None:
        self.layer, self.size, self.rows, self.total = layer, size, 0, 0.0
        self.mask: Tensor | None = None
        self.seen: dict[Any, Any] = {}
        self.values: Tensor | None = None
        self.directions: Tensor | None = None
        self.last: Any = None

    @torch.no_grad()
    def see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Fold in an input at once, before anything changes it in place, unless a layer with the same past was given
        the same."""
        x = (args[0] if args else kwargs["input"]).detach()
        key = self.last, x.data_ptr(), None if x.is_inference() else x._version, x.shape, x.stride()
        if key not in self.seen:
            with torch.autocast(x.device.type, enabled=False):
                self._fold(self._counted(x))
            # x stays alive for the pass, lest another tensor gets its address
            self.seen[key] = x, (self.rows, self.total, self.values, self.directions, object())
        self.rows, self.total, self.values, self.directions, self.last = self.seen[key][1]

    def _fold(self, X: Tensor) -> None:
        if not len(X):  # all padding, or an expert that got no token
            return
        self.rows += len(X)
        self.total += float(X.square().sum())
        if not math.isfinite(self.total):
            raise DivergenceError(f"calibrate: the inputs of {self.layer!r} are not finite")
        if self.values is not None and self.directions is not None:
            X = torch.cat([self.values[:, None] * self.directions, X])
        _, self.values, self.directions = truncated_svd(X, self.size, 2)

    def _gather(self) -> None:
        """Join what other processes have seen."""
        if not several():
            return
        held = self.values is not None and self.directions is not None
        seen = (self.values[:, None] * self.directions).cpu() if held else None  # type: ignore[index,operator]
        box: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(box, (seen, self.rows, self.total))
        parts = [part for part, _, _ in box if part is not None]
        self.rows, self.total = sum(rows for _, rows, _ in box), sum(total for _, _, total in box)
        if parts:
            X = torch.cat(parts).to(parts[0] if self.values is None else self.values)
            _, self.values, self.directions = truncated_svd(X, self.size)

    def _counted(self, x: Tensor) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        if self.mask is not None and (self.mask.shape == x.shape[:-1] or self.mask.numel() == len(rows)):
            rows = rows[self.mask.reshape(-1).bool()]
        return rows

    def stats(self, components: int) -> InputStats:
        self._gather()
        if self.values is None or self.directions is None:
            raise DataError(f"calibrate: no input reaches {self.layer!r}; were there batches?")
        return InputStats(self.directions[:components].clone(), self.values[:components].clone(), self.total, self.rows)


def own_forward(model: nn.Module, batch: Any) -> Any:
    """model(**batch) for a mapping, model(batch) otherwise.

    Raises:
        DataError: a list or tuple.
    """
    if isinstance(batch, (list, tuple)):
        raise DataError(
            f"calibrate: a batch is a {type(batch).__name__}; expected a mapping, for model(**batch), or a tensor. "
            "Give loss=lambda model, batch: ..., or forward="
        )
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def own_mask(batch: Any) -> Tensor | None:
    """Which tokens count, (B, S). Of a mask (B, ..., S) of pairs, which may be one that is added, those looked at."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() < 3:
        return mask if isinstance(mask, Tensor) else None
    return (mask == 0 if mask.is_floating_point() else mask != 0).flatten(1, -2).any(1)


# ---------------------------------------------------------------- what a recipe needs


def fit(
    recipe: Recipe,
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    targets: str | Sequence[str] = "all-linear",
    *,
    exclude: str | Sequence[str] = (),
    memory: int = 2**31,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Recipe, dict[str, Stats]]:
    """Give a recipe the ranks its `allocation` finds in the data, and collect what its `init` starts from.

    A recipe that names neither comes back as it is, and no pass is run. An option that is None and that its
    initialiser lets calibration find (`Initialiser.tries`) is tried on the first batch, one forward pass for each
    value. The ranks become `overrides` of the recipe by the layers' full names, so a saved adapter knows them, and
    resuming needs no data. Allocation starts from the rank the recipe gives each layer.

    Args:
        batches, loss, memory, seed, progress: of `gradients`, or of `inputs` for a recipe that starts from inputs.
        targets, exclude: as given to `adapt` afterwards.

    Returns:
        The recipe, and {layer: statistics}: `st.adapt(model, recipe, targets, stats=stats)`.

    Raises:
        StructureError: an unknown initialiser or allocator, one that asks for both gradients and inputs, or a budget
            that cannot be met. What `gradients` and `inputs` raise.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> batches = [torch.randn(8, 6) for _ in range(3)]
        >>> recipe, stats = st.calibrate.fit(
        ...     st.gora(rank=2, floor=1, ceiling=4), model, batches, lambda m, x: m(x).square().mean(), ["0", "2"]
        ... )
        >>> st.adapt(model, recipe, ["0", "2"], stats=stats)
        ['0', '2']
    """
    if not isinstance(recipe, Recipe):
        raise StructureError(f"calibrate: expected a Recipe such as st.gora(), got {type(recipe).__name__}")
    check(recipe.init, recipe.name)
    check_allocation(recipe.allocation, recipe.name)
    parts: list[tuple[Initialiser | Allocator, Mapping[str, Any]]]
    parts = [*((INITIALISERS[n], o) for n, o in recipe.init.items())]
    parts += [*((ALLOCATORS[n], o) for n, o in recipe.allocation.items())]
    names = select(model, targets, exclude)
    own = own_modules(model)
    ranks = {n: build_adapter(own[n], n, recipe.for_layer(n, own[n], model), "meta").structure.rank for n in names}
    most = max(rank or 1 for rank in ranks.values())
    for name, options in recipe.allocation.items():
        most = ALLOCATORS[name].most(most, **options)
    asked, kinds = Request(), set()
    for entry, options in parts:
        if entry.needs:
            kinds.add(entry.needs)
        if entry.asks:
            asked |= entry.asks(most, **options)
    if len(kinds) > 1:
        raise StructureError(f"{recipe.name}: starts from gradients and from inputs; one of them at a time")
    open_ = [(n, o) for n, given in recipe.init.items() for o in INITIALISERS[n].tries if given.get(o, 0) is None]
    if open_ and not isinstance(batches, (list, tuple)):
        batches = list(batches)
    stats: dict[str, Any] = {}
    if GradientStats in kinds:
        stats = gradients(
            model,
            batches,
            loss,
            targets,
            exclude=exclude,
            sketch=asked.sketch,
            directions=asked.directions,
            power=asked.power,
            importance=asked.importance,
            memory=memory,
            seed=seed,
            progress=progress,
        )
    elif InputStats in kinds:
        k = max(asked.components, 1)
        stats = inputs(
            model, batches, targets, exclude=exclude, components=k, forward=loss, seed=seed, progress=progress
        )
    for name, options in recipe.allocation.items():
        if any(rank is None for rank in ranks.values()):
            raise StructureError(f"{recipe.name}: {name} allocates ranks, and {recipe.structure.__name__} has none")
        allocator = ALLOCATORS[name]
        chosen = agreed(functools.partial(allocator.function, stats, ranks, **options))
        recipe = with_ranks(recipe, chosen, keep_scale=allocator.keeps_scale)
    for name, option in open_:
        recipe = _tried(recipe, name, option, model, batches, loss, targets, exclude, stats, seed)
    return recipe, stats


TRIAL = "calibration-trial"
"""Name of the adapter that is attached to try a value, and removed."""


def _tried(
    recipe: Recipe,
    name: str,
    option: str,
    model: nn.Module,
    batches: Any,
    loss: Loss | None,
    targets: str | Sequence[str],
    exclude: str | Sequence[str],
    stats: Mapping[str, Stats],
    seed: int,
) -> Recipe:
    """The recipe with the value of an initialiser's option that has the least loss on the first batch."""
    trials = [
        replace(recipe, init={**recipe.init, name: {**recipe.init[name], option: value}})
        for value in INITIALISERS[name].tries[option]
    ]
    losses = torch.zeros(len(trials), dtype=torch.float64)
    with passes_over(model, select(model, targets, exclude), loss, seed) as run, torch.no_grad():
        for i, trial in enumerate(trials):
            adapt(run.model, trial, targets, TRIAL, exclude=exclude, stats=stats)
            try:
                for _, batch in run.each(batches[:1]):
                    value = run.loss(run.model, batch)
                    losses[i] = value[0] if isinstance(value, tuple) else value
            finally:
                remove(run.model, TRIAL)
        losses = summed(losses, run.device)
    return trials[int(losses.nan_to_num(math.inf).argmin())]
