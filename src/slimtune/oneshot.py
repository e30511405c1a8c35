"""Layer 4: LORD in one call: calibrate, choose ranks, factorise, and say what it cost.

Shapes: O out, I in, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .allocate import Price, price, tail
from .calibrate import errors, moments
from .compress import SizeReport, check_unshared, factorize, part_of, shared_weights
from .errors import TargetError
from .factors import Factors, LayerMoments, Part, Replacement, afm
from .factors.base import check_finite, in_form
from .layouts import layout_of
from .ops.processes import agreed
from .structured import check_holdable
from .structures.base import check_count
from .substitutes import substitute
from .taps import Progress
from .targets import own_modules, select

__all__ = ["LordLayer", "LordReport", "lord"]

Ranks = Mapping[str, int] | Callable[[Mapping[str, Price]], Mapping[str, int]]


@dataclass(frozen=True)
class LordLayer:
    """What became of one layer.

    Attributes:
        name, shape: of the layer, (O, I).
        rank: R, or None for a layer that stayed dense.
        largest: the largest rank that makes it smaller.
        before, after: numbers that it keeps.
        predicted: sqrt(E|y - y'|^2 / E|y - E y|^2) by the calibration's moments alone; 0 for a dense layer.
        measured: the same by a forward pass over the calibration data, with the inputs of its time; None if not asked.
    """

    name: str
    shape: tuple[int, int]
    rank: int | None
    largest: int
    before: int
    after: int
    predicted: float = 0.0
    measured: float | None = None


@dataclass
class LordReport(SizeReport):
    """What `lord` did, layer by layer."""

    layers: list[LordLayer] = field(default_factory=list)

    @property
    def ranks(self) -> dict[str, int]:
        """{layer: R} of the layers factorised."""
        return {layer.name: layer.rank for layer in self.layers if layer.rank is not None}

    def __str__(self) -> str:
        dense = len(self.layers) - len(self.ranks)
        told = f", {dense} kept dense" if dense else ""
        kept = self.after / max(self.before, 1)
        return f"{len(self.ranks)} layers factorised{told}: {self.before:,} -> {self.after:,} parameters ({kept:.1%})"


@torch.no_grad()
def lord(
    model: nn.Module,
    batches: Iterable[Any],
    targets: str | Sequence[str] = "all-linear",
    *,
    exclude: str | Sequence[str] = (),
    keep: float = 0.8,
    ranks: Ranks | None = None,
    importance: Mapping[str, float] | None = None,
    centred: bool = True,
    add_bias: bool = True,
    form: str = "channel",
    sequential: bool = False,
    measure: bool = True,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
    memory: int = 2**31,
    dtype: torch.dtype | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> LordReport:
    """Compress a model in place, in one shot, by what its layers put out on calibration data.

    LORD, Kaushal et al. 2023, arXiv 2309.14021: `calibrate.moments`, ranks, then `factorize` with `factors.afm`. Ours
    are the form by the inputs, ranks by one budget for all layers (`allocate.tail`), and `sequential`. Take at least 20
    to 50 times as many rows (tokens) as the smaller side of a layer. An adapter, such as `st.lora()`, recovers part of
    the loss.

    Args:
        batches: of the calibration data, without labels; kept in a list if they are no list.
        targets, exclude: as for `adapt`, and convolutions.
        keep: the share of the chosen layers' parameters, for `allocate.tail`.
        ranks: in its place {layer: R}, or a function of {layer: `allocate.Price`} such as
            lambda p: st.allocate.uniform(p, {"*v_proj": 1.0, "*": 0.7}, multiple=8). Layers without a rank stay dense.
        importance: {layer: what a squared error of its output costs}, for `allocate.tail`, such as
            `calibrate.fisher`; when None, shares of the layers' variances count alike.
        centred, add_bias, form: of `factors.afm`; add_bias=False where a file format has no place for new biases.
        sequential: calibrate each block (the layers whose names agree up to their first number) again after the blocks
            before it are compressed, at ranks chosen beforehand: one more pass for each block.
        measure: one more pass for the measured errors (one for each block if sequential).
        optimizer: of `factorize`.
        memory, dtype, forward, seed, progress: of `calibrate.moments`; progress is told of each kind of pass anew.

    Returns:
        What became of each layer.

    Raises:
        TargetError: as `factorize`. ConfigError: as `allocate.tail`. DataError, DivergenceError: as
            `calibrate.moments`. Nothing has been changed, if not sequential.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> x = torch.randn(2000, 8) @ torch.randn(8, 64)
        >>> report = st.lord(model, [x], keep=0.5)
        >>> print(report)
        2 layers factorised: 8,320 -> 4,096 parameters (49.2%)
        >>> report.layers[0].predicted < 1e-3, model[0].structure.rank
        (True, 8)
    """
    own = own_modules(model)
    names = select(model, targets, exclude)
    shared = shared_weights(model)
    for name in names:
        check_holdable(own[name], name)
        check_unshared(own[name], name, shared)
        check_finite(part_of(own[name], name))
    if not isinstance(batches, (list, tuple)):
        batches = list(batches)
    common: dict[str, Any] = {"forward": forward, "seed": seed, "progress": progress}

    def calibrated(layers: Sequence[str]) -> afm:
        made = afm({}, centred, add_bias, form)

        def kept(name: str, found: LayerMoments) -> Any:
            part = part_of(own[name], name)
            if in_form(part, form) == "spatial":
                return found.to("cpu")
            return afm({name: found}, centred, add_bias, form).principal(part)

        side = "input" if form == "spatial" else "auto"
        got = moments(model, batches, list(layers), side=side, keep=kept, memory=memory, dtype=dtype, **common)
        made.moments.update(got)  # type: ignore[attr-defined]
        return made

    factors = calibrated(names)
    known = {name: price(part_of(own[name], name), factors) for name in names}
    chosen = ranks if isinstance(ranks, Mapping) else agreed(lambda: _chosen(ranks, known, keep, importance))
    for name in chosen:
        if name not in known:
            raise TargetError(f"lord: a rank is given for {name!r}, which is not among the {len(known)} layers chosen")
        check_count(chosen[name], f"lord: rank of {name!r}")
    report = {
        name: LordLayer(name, _sizes(own[name]), None, p.largest, p.before, p.before) for name, p in known.items()
    }
    for block in _blocks(names) if sequential else [names]:
        todo = {n: chosen[n] for n in block if n in chosen and chosen[n] <= known[n].largest}
        if not todo:
            continue
        if sequential:
            factors = calibrated(list(todo))
        made = _Made({n: factors(part_of(own[n], n), rank) for n, rank in todo.items()}, factors)
        foreseen = {n: _share(factors.predicted(p, r), factors.energy(p)) for n, r, p in _parts(own, todo)}
        found = dict.fromkeys(todo, (math.nan, 1.0))
        if measure:
            others = {n: substitute(own[n], replacement) for n, replacement in made.replacements.items()}
            found = errors(model, others, batches, **common)
        for entry in factorize(model, todo, made, optimizer).layers:
            n = entry.name
            report[n] = LordLayer(
                n,
                entry.shape,
                todo[n],
                entry.largest,
                entry.before,
                entry.after,
                foreseen[n],
                _share(*found[n]) if measure else None,
            )
    return LordReport(list(report.values()))


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(O, I) of a layer."""
    layout = layout_of(type(module))
    assert layout is not None
    return layout.sizes(module)


def _chosen(
    ranks: Any, known: Mapping[str, Price], keep: float, importance: Mapping[str, float] | None
) -> Mapping[str, int]:
    if ranks is not None:
        return ranks(known)
    weights = None if importance is None else {n: importance.get(n, -1.0) * p.energy for n, p in known.items()}
    return tail(known, keep, weights=weights)


def _share(error: float, energy: float) -> float:
    """A relative error; of a constant output, 0 or infinite."""
    if not energy > 0:
        return math.inf if error > 0 else 0.0
    return math.sqrt(max(error, 0.0) / energy)


def _parts(own: Mapping[str, nn.Module], ranks: Mapping[str, int]) -> Iterator[tuple[str, int, Part]]:
    for name, rank in ranks.items():
        yield name, rank, part_of(own[name], name)


def _blocks(names: Sequence[str]) -> list[list[str]]:
    """Layers by the beginning of their names, up to the first number."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
        blocks.setdefault(name if number is None else ".".join(parts[: number + 1]), []).append(name)
    return list(blocks.values())


@dataclass(frozen=True)
class _Made:
    """Factors that have been computed."""

    replacements: Mapping[str, Replacement]
    factors: Factors

    def __call__(self, part: Part, rank: int) -> Replacement:
        return self.replacements[part.name]

    def sizes(self, part: Part) -> tuple[float, int]:
        return self.factors.sizes(part)
