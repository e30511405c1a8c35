"""Khatri-Rao products: Kronecker products column by column.

Shapes: A (*, M, N), M = n_1 n_2 ... n_k, K terms, factors (*, K, n_j, N).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import StructureError
from .common import check_whole, checked, narrowed, settled

__all__ = ["KhatriRaoFactors", "khatri_rao_als", "khatri_rao_svd"]


class KhatriRaoFactors(NamedTuple):
    """A ~ sum_t F_1t kr F_2t kr ... F_kt: column n is sum_t f_1tn (x) f_2tn (x) ...."""

    factors: tuple[Tensor, ...]  # (*, K, n_j, N) each
    trace: Tensor  # (S, *)
    converged: bool

    def dense(self) -> Tensor:
        """(*, M, N); the first factor's index is slowest."""
        product, *rest = self.factors
        for F in rest:
            product = (product[..., :, None, :] * F[..., None, :, :]).flatten(-3, -2)
        return product.sum(-3)


def _sized(M: int, sizes: Sequence[int], where: str) -> None:
    for n in sizes:
        check_whole(n, f"{where}: a size")
    if len(sizes) < 2 or math.prod(sizes) != M:
        raise StructureError(f"{where}: sizes must be two or more with the product {M}, got {list(sizes)}")


@torch.no_grad()
def khatri_rao_svd(A: Tensor, sizes: Sequence[int], rank: int = 1) -> KhatriRaoFactors:
    """The nearest sum of K Khatri-Rao products of two factors: of every column, as X_n (I, J), the K leading singular
    triplets, each split evenly.

    The squared error is sum_n sum_{j > K} s_j(X_n)^2, the global minimum. K terms have K N (I + J) numbers.

    Args:
        sizes: (I, J) with I J = M.
        rank: K.

    Returns:
        The factors; the squared error with 1 to K terms.

    Raises:
        StructureError: sizes whose product is not M, or not two; K that is not from 1 to min(I, J).

    Example:
        >>> B, C = torch.randn(3, 5), torch.randn(2, 5)
        >>> A = (B[:, None] * C).flatten(0, 1)
        >>> torch.allclose(khatri_rao_svd(A, (3, 2)).dense(), A, atol=1e-5)
        True
    """
    X = checked(A, "khatri_rao_svd")
    _sized(X.shape[-2], sizes, "khatri_rao_svd")
    if len(sizes) > 2:
        raise StructureError(f"khatri_rao_svd: two sizes, got {list(sizes)}; khatri_rao_als takes more")
    check_whole(rank, "khatri_rao_svd: rank", 1, min(sizes))
    U, s, Vh = torch.linalg.svd(X.mT.unflatten(-1, tuple(sizes)), full_matrices=False)  # (*, N, I, J)
    root = s[..., :rank].sqrt()
    B = (U[..., :rank] * root[..., None, :]).movedim(-1, -3).mT  # (*, K, I, N)
    C = (root[..., None] * Vh[..., :rank, :]).movedim(-2, -3).mT
    tails = s.square().flip(-1).cumsum(-1).flip(-1)  # of j >= 0, 1, ...
    tails = torch.cat([tails, tails.new_zeros(*tails.shape[:-1], 1)], -1)[..., 1 : rank + 1].sum(-2)
    return KhatriRaoFactors((narrowed(B, A), narrowed(C, A)), tails.movedim(-1, 0), True)


@torch.no_grad()
def khatri_rao_als(
    A: Tensor, sizes: Sequence[int], sweeps: int = 200, tolerance: float = 1e-12, seed: int | None = None
) -> KhatriRaoFactors:
    """One Khatri-Rao product of two or more factors: each column's best product of vectors, by alternating least
    squares: f_j <- <X_n, (x)_{i != j} f_i> / prod_{i != j} |f_i|^2.

    The objective |A - F_1 kr F_2 ...|_F^2 never rises, from factor to factor. With two factors the limit is that of
    `khatri_rao_svd`; with more it is a local minimum.

    Args:
        sizes: n_1, n_2, ... with the product M.
        sweeps: at most, of one half-step a factor.
        tolerance: stop after a sweep that lowers the objective by no more than this share of |A|_F^2.
        seed: of a random start; None starts from the leading singular vector of each unfolding of every column.

    Returns:
        The factors, K = 1; the objective after each half-step.

    Raises:
        StructureError: sizes whose product is not M.

    Example:
        >>> found = khatri_rao_als(torch.randn(12, 5), (2, 3, 2))
        >>> [tuple(F.shape) for F in found.factors], bool(found.trace.diff().max() < 1e-12)
        ([(1, 2, 5), (1, 3, 5), (1, 2, 5)], True)
    """
    X = checked(A, "khatri_rao_als")
    _sized(X.shape[-2], sizes, "khatri_rao_als")
    check_whole(sweeps, "khatri_rao_als: sweeps")
    T = X.mT.unflatten(-1, tuple(sizes))  # (*, N, n_1, ..., n_k)
    k = len(sizes)
    unfolded = [T.movedim(j - k, -k).flatten(-k + 1) for j in range(k)]  # (*, N, n_j, rest)
    if seed is None:
        vectors = [torch.linalg.eigh(u @ u.mT)[1][..., -1] for u in unfolded]
    else:
        g = torch.Generator().manual_seed(seed)
        vectors = [torch.randn(*u.shape[:-1], generator=g, dtype=torch.float64).to(X) for u in unfolded]
    whole = X.square().sum((-2, -1))
    trace: list[Tensor] = []
    done = False
    for _ in range(sweeps):
        for j in range(k):
            others = _outer([v for i, v in enumerate(vectors) if i != j])  # (*, N, rest)
            size = others.square().sum(-1, keepdim=True)
            own = (unfolded[j] @ others[..., None])[..., 0]
            vectors[j] = torch.where(size > 0, own / size.clamp_min(1e-300), 0.0)
            trace.append((_outer(vectors) - X.mT).square().sum((-2, -1)))
        done = settled(trace, k, whole.clamp_min(1e-300), tolerance)
        if done:
            break
    even = torch.stack([v.norm(dim=-1) for v in vectors])
    mean = even.clamp_min(1e-300).log().mean(0).exp()
    factors = tuple(
        narrowed((v * (mean / n.clamp_min(1e-300))[..., None]).mT.unsqueeze(-3), A)
        for v, n in zip(vectors, even, strict=True)
    )
    return KhatriRaoFactors(factors, torch.stack(trace), done)


def _outer(vectors: Sequence[Tensor]) -> Tensor:
    """(*, n_1), (*, n_2), ... to (*, n_1 n_2 ...)."""
    product, *rest = vectors
    for v in rest:
        product = (product[..., :, None] * v[..., None, :]).flatten(-2)
    return product
