"""Low-rank methods that differ from LoRA in where they start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..allocate import check_allocation
from ..errors import StructureError
from ..initialisers.loraga import check_options
from ..recipe import Recipe
from ..structures import CentredLowRank
from ..structures.base import check_count
from .lowrank import lora, rslora
from .patterns import pattern_overrides

__all__ = ["eva", "loraga", "olora", "pissa"]


def pissa(
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rank_dropout: float = 0.0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    iterations: int | None = None,
) -> Recipe:
    """W + (alpha / R) (B A - B0 A0) with (alpha / R) B0 A0 the best approximation of W at rank R, B and A from there.

    PiSSA, Meng et al. 2024, arXiv 2404.02948, eq. 2 to 4. The published W - s B0 A0 is not formed: the base stays as it
    is and the adapter fits it. The paper gives LoRA and PiSSA the same learning rate, 2e-5 for 7 billion parameters;
    small models take more. Attaching it decomposes every weight.

    Args:
        rank: R.
        alpha: numerator of the scale; R when None, as in the paper (also for layers with a rank of their own). It only
            balances: s B0 A0 is the same for any.
        dropout: of the adapter's input, while training; rounded to 1/256.
        rank_dropout: of the (T, 2 R) product instead; much cheaper.
        rank_pattern: ranks of some layers, {name, suffix or glob: R}.
        alpha_pattern: alphas of some layers, likewise.
        iterations: power iterations of a randomised decomposition, much faster for large weights; 4 finds the leading
            directions closely, 16 nearly exactly. None decomposes exactly.

    Raises:
        StructureError: a rank that is not a whole number of at least 1, an alpha that is 0 or not finite, a pattern
            table that is not a mapping, iterations that are not a whole number of at least 0.
    """
    if iterations is not None:
        check_count(iterations, "pissa: iterations", 0)
    plain = _unscaled("pissa", rank, alpha, dropout, rank_dropout, rank_pattern, alpha_pattern)
    return replace(plain, init={"pissa": {} if iterations is None else {"iterations": iterations}}, learning_rate=5e-4)


def olora(
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rank_dropout: float = 0.0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> Recipe:
    """W + (alpha / R) (B A - B0 A0) with B0 the first R columns of Q and A0 the first R rows of R in W = Q R.

    OLoRA, Buyukakyuz 2024, arXiv 2406.01775, section 3. The base is not edited.

    Args:
        rank: R.
        alpha: numerator of the scale; R when None (also for layers with a rank of their own), with which B0 A0 is part
            of W.
        dropout: of the adapter's input, while training; rounded to 1/256.
        rank_dropout: of the (T, 2 R) product instead; much cheaper.
        rank_pattern: ranks of some layers, {name, suffix or glob: R}.
        alpha_pattern: alphas of some layers, likewise.

    Raises:
        StructureError: as `pissa`.
    """
    plain = _unscaled("olora", rank, alpha, dropout, rank_dropout, rank_pattern, alpha_pattern)
    return replace(plain, init={"olora": {}}, learning_rate=5e-4)


def loraga(
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    rank_dropout: float = 0.0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    gamma: float = 16.0,
    size: str = "stable",
    direction: str = "ArB2r",
    power: int = 1,
) -> Recipe:
    """W + (alpha / sqrt(R)) (B A - B0 A0) with A0, B0 singular vectors 1 .. R and R+1 .. 2R of the mean gradient.

    LoRA-GA, Wang et al. 2024, arXiv 2407.05000, theorems 3.1 and 3.2: A0 = O^(1/4) / sqrt(gamma) V_{1..R}^T and B0 =
    O^(1/4) / sqrt(gamma) U_{R+1..2R}, after which the first step follows the gradient of full training as far as rank
    2 R can. With factors this large a step moves the weight several times as far as LoRA's, so it wants a smaller
    learning rate. It starts from the data: `recipe, stats = st.calibrate.fit(st.loraga(), model, batches)`, then
    `st.adapt(model, recipe, stats=stats)`. The base is not edited.

    Args:
        rank: R.
        alpha: numerator of the scale, over sqrt(R) as in the authors' runs.
        dropout: of the adapter's input, while training; rounded to 1/256.
        rank_dropout: of the (T, 2 R) product instead; much cheaper.
        rank_pattern: ranks of some layers, {name, suffix or glob: R}.
        alpha_pattern: alphas of some layers, likewise.
        gamma: larger starts smaller; the authors take 16, and 64 for models of 7 billion.
        size: stable as above, or gd_scale, unit or weight_svd (see `initialisers.loraga`).
        direction: ArB2r as above, or A2rBr or ArBr.
        power: rounds of power iteration by which calibration finds the vectors; it takes 2 + 2 power passes.

    Raises:
        StructureError: as `lora`; an unknown size or direction, a gamma that is not positive and finite, a power
            that is not a whole number of at least 0.
    """
    check_count(rank, "loraga: rank")
    check_options(gamma, size, direction, power)
    plain = rslora(rank, alpha, dropout, rank_dropout, rank_pattern, alpha_pattern)
    options = {"gamma": gamma, "size": size, "direction": direction, "power": power}
    return replace(plain, structure=CentredLowRank, init={"loraga": options}, name="loraga", learning_rate=1e-4)


def eva(
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rank_dropout: float = 0.0,
    rho: float = 2.0,
    floor: int = 1,
    whiten: bool = False,
) -> Recipe:
    """W + (alpha / R) B A with A the leading right singular vectors of the layer's inputs, and R shared out by them.

    EVA, Paischer et al. 2024, arXiv 2410.07170, sections 3.1 and 3.2. B starts at zero. The ranks go where they explain
    most of the inputs, their sum being kept; alpha follows them, so that alpha / R is one for all layers. It starts
    from the data: `recipe, stats = st.calibrate.fit(st.eva(), model, batches)`, then
    `st.adapt(model, recipe, stats=stats)`.

    Args:
        rank: R of each layer before they are shared out.
        alpha: numerator of the scale at this rank; 2 R when None.
        dropout: of the adapter's input, while training; rounded to 1/256.
        rank_dropout: of the (T, R) product instead; much cheaper.
        rho: a layer gets at most rho R; 1 leaves the ranks as they are.
        floor: least rank of a layer.
        whiten: divide row j of A by the square root of its singular value.

    Raises:
        StructureError: as `lora`; rho below 1, a floor that is not a whole number of at least 1 or above the rank.
    """
    check_count(rank, "eva: rank")
    plain = lora(rank, alpha, dropout, rank_dropout)
    check_count(floor, "eva: floor")
    if floor > rank:
        raise StructureError(f"eva: floor {floor} is above the rank, {rank}")
    if not isinstance(whiten, bool):
        raise StructureError(f"eva: whiten must be true or false, got {whiten!r}")
    allocation = {"eva": {"rho": rho, "floor": floor}}
    check_allocation(allocation, "eva")
    return replace(plain, init={"eva": {"whiten": whiten}}, allocation=allocation if rho > 1 else {}, name="eva")


def _unscaled(
    name: str,
    rank: int,
    alpha: float | None,
    dropout: float,
    rank_dropout: float,
    rank_pattern: Mapping[str, int] | None,
    alpha_pattern: Mapping[str, float] | None,
) -> Recipe:
    """LoRA with a centred change, and s = 1 where no alpha is given."""
    check_count(rank, f"{name}: rank")
    plain = lora(rank, rank if alpha is None else alpha, dropout, rank_dropout)
    follows = (lambda r: r) if alpha is None else None
    overrides = pattern_overrides(name, rank_pattern, alpha_pattern, lambda r: {"rank": r}, follows)
    return replace(plain, structure=CentredLowRank, overrides=overrides, name=name)
