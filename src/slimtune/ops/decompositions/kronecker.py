"""Sums of Kronecker products.

Shapes: A (*, M, N), M = p c, N = q d, K terms, left (*, K, p, q), right (*, K, c, d).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import StructureError
from ..svd import truncated_svd
from .common import check_whole, checked, narrowed, square
from .leastsquares import als

__all__ = ["KroneckerFactors", "kronecker_als", "kronecker_arrangement", "kronecker_svd"]


class KroneckerFactors(NamedTuple):
    """A ~ sum_k left_k (x) right_k."""

    left: Tensor  # (*, K, p, q)
    right: Tensor  # (*, K, c, d)
    trace: Tensor  # (S, *)
    converged: bool

    def dense(self) -> Tensor:
        """sum_k left_k (x) right_k, (*, M, N)."""
        return torch.einsum("...kpq,...kcd->...pcqd", self.left, self.right).flatten(-4, -3).flatten(-2)


def kronecker_arrangement(A: Tensor, left: Sequence[int]) -> Tensor:
    """R(A) (*, p q, c d), whose row (i, j) is the block A_ij (c, d): |A - B (x) C|_F = |R(A) - vec(B) vec(C)^T|_F.

    Van Loan and Pitsianis 1993.

    Raises:
        StructureError: p and q that do not divide M and N.

    Example:
        >>> B, C = torch.randn(2, 3), torch.randn(4, 2)
        >>> torch.equal(kronecker_arrangement(torch.kron(B, C), (2, 3)), torch.outer(B.flatten(), C.flatten()))
        True
    """
    M, N = A.shape[-2:]
    if len(left) != 2:
        raise StructureError(f"kronecker: left must be two whole numbers, got {left!r}")
    for size, whole, side in zip(left, (M, N), ("rows", "columns"), strict=True):
        check_whole(size, f"kronecker: the {side} of left")
        if whole % size:
            raise StructureError(f"kronecker: {size} {side} of left do not divide {whole}")
    p, q = left
    return A.unflatten(-1, (q, N // q)).unflatten(-3, (p, M // p)).movedim(-3, -2).flatten(-4, -3).flatten(-2)


def _terms(B: Tensor, C: Tensor, A: Tensor, left: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Vectors (*, p q, K) and (*, K, c d) as matrices."""
    (M, N), (p, q) = A.shape[-2:], left
    return narrowed(B.mT.unflatten(-1, (p, q)), A), narrowed(C.unflatten(-1, (M // p, N // q)), A)


@torch.no_grad()
def kronecker_svd(A: Tensor, left: Sequence[int], rank: int = 1, iterations: int | None = None) -> KroneckerFactors:
    """The nearest sum of K Kronecker products: the K leading singular triplets of R(A), each split evenly.

    |A - sum_k B_k (x) C_k|_F^2 = sum_{j > K} s_j(R(A))^2, the global minimum (Van Loan and Pitsianis 1993). K terms
    have K (p q + c d) numbers. At K = min(p q, c d) it is A.

    Args:
        left: (p, q), dividing M and N.
        rank: K.
        iterations: as in `truncated_svd`: None for the exact decomposition.

    Returns:
        B, C; the squared error with 1 to K terms (that of the triplets found).

    Raises:
        StructureError: sizes that do not divide, K that is not from 1 to min(p q, c d).

    Example:
        >>> A = torch.kron(torch.eye(2), torch.tensor([[1.0, 2.0]]))
        >>> (kronecker_svd(A, (2, 2)).dense() - A).abs().max().item() < 1e-6
        True
    """
    X = checked(A, "kronecker_svd")
    R = kronecker_arrangement(X, left)
    check_whole(rank, "kronecker_svd: rank", 1, min(R.shape[-2:]))
    flat = R.reshape(-1, *R.shape[-2:])
    U, s, Vh = (torch.stack(t) for t in zip(*(truncated_svd(r, rank, iterations) for r in flat), strict=True))
    root = s.sqrt()
    B, C = (U * root[:, None]).view(*R.shape[:-1], -1), (root[..., None] * Vh).view(*R.shape[:-2], -1, R.shape[-1])
    trace = (square(flat)[:, None] - s.square().cumsum(1)).clamp_min(0).t().reshape(-1, *R.shape[:-2])
    return KroneckerFactors(*_terms(B, C, A, left), trace, True)


@torch.no_grad()
def kronecker_als(
    A: Tensor, left: Sequence[int], rank: int = 1, sweeps: int = 200, tolerance: float = 1e-12, seed: int = 0
) -> KroneckerFactors:
    """The same minimum by alternating least squares: for one term C = sum_ij b_ij A_ij / |B|_F^2 and
    b_ij = <A_ij, C> / |C|_F^2, the power iteration of R(A); for more, `als` of R(A).

    The objective |A - sum_k B_k (x) C_k|_F^2 never rises; the limit is that of `kronecker_svd`, which is exact and
    rarely dearer. Arguments and errors as there and in `als`.

    Example:
        >>> A = torch.randn(6, 6)
        >>> one, other = kronecker_als(A, (2, 3)), kronecker_svd(A, (2, 3))
        >>> torch.allclose(one.trace[-1], other.trace[-1], rtol=1e-4)
        True
    """
    R = kronecker_arrangement(checked(A, "kronecker_als"), left)
    check_whole(rank, "kronecker_als: rank", 1, min(R.shape[-2:]))
    found = als(R, rank, sweeps=sweeps, tolerance=tolerance, seed=seed)
    return KroneckerFactors(*_terms(found.left, found.right, A, left), found.trace, found.converged)
