"""Layer 3: any adapter as plain LoRA, and what that loses.

Shapes: O out, I in, R rank.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .compositions import Additive, LinearMap
from .errors import AdapterNameError, SlimtuneError, StructureError, UninitializedError, VerificationError
from .layers import Adapted, Adapter
from .recipe import Recipe
from .structures import Factored, LowRank, Structure
from .structures.base import check_count
from .targets import hosts, require_adapter
from .verbs import build_adapter

__all__ = ["ConversionReport", "LayerConversion", "to_lora"]

ROUNDING = 1e-6  # what storing factors in fp32 costs; a tolerance below it asks for the exact ones
ROWS = 4096  # of dW that are compared at a time


@dataclass(frozen=True)
class LayerConversion:
    """What became of one layer's change dW = W' - W."""

    name: str
    method: str
    """The recipe it had."""
    how: str
    """"exact" (factors known by algebra), "truncated" (the best rank-R part of those) or "fitted" (of a dense dW)."""
    rank: int
    """R of B A, before padding to the rank of the file."""
    error: float
    """|dW - B A| / |dW|, Frobenius, measured on B and A as they are stored."""
    norm: float
    """|dW|, Frobenius."""
    needed: int
    """The smallest rank known to meet the tolerance."""
    errors: dict[int, float] = field(default_factory=dict)
    """What the best factors of rank 1, 2, 4, ... would leave; empty where all singular values were not computed."""


@dataclass
class ConversionReport:
    """The measured error of a conversion to LoRA: per layer, and over all layers together."""

    layers: list[LayerConversion]
    rank: int
    """The largest rank; that of all layers if they are padded with zeros."""
    tolerance: float
    numbers: int
    """How many numbers the LoRA holds, padding included."""
    base: str | None = None
    """Why the base model was needed; None if the adapter alone was enough."""
    effect: float | None = None
    """Relative change of the outputs by the adapter on probe inputs, if they were measured."""
    difference: float | None = None
    """Relative difference between the outputs of the adapter and of the LoRA, likewise."""
    notes: list[str] = field(default_factory=list)

    @property
    def worst(self) -> LayerConversion:
        return max(self.layers, key=lambda layer: layer.error)

    @property
    def error(self) -> float:
        """|dW - B A| / |dW| over all layers together."""
        norm = math.hypot(*(layer.norm for layer in self.layers))
        return math.hypot(*(layer.norm * layer.error for layer in self.layers)) / norm if norm else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self) | {"error": self.error}

    def to_json(self) -> str:
        """The same as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        counts = {how: sum(layer.how == how for layer in self.layers) for how in ("exact", "truncated", "fitted")}
        kinds = ", ".join(f"{n} {how}" for how, n in counts.items() if n)
        lines = [
            f"{len(self.layers)} layers to LoRA of rank {self.rank}, {self.numbers:,} numbers: {kinds}",
            f"error {self.error:.2e} of the change (worst layer: {self.worst.name}, {self.worst.error:.2e})",
        ]
        if self.difference is not None:
            lines.append(
                f"outputs: the adapter changes them by {self.effect:.3g}, the LoRA's differ from its by "
                f"{self.difference:.2e}"
            )
        return "\n".join([*lines, *self.notes])


@torch.no_grad()
def to_lora(
    model: Any,
    name: str = "default",
    rank: int | None = None,
    *,
    tolerance: float = 1e-3,
    multiple: int = 1,
    padded: bool = True,
    progress: Callable[[list[str]], Iterable[str]] = lambda layers: layers,
) -> ConversionReport:
    """Replace an attached adapter by plain LoRA with scale 1, of one rank or of each layer's own, in place.

    Per layer, exact where algebra gives factors B A of dW (LoLDU, MiSS, GraLoRA, SingLoRA, LoHa, Kronecker, ...), at
    no more than min(O, I); otherwise the best approximation of dW = W' - W by Eckart and Young, which for a
    composition other than `Additive` reads the weights below. The error is measured in fp64 against the definition.
    Optimizers that hold the old parameters must be made anew.

    Args:
        name: which adapter.
        rank: the largest rank to use; default: exact factors whole, fitted ones at the smallest rank within the
            tolerance.
        tolerance: the largest |dW - B A| / |dW| of a layer, as Frobenius norms; what is below 1e-6 counts as 1e-6.
        multiple: round ranks up to a multiple of this, with zeros.
        padded: give all layers the largest rank, with zeros, as some programs want it. False leaves each layer its own,
            which PEFT's files hold as rank_pattern and alpha_pattern.
        progress: wraps the list of layers while they are computed, as `tqdm` does.

    Raises:
        VerificationError: a layer's error is above the tolerance (the message gives the rank that would do), or
            without `rank` a LoRA of more numbers than the weights it changes would be needed.
        StructureError: a rank or multiple below 1, a tolerance that is negative or no number.
        SlimtuneError: a tensor that is not finite. The model is unchanged in each case.

    Example:
        >>> import slimtune as st
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> _ = st.adapt(model, st.rslora(rank=2, alpha=8), ["0"])
        >>> st.to_lora(model).layers[0].how
        'exact'
        >>> model[0].adapters["default"].recipe.name, model[0].adapters["default"].scale.item()
        ('lora', 1.0)
    """
    _check_options(rank, multiple, tolerance)
    require_adapter(model, name)
    found = hosts(model, name)
    if not found:
        raise AdapterNameError(f"adapter {name!r} changes no layer")
    for layer, host in found.items():
        for key, t in host.addition(name).state_dict().items():
            if t.is_meta:
                raise UninitializedError(f"{layer}: adapter {name!r} is still on the meta device")
            if not t.isfinite().all():
                raise SlimtuneError(f"to_lora: {layer}: {key} is not finite")
    fits: dict[str, tuple[LayerConversion, Tensor, Tensor]] = {}
    for layer in progress(list(found)):
        host = found[layer]
        fits[layer] = _fit(layer, host.addition(name), host.map(below=name), rank, max(tolerance, ROUNDING))
    layers = [entry for entry, _, _ in fits.values()]
    shared = -(-max(entry.rank for entry in layers) // multiple) * multiple
    sizes = {layer: host.layout.sizes(host) for layer, host in found.items()}
    ranks = {entry.name: shared if padded else -(-entry.rank // multiple) * multiple for entry in layers}
    numbers = sum(rank * sum(sizes[layer]) for layer, rank in ranks.items())
    report = ConversionReport(layers, shared, tolerance, numbers)
    if not any(entry.norm for entry in layers):
        report.notes.append("the adapter changes nothing: dW is 0 in every layer")
    _check_errors(report, rank, sum(math.prod(s) for s in sizes.values()), numbers)
    for layer, host in found.items():
        recipe = Recipe(LowRank, {"rank": ranks[layer]}, alpha=float(ranks[layer]), rank_power=1.0, name="lora")
        old: Adapter = host.addition(name)
        _, B, A = fits[layer]
        new = build_adapter(host, layer, recipe, old.scale.device)
        new.requires_grad_(any(p.requires_grad for p in old.parameters()))
        new.scale.fill_(1.0)
        for p, t in ((new.structure.A, A), (new.structure.B, B)):
            p.zero_()  # type: ignore[operator]
            p[: t.shape[0], : t.shape[1]] = t  # type: ignore[index, operator]
        host.adapters[name] = new
    return report


def _check_options(rank: int | None, multiple: int, tolerance: float) -> None:
    check_count(1 if rank is None else rank, "conversion: rank")
    check_count(multiple, "conversion: multiple")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < math.inf:
        raise StructureError(f"conversion: tolerance must be a number of at least 0, got {tolerance!r}")


def _check_errors(report: ConversionReport, rank: int | None, weights: int, numbers: int) -> None:
    told = _errors_by_rank(report.layers)
    above = [entry for entry in report.layers if not entry.error <= max(report.tolerance, ROUNDING)]
    worst = report.worst
    if above:
        enough = max(entry.needed for entry in report.layers)
        raise VerificationError(
            f"{len(above)} of {len(report.layers)} layers exceed the tolerance {report.tolerance:g} at rank "
            f"{rank or report.rank}; worst: {worst.name} ({worst.method}), error {worst.error:.3g}, needs rank "
            f"{worst.needed}. Rank {enough} does for all layers; or raise the tolerance, or merge the adapter{told}"
        )
    if rank is None and numbers > weights and any(entry.how == "fitted" for entry in report.layers):
        largest = max(report.layers, key=lambda entry: entry.rank)
        raise VerificationError(
            f"within the tolerance {report.tolerance:g}, {largest.name} ({largest.method}) needs rank {largest.rank}, "
            f"and a LoRA of that rank holds more numbers ({numbers:,}) than the weights it changes ({weights:,}): "
            f"merge the adapter, or give a rank and the tolerance it may have{told}"
        )


def _errors_by_rank(layers: list[LayerConversion]) -> str:
    """Words for what the worst layer loses at some ranks."""
    ranks = sorted({r for entry in layers for r in entry.errors if r >= 8})[:6]
    worst = {r: max(entry.errors.get(r, 0.0) for entry in layers) for r in ranks}
    return f". Largest error at rank {', '.join(f'{r}: {e:.2g}' for r, e in worst.items())}" if worst else ""


# ---------------------------------------------------------------- one layer


def _fit(
    layer: str, adapter: Adapter, below: LinearMap, rank: int | None, allowed: float
) -> tuple[LayerConversion, Tensor, Tensor]:
    """(what was done, B, A) with W' - W = B A, in the adapter's dtype."""
    wide, dtype = torch.float64, adapter.scale.dtype
    structure: Structure = copy.deepcopy(adapter.structure).to(wide)
    scale = adapter.scale.to(wide)
    additive = isinstance(adapter.composition, Additive)
    factors = structure.exact_factors() if additive else None
    smallest = min(structure.out_features, structure.in_features)
    if factors is not None:
        how, B, A = "exact", scale * factors[0], factors[1]
        limit = min(smallest, rank or smallest)
        needed, squares = min(A.shape[0], smallest), None
        if needed > limit:
            how = "truncated"
        if A.shape[0] > limit:
            thin = A.shape[0] < smallest
            B, A, squares = _best_of_product(B, A, limit) if thin else _best_of(B @ A, limit, allowed)
            needed = min(needed, _needed(squares, allowed))
        B, A = B.to(dtype), A.to(dtype)
        if isinstance(structure, Factored):
            left, right = structure.factors()
            norm = _norm_of_product(scale * left, right)
            lost = _norm_of_product(torch.cat([scale * left, -B.to(wide)], 1), torch.cat([right, A.to(wide)]))
        else:
            norm, lost = _norms(scale * structure.matrix(), B, A)
    else:
        how = "fitted"
        if additive:
            dW = scale * structure.matrix()
        else:
            dW = Adapted(adapter, below, False).weight(wide) - below.weight(wide)
        B, A, squares = _best_of(dW, rank, allowed)
        needed = _needed(squares, allowed)
        B, A = B.to(dtype), A.to(dtype)
        norm, lost = _norms(dW, B, A)
    if not math.isfinite(norm):
        raise SlimtuneError(f"to_lora: {layer}: the change of its weight is not finite")
    error = lost / norm if norm else float(lost > 0)
    return LayerConversion(layer, adapter.recipe.name, how, A.shape[0], error, norm, needed, _errors(squares)), B, A


def _best_of(dW: Tensor, rank: int | None, allowed: float) -> tuple[Tensor, Tensor, Tensor]:
    """The best factors of dW (O, I) in fp64 and the squares of its singular values, falling; without `rank` at the
    smallest rank that loses no more than `allowed`.

    By the eigenvectors of dW^T dW, half the work of an SVD; what it cannot see lies 1e-8 below the largest value.
    """
    if dW.shape[0] < dW.shape[1]:
        A, B, squares = _best_of(dW.t(), rank, allowed)
        return B.t(), A.t(), squares
    squares, V = torch.linalg.eigh(dW.t() @ dW)
    squares, V = squares.clamp_min(0).flip(0), V.flip(1)
    kept = min(_needed(squares, allowed) if rank is None else rank, V.shape[1])
    V = V[:, :kept]
    return *_balanced(dW @ V, V.t(), squares[:kept].sqrt()), squares


def _best_of_product(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same for dW = B A without building it."""
    Q, X = torch.linalg.qr(B)
    P, Y = torch.linalg.qr(A.t())
    U, values, Vh = torch.linalg.svd(X @ Y.t(), full_matrices=False)
    left, right = Q @ (U[:, :rank] * values[:rank]), Vh[:rank] @ P.t()
    return *_balanced(left, right, values[:rank]), values.square()


def _balanced(left: Tensor, right: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with columns and rows of equal norm; values that are only noise become zeros."""
    seen = values > 1e-8 * values.max()
    root = torch.where(seen, values, torch.ones_like(values)).sqrt()
    return torch.where(seen, left / root, 0.0), torch.where(seen[:, None], right * root[:, None], 0.0)


def _needed(squares: Tensor, allowed: float) -> int:
    """The smallest rank, at least 1, that leaves no more than `allowed` of the norm; `squares` fall."""
    rest = squares.sum() - squares.cumsum(0)
    left = (rest > allowed**2 * squares.sum()).sum()
    return min(int(left) + 1, len(squares))


def _errors(squares: Tensor | None) -> dict[int, float]:
    """{1, 2, 4, ...: the share of the norm that this rank leaves}."""
    if squares is None or not (total := float(squares.sum())):
        return {}
    left = (1 - squares.cumsum(0) / total).clamp_min(0).sqrt().tolist()
    return {rank: left[rank - 1] for rank in (2**n for n in range(len(left).bit_length())) if rank <= len(left)}


def _norm_of_product(B: Tensor, A: Tensor) -> float:
    """|B A|, Frobenius, from the triangles of two QR decompositions."""
    X, Y = torch.linalg.qr(B, "r").R, torch.linalg.qr(A.t(), "r").R
    return float((X @ Y.t()).norm())


def _norms(dW: Tensor, B: Tensor, A: Tensor) -> tuple[float, float]:
    """(|dW|, |dW - B A|), Frobenius, in fp64."""
    A = A.to(dW.dtype)
    lost = [float((d - b.to(d.dtype) @ A).norm()) for d, b in zip(dW.split(ROWS), B.split(ROWS), strict=True)]
    return float(dW.norm()), math.hypot(*lost)
