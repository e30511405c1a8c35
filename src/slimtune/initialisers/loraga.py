"""Starts whose first step is that of full training, as far as 2 R directions carry it.

Shapes: O out, I in, R rank, K kept directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import StructureError
from ..ops import truncated_svd
from ..structures import CentredLowRank, Structure
from ..structures.base import check_count
from .base import GradientStats, Request, initialiser, require_structure

__all__ = ["loraga"]

DIRECTIONS: dict[str, Callable[[int], tuple[slice, slice]]] = {
    "ArB2r": lambda R: (slice(0, R), slice(R, 2 * R)),
    "A2rBr": lambda R: (slice(R, 2 * R), slice(0, R)),
    "ArBr": lambda R: (slice(1, 2 * R, 2), slice(0, 2 * R, 2)),
}
"""Which of the 2 R leading singular vectors are A's and which are B's; named as the authors' code does."""

SIZES = ("stable", "gd_scale", "unit", "weight_svd")


def _asks(rank: int, power: int = 1, **options: object) -> Request:
    return Request(directions=4 * rank, power=power)  # twice what is used: the others are for accuracy


@initialiser(needs=GradientStats, asks=_asks)
def loraga(
    structure: Structure,
    weight: Callable[[torch.dtype | None], Tensor],
    stats: GradientStats,
    scale: float,
    *,
    gamma: float = 16.0,
    size: str = "stable",
    direction: str = "ArB2r",
    power: int = 1,
) -> None:
    """A0 = c V_{1..R}^T and B0 = c U_{R+1..2R}, with G = U diag(S) V^T the mean gradient and c = O^(1/4) / sqrt(gamma).

    LoRA-GA, Wang et al. 2024, arXiv 2407.05000, theorems 3.1 and 3.2. To first order, the first step of gradient
    descent then moves the weight along the best approximation of G at rank 2 R: d(s dW) = -lr s^2 c^2 G_{2R}. The
    size of the gradient does not enter: every row of A0 and column of B0 has norm c. Where G has fewer than 2 R
    directions, A takes its own first, B what is left; ranks without one start as LoRA's do.

    Args:
        gamma: larger starts smaller; only with the size stable.
        size: c: "stable" as above; "gd_scale" for 1 / s, with which the first step is -lr G_{2R} whatever the scale;
            "unit" for 1; "weight_svd" for the mean of sqrt(S_j / s) over the R largest singular values of W.
        direction: "ArB2r" as above; "A2rBr" for A0 from R+1 .. 2R and B0 from 1 .. R; "ArBr" for A0 from 2, 4, ..., 2R
            and B0 from 1, 3, ..., 2R-1.
        power: rounds of power iteration by which calibration finds the vectors; each takes two passes over the batches.

    Raises:
        StructureError: another structure than CentredLowRank, an unknown size or direction, a gamma that is not
            positive and finite, a power that is not a whole number of at least 0; statistics without directions, with
            fewer than 2 R, or of another size.
    """
    own = require_structure(structure, CentredLowRank, "loraga")
    check_options(gamma, size, direction, power)
    O, I, R = own.out_features, own.in_features, own.rank
    left, right = stats.left, stats.right
    most = min(2 * R, O, I)
    if left is None or right is None or left.shape[0] != O or right.shape[1] != I or len(right) < most:
        had = "none" if left is None or right is None else f"{left.shape[1]} of a {len(left)} x {right.shape[1]} layer"
        raise StructureError(
            f"loraga: a {O} x {I} layer of rank {R} needs {most} directions of its gradient, the statistics have {had}"
        )
    Q, X = left.to(own.A0.device, torch.float64), right.to(own.A0.device, torch.float64)
    P, S, Vh = truncated_svd(X, most)  # of G as seen through Q
    U = Q @ P
    if size == "stable":
        c = O**0.25 / math.sqrt(gamma)
    elif size == "weight_svd":
        c = float((truncated_svd(weight(None), R, 4)[1] / abs(scale)).sqrt().mean())
    else:
        c = 1 / abs(scale) if size == "gd_scale" else 1.0
    ofA, ofB = DIRECTIONS[direction](R)
    A, B = Vh[ofA], U[:, ofB]
    if not (S[0] > 0 and c > 0):  # no gradient came this far, or no weight to measure by: with A0 = B0 = 0 none moves
        return
    own.A0[: len(A)] = c * A
    own.B0[:, : B.shape[1]] = c * B


def check_options(gamma: object, size: object, direction: object, power: object) -> None:
    """Raise StructureError for values that `loraga` does not take."""
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 < gamma < math.inf:
        raise StructureError(f"loraga: gamma must be a positive number, got {gamma!r}")
    check_count(power, "loraga: power", 0)
    if size not in SIZES:
        raise StructureError(f"loraga: size must be one of {', '.join(SIZES)}, got {size!r}")
    if direction not in DIRECTIONS:
        raise StructureError(f"loraga: direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
