"""Starts that take the first step: B from the mean gradient.

Shapes: O out, I in, R rank, K kept directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import StructureError
from ..structures import LowRank, Structure
from .base import GradientStats, Request, initialiser

__all__ = ["gora"]


GAMMAS = (*(0.8**k for k in range(52)), 0.0)
"""1 down to about 1e-5, and 0 where nothing lowers the loss."""


@initialiser(needs=GradientStats, asks=lambda rank, **_: Request(sketch=rank), tries={"gamma": GAMMAS})
def gora(
    structure: Structure,
    weight: Callable[[torch.dtype | None], Tensor],
    stats: GradientStats,
    scale: float,
    *,
    gamma: float | None = 0.05,
) -> None:
    """s B A = -gamma sqrt(I / R) G P_A, with A the first R rows of `projection` and P_A = A^T (A A^T)^+ A.

    GoRA, He et al. 2025, arXiv 2502.12171, eq. 9 and 10: the step -gamma G, |dW| about gamma |G|_F, as seen through R
    random directions of the input. B = -(gamma sqrt(I / R) / s) Y (A A^T)^+ with Y = G A^T, the least squares solution
    of B A = G up to its factor, whatever the scale s.

    Args:
        gamma: length of the step; 0 leaves the base as it is. None, which `calibrate.fit` replaces, for that of 0.8^k
            with the least loss on the first batch, 0 if that is the base's.

    Raises:
        StructureError: a structure that is not B A, a sketch of fewer than R rows or of another size.
    """
    if not isinstance(structure, LowRank) or structure.has_core:
        raise StructureError(f"gora: fills the factors of LowRank, not of {type(structure).__name__}")
    if not isinstance(gamma, (int, float)) or isinstance(gamma, bool) or not 0 <= gamma < math.inf:
        raise StructureError(f"gora: gamma must be a number of at least 0, got {gamma!r}")
    R, O, I = structure.rank, structure.out_features, structure.in_features
    if stats.sketch.shape[0] != O or stats.projection.shape[1] != I or len(stats.projection) < R:
        raise StructureError(
            f"gora: statistics of {stats.sketch.shape[0]} x {stats.projection.shape[1]} with a sketch of "
            f"{len(stats.projection)} do not serve a {O} x {I} layer of rank {R}; calibrate this model for that rank"
        )
    A = stats.projection[:R].to(structure.A.device, torch.float64)
    Y = stats.sketch[:, :R].to(A)
    B = Y @ torch.linalg.pinv(A @ A.t(), hermitian=True)
    structure.A.copy_(A)
    structure.B.copy_(B.mul_(-gamma * math.sqrt(I / R) / scale))
