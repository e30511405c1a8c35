"""Starts from what a layer is fed.

Shapes: O out, I in, R rank, K kept directions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import StructureError
from ..ops import positive_rows
from ..structures import LowRank, Structure
from .base import InputStats, Request, initialiser, require_structure

__all__ = ["eva"]


@initialiser(needs=InputStats, asks=lambda rank, **_: Request(components=rank))
def eva(
    structure: Structure,
    weight: Callable[[torch.dtype | None], Tensor],
    stats: InputStats,
    scale: float,
    *,
    whiten: bool = False,
) -> None:
    """A = the R leading right singular vectors of the layer's inputs X, B = 0.

    EVA, Paischer et al. 2024, arXiv 2410.07170, section 3.1. Among all A of rank R with orthonormal rows, x A^T keeps
    the most of X. Ranks beyond the directions that the inputs have start as LoRA's do. The largest entry of each row
    is positive, which fixes the signs.

    Args:
        whiten: divide row j by sqrt(sigma_j), as PEFT does; sigma grows with the number of rows seen.

    Raises:
        StructureError: another structure than LowRank without a core; statistics of fewer components than R, or of
            another layer's width.
    """
    own = require_structure(structure, LowRank, "eva")
    if own.has_core:
        raise StructureError("eva: fits LowRank without a core")
    R, I = own.rank, own.in_features
    found = stats.components
    if found.shape[1] != I or len(found) < min(R, I, stats.rows or R):
        raise StructureError(
            f"eva: {len(found)} components of {found.shape[1]} inputs do not serve a layer of {I} inputs at rank {R}; "
            "calibrate this model for that rank"
        )
    sigma = stats.singular_values.to(own.A.device, torch.float64)[:R]
    seen = int((sigma > torch.finfo(torch.float32).eps * sigma[:1]).sum())
    A = positive_rows(found[:seen].to(sigma))
    own.A[:seen] = A / sigma[:seen, None].sqrt() if whiten else A
