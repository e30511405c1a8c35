"""Low rank with ranks and a start from the gradient."""

from __future__ import annotations

from dataclasses import replace

from ..allocate import check_allocation
from ..errors import StructureError
from ..recipe import Recipe, is_number
from ..structures.base import check_count
from .lowrank import rslora

__all__ = ["gora"]


def gora(
    rank: int = 8,
    alpha: float = 16.0,
    floor: int = 4,
    ceiling: int = 32,
    gamma: float | None = 0.05,
    importance: str = "union_mean",
    rule: str = "budget",
    dropout: float = 0.0,
    rank_dropout: float = 0.0,
) -> Recipe:
    """W + (alpha / sqrt(R)) B A, with R by the layer's share of mean |W * G| and B A the step -gamma G at the start.

    GoRA, He et al. 2025, arXiv 2502.12171, eq. 5 to 10. It starts from the data:
    `recipe, stats = st.calibrate.fit(st.gora(), model, batches)`, then `st.adapt(model, recipe, stats=stats)`. The base
    is not edited. The authors train B 16 times faster than A: `st.param_groups(model, b_ratio=16)`.

    Args:
        rank: the reference: layers of all ranks together cost what this rank would in all of them.
        alpha: numerator of the scale.
        floor: least rank of a layer.
        ceiling: largest.
        gamma: length of the first step, in the units of a learning rate of SGD; None for the one of 1, 0.8, 0.8^2, ...,
            0 that lowers the loss of the first calibration batch most.
        importance: of a layer; a measure of `calibrate.gradients`.
        rule: budget, exact; or paper or code, as published (see `allocate.gora`).
        dropout: of the adapter's input, while training; rounded to 1/256.
        rank_dropout: of the (T, R) product instead; much cheaper.

    Raises:
        StructureError: a count that is not a whole number of at least 1, a ceiling below the floor, an unknown rule,
            a gamma that is negative or not finite, an alpha that is 0 or not finite.
    """
    check_count(rank, "gora: rank")
    if gamma is not None and (not is_number(gamma) or not 0 <= gamma < float("inf")):
        raise StructureError(f"gora: gamma must be a number of at least 0, got {gamma!r}")
    allocation = {"gora": {"importance": importance, "floor": floor, "ceiling": ceiling, "rule": rule}}
    check_allocation(allocation, "gora")
    return replace(
        rslora(rank, alpha, dropout, rank_dropout),
        init={"gora": {"gamma": gamma}},
        allocation=allocation,
        name="gora",
    )
