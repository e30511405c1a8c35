"""Starts from a part of the weight itself, which is then what trains.

Shapes: O out, I in, R rank.
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
from .base import initialiser, require_structure

__all__ = ["olora", "pissa"]

Weight = Callable[[torch.dtype | None], Tensor]


@initialiser()
def pissa(structure: Structure, weight: Weight, stats: None, scale: float, *, iterations: int | None = None) -> None:
    """s B0 A0 = U_R diag(S_R) V_R^T, the best approximation of W at rank R, split evenly: |A0[j]| = |B0[:, j]|.

    PiSSA, Meng et al. 2024, arXiv 2404.02948, eq. 2 and 3: A0 = diag(sqrt(S_R / s)) V_R^T, B0 = U_R diag(sqrt(S_R /
    s)). Ranks beyond those of W, as where R > min(O, I), start as LoRA's do. The largest entry of each row of A0 is
    positive, which fixes the signs.

    Args:
        iterations: of the randomised decomposition; None for the exact one (see `ops.truncated_svd`). Its subspace is
            the same in every run.

    Raises:
        StructureError: another structure than CentredLowRank; a weight that is not finite; iterations that are not a
            whole number of at least 0.
    """
    own = require_structure(structure, CentredLowRank, "pissa")
    if iterations is not None:
        check_count(iterations, "pissa: iterations", 0)
    W = _finite(weight(None), "pissa")
    U, values, Vh = truncated_svd(W, own.rank, iterations)
    noise = torch.finfo(values.dtype).eps * max(W.shape) * values[0]
    seen = int((values > noise).sum())  # a rank with B0 = A0 = 0 would never move
    root = (values[:seen] / abs(scale)).sqrt()
    own.A0[:seen] = root[:, None] * Vh[:seen]
    own.B0[:, :seen] = math.copysign(1, scale) * root * U[:, :seen]


@initialiser()
def olora(structure: Structure, weight: Weight, stats: None, scale: float) -> None:
    """B0 = Q[:, :R] and A0 = R[:R] of W = Q R, with orthonormal columns of Q and an upper triangular R >= 0 on its
    diagonal.

    OLoRA, Buyukakyuz 2024, arXiv 2406.01775, section 3. The first R columns of Q come from the first R columns of W
    alone, so nothing larger is decomposed. As published, what trains is s times that part of W, all of it only with
    s = 1. Ranks beyond min(O, I) start as LoRA's do.

    Raises:
        StructureError: another structure than CentredLowRank; a weight that is not finite.
    """
    own = require_structure(structure, CentredLowRank, "olora")
    W = _finite(weight(None), "olora")
    count = min(own.rank, *W.shape)
    W = W.to(own.A0)
    Q, R = torch.linalg.qr(W[:, :count].double())
    Q = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
    own.B0[:, :count] = Q
    own.A0[:count] = Q.to(W).t() @ W


def _finite(W: Tensor, where: str) -> Tensor:
    if not W.isfinite().all():
        raise StructureError(f"{where}: the weight has entries that are not finite, so it cannot be decomposed")
    return W
