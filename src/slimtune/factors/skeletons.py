"""Factors by a weight's own rows and columns.

Shapes: O out, I in, R rank, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import StructureError
from ..ops.decompositions import cur as decomposed
from ..ops.decompositions import pivoted_qr, strong_qr
from ..ops.svd import truncated_svd
from ..structures import Interpolative
from .base import Part, Replacement, factors, in_form, matrices, thin, thin_sizes

__all__ = ["cur", "interpolative", "qr"]


def _check_bound(bound: float, what: str) -> None:
    if not bound >= 1:
        raise StructureError(f"{what}: bound must be at least 1, got {bound!r}")


@factors
@dataclass(frozen=True)
class cur:
    """W' = C U R of R columns and rows of W itself: B = C keeps these columns, A = U R: `ops.decompositions.cur`.

    One rank takes O + I numbers, as `svd`, whose error is never larger: for factors that stay entries of W.

    Args:
        project: the best core U for these columns and rows; else the inverse of their common entries.
        form: of convolutions, as `svd`.
        bound: f of the strong rank-revealing QR that chooses them.

    Raises:
        StructureError: an unknown form, a bound below 1.

    Example:
        >>> part = Part("layer", torch.randn(6, 8))
        >>> B = cur()(part, 2).structure.B
        >>> bool((part.W.T == B[:, 0]).all(1).any())
        True
    """

    project: bool = True
    form: str = "channel"
    bound: float = 2.0

    def __post_init__(self) -> None:
        _check_bound(self.bound, "cur")
        in_form(Part("", torch.zeros(1, 1)), self.form)

    def __call__(self, part: Part, rank: int) -> Replacement:
        M = matrices(part, self.form)
        found = decomposed(M, min(rank, *M.shape[1:]), self.project, self.bound)
        return Replacement(thin(part, found.C, found.U @ found.R, self.form))

    def sizes(self, part: Part) -> tuple[float, int]:
        return thin_sizes(part, self.form)


@factors
@dataclass(frozen=True)
class interpolative:
    """W' of rank R by R of its own rows (or columns) and the coefficients of the others: the structure `Interpolative`
    with R (O + I - R) numbers, smaller than W at every R < min(O, I).

    Args:
        nearest: True takes rows of the nearest matrix of rank R, whose error is that of `svd`, in fewer numbers and
            multiply-adds than B A (Zhao et al. 2025, arXiv 2501.19090); False takes rows of W itself, which stay as
            they are (`ops.decompositions.interpolative`).
        side: "rows" or "columns".
        iterations: of the singular value decomposition: None for the exact one, else power iterations.
        bound: f of the strong rank-revealing QR that chooses, and the largest coefficient.

    Raises:
        StructureError: another side, a bound below 1.

    Example:
        >>> part = Part("layer", torch.randn(6, 8))
        >>> structure = interpolative(nearest=False)(part, 3).structure
        >>> torch.equal(structure.dense()[structure.order[0]], part.W[structure.order[0]])
        True
    """

    nearest: bool = True
    side: str = "rows"
    iterations: int | None = None
    bound: float = 2.0

    def __post_init__(self) -> None:
        _check_bound(self.bound, "interpolative")
        Interpolative(1, 1, rank=1, side=self.side)

    def __call__(self, part: Part, rank: int) -> Replacement:
        W = part.W
        rank = min(rank, *W.shape)
        if self.nearest:
            U, s, Vh = truncated_svd(W, rank, self.iterations)
            W = (U * s) @ Vh
        across = W.t() if self.side == "rows" else W
        found = strong_qr(across, rank, self.bound)
        structure = Interpolative(*W.shape, rank=rank, side=self.side, device=W.device, dtype=W.dtype)
        T = found.coefficients()[:, found.order[rank:]]
        S = across[:, found.order[:rank]]
        with torch.no_grad():
            structure.S.copy_(S.t() if self.side == "rows" else S)
            structure.T.copy_(T.t() if self.side == "rows" else T)
            structure.order.copy_(found.order)
        return Replacement(structure)

    def sizes(self, part: Part) -> tuple[float, int]:
        """(O + I, min(O, I) - 1): the numbers of R ranks are R (O + I - R), so R (O + I) is a bound."""
        return sum(part.W.shape), min(part.W.shape) - 1


@factors
@dataclass(frozen=True)
class qr:
    """W' = Q R P^T by pivoted QR cut at rank R: B = Q with orthonormal columns, A = R P^T:
    `ops.decompositions.pivoted_qr`, or `strong_qr` with a bound.

    One rank takes O + I numbers, as `svd`, whose error is never larger. A truncated QLP has the same error as plain
    pivoting and is not offered.

    Args:
        bound: f of the strong form; None for plain pivoting.
        form: of convolutions, as `svd`.

    Raises:
        StructureError: an unknown form, a bound below 1.

    Example:
        >>> part = Part("layer", torch.randn(6, 8))
        >>> B = qr()(part, 2).structure.B
        >>> torch.allclose(B.T @ B, torch.eye(2), atol=1e-6)
        True
    """

    bound: float | None = None
    form: str = "channel"

    def __post_init__(self) -> None:
        _check_bound(1 if self.bound is None else self.bound, "qr")
        in_form(Part("", torch.zeros(1, 1)), self.form)

    def __call__(self, part: Part, rank: int) -> Replacement:
        M = matrices(part, self.form)
        rank = min(rank, *M.shape[1:])
        found = pivoted_qr(M, rank) if self.bound is None else strong_qr(M, rank, self.bound)
        places = found.order.argsort(-1)[:, None].expand(found.R.shape)
        return Replacement(thin(part, found.Q, torch.gather(found.R, -1, places), self.form))

    def sizes(self, part: Part) -> tuple[float, int]:
        return thin_sizes(part, self.form)
