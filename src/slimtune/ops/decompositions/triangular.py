"""Pivoted QR, its strong rank-revealing form, and Stewart's QLP (a UTV decomposition).

Shapes: A (*, M, N), K columns chosen.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import StructureError
from .common import check_whole, checked, narrowed, square

__all__ = ["PivotedQR", "Triangular", "pivoted_qr", "qlp", "strong_qr"]


class PivotedQR(NamedTuple):
    """A[:, order] ~ Q R."""

    Q: Tensor  # (*, M, K), orthonormal columns
    R: Tensor  # (*, K, N), upper trapezoidal with a diagonal >= 0
    order: Tensor  # (*, N), a permutation; the first K are the chosen columns
    trace: Tensor  # (S, *)
    converged: bool

    def dense(self) -> Tensor:
        """Q R with the columns of A in their places, (*, M, N)."""
        return torch.gather(self.Q @ self.R, -1, _like_rows(self.order.argsort(-1), self.Q.shape[-2]))

    def coefficients(self) -> Tensor:
        """T (*, K, N) with A ~ A[:, order[:K]] T: [I, R11^-1 R12] with its columns in their places."""
        K = self.R.shape[-2]
        T = torch.cat([torch.eye(K).to(self.R).expand(*self.R.shape[:-1], K), _solved(self.R, K)], -1)
        return torch.gather(T, -1, _like_rows(self.order.argsort(-1), K))


class Triangular(NamedTuple):
    """A ~ U T V^T."""

    U: Tensor  # (*, M, K), orthonormal columns
    T: Tensor  # (*, K, K), lower triangular with a diagonal >= 0
    V: Tensor  # (*, N, K), orthonormal columns
    trace: Tensor  # (S, *)
    converged: bool

    def dense(self) -> Tensor:
        """U T V^T, (*, M, N)."""
        return self.U @ self.T @ self.V.mT


def _like_rows(order: Tensor, M: int) -> Tensor:
    return order[..., None, :].expand(*order.shape[:-1], M, order.shape[-1])


def _solved(R: Tensor, K: int) -> Tensor:
    """R11^-1 R12; the smallest solution where R11 is singular."""
    R11, R12 = R[..., :K], R[..., K:]
    d = R11.diagonal(dim1=-2, dim2=-1).abs()
    if bool((d.amin(-1) > K * torch.finfo(d.dtype).eps * d.amax(-1)).all()):
        return torch.linalg.solve_triangular(R11, R12, upper=True)
    return torch.linalg.pinv(R11) @ R12


def _asked(rank: int | None, X: Tensor, where: str) -> int:
    most = min(X.shape[-2:])
    if rank is None:
        return most
    check_whole(rank, f"{where}: rank", 1, most)
    return rank


def _triangle(X: Tensor, order: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """(Q, R) of the reordered columns by Householder's reflections, signs so that the diagonal is not negative."""
    ordered = torch.gather(X, -1, _like_rows(order, X.shape[-2]))
    Q, R = torch.linalg.qr(ordered[..., :K])
    signs = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(R)
    Q = Q * signs[..., None, :]
    return Q, torch.cat([(R * signs[..., None]).triu(), Q.mT @ ordered[..., K:]], -1)


def _greedy(X: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """(order, |residual|_F^2 after each column): each time the column that is farthest from those chosen."""
    E, M = X.clone(), X.shape[-2]
    free = torch.zeros_like(X[..., 0, :])
    chosen, trace = [], []
    for _ in range(K):
        best = (E.square().sum(-2) + free).argmax(-1, keepdim=True)
        chosen.append(best)
        free.scatter_(-1, best, -math.inf)
        q = torch.gather(E, -1, _like_rows(best, M))
        q = q / q.norm(dim=-2, keepdim=True).clamp_min(1e-300)
        E -= q @ (q.mT @ E)
        trace.append(square(E))
    rest = free.argsort(dim=-1, descending=True, stable=True)[..., : X.shape[-1] - K]
    return torch.cat([*chosen, rest], -1), torch.stack(trace)


@torch.no_grad()
def pivoted_qr(A: Tensor, rank: int | None = None) -> PivotedQR:
    """A P = Q R, each next column the one that is farthest from the span of those before (Businger and Golub 1965).

    Cut at K columns the error is |R22|_F. Column norms are taken anew at each step: K passes over A.

    Args:
        rank: K, at most min(M, N), which None takes.

    Returns:
        Q, R, the order of columns; the squared error after each column.

    Raises:
        StructureError: a rank that is not a whole number from 1 to min(M, N).

    Example:
        >>> A = torch.tensor([[1.0, 0.0, 3.0], [0.0, 2.0, 0.0]])
        >>> found = pivoted_qr(A)
        >>> found.order.tolist(), torch.allclose(found.dense(), A)
        ([2, 1, 0], True)
    """
    X = checked(A, "pivoted_qr")
    K = _asked(rank, X, "pivoted_qr")
    order, trace = _greedy(X, K)
    Q, R = _triangle(X, order, K)
    return PivotedQR(narrowed(Q, A), narrowed(R, A), order, trace, True)


@torch.no_grad()
def strong_qr(A: Tensor, rank: int, bound: float = 2.0, swaps: int = 1000) -> PivotedQR:
    """A P = Q R of K columns whose |det R11| no exchange of two columns raises by more than f (Gu and Eisenstat 1996,
    algorithm 4).

    From the order of `pivoted_qr`, columns i <= K and K + j change places while
    rho_ij^2 = (R11^-1 R12)_ij^2 + (|column j of R22| |row i of R11^-1|)^2 exceeds f^2; each exchange multiplies
    |det R11| by rho_ij. At the end s_i(R11) >= s_i(A) / c and s_j(R22) <= s_{K + j}(A) c with
    c = sqrt(1 + f^2 K (N - K)), and no entry of R11^-1 R12 exceeds f. Matrices of a batch are taken one by one.

    Args:
        rank: K.
        bound: f >= 1.
        swaps: at most.

    Returns:
        Q, R, the order of columns; ln |det R11| at the start and after each exchange, which rises (padded with its last
        value in a batch).

    Raises:
        StructureError: a rank that is not a whole number from 1 to min(M, N), a bound below 1.

    Example:
        >>> found = strong_qr(torch.randn(8, 12), 4)
        >>> bool(found.coefficients().abs().max() <= 2.0 + 1e-5), found.converged
        (True, True)
    """
    X = checked(A, "strong_qr")
    K = _asked(rank, X, "strong_qr")
    if not bound >= 1:
        raise StructureError(f"strong_qr: bound must be at least 1, got {bound!r}")
    each = [_strong(x, K, bound, swaps) for x in X.reshape(-1, *X.shape[-2:])]
    order = torch.stack([e[0] for e in each]).view(*X.shape[:-2], -1)
    longest = max(len(e[1]) for e in each)
    trace = X.new_tensor([e[1] + e[1][-1:] * (longest - len(e[1])) for e in each]).t().reshape(-1, *X.shape[:-2])
    Q, R = _triangle(X, order, K)
    return PivotedQR(narrowed(Q, A), narrowed(R, A), order, trace, all(e[2] for e in each))


def _strong(X: Tensor, K: int, bound: float, swaps: int) -> tuple[Tensor, list[float], bool]:
    order = _greedy(X, K)[0]
    trace: list[float] = []
    while True:
        Q, R = _triangle(X, order, K)
        d = R.diagonal()[:K]
        trace.append(float(d.log().sum()))
        if X.shape[1] == K or not bool(d.min() > X.shape[1] * torch.finfo(d.dtype).eps * d.max()):
            return order, trace, True  # nothing to exchange, or the rank of A is below K
        inverse = torch.linalg.solve_triangular(R[:, :K], torch.eye(K).to(R), upper=True)
        left = (X[:, order[K:]] - Q @ R[:, K:]).norm(dim=0)
        rho = ((inverse @ R[:, K:]).square() + (inverse.norm(dim=1)[:, None] * left).square()).sqrt()
        if bool(rho.max() <= bound * (1 + 1e-9)):
            return order, trace, True
        if len(trace) > swaps:
            return order, trace, False
        i, j = divmod(int(rho.argmax()), rho.shape[1])
        order[[i, K + j]] = order[[K + j, i]]


@torch.no_grad()
def qlp(A: Tensor, rank: int | None = None) -> Triangular:
    """A ~ U L V^T with L lower triangular, a UTV decomposition: pivoted QR of A, then of R^T (Stewart 1999).

    The diagonal of L follows the singular values more closely than that of R, at the cost of two QR decompositions.
    The error is that of `pivoted_qr` at the same rank.

    Args:
        rank: K, at most min(M, N), which None takes.

    Returns:
        U, L, V; the squared error with 1 to K columns.

    Raises:
        StructureError: a rank that is not a whole number from 1 to min(M, N).

    Example:
        >>> A = torch.randn(5, 7)
        >>> found = qlp(A)
        >>> torch.allclose(found.dense(), A, atol=1e-5), bool((found.T.triu(1) == 0).all())
        (True, True)
    """
    X = checked(A, "qlp")
    K = _asked(rank, X, "qlp")
    first, trace = _greedy(X, K)
    Q, R = _triangle(X, first, K)
    second, _ = _greedy(R.mT, K)
    Q2, R2 = _triangle(R.mT, second, K)
    U = torch.gather(Q, -1, _like_rows(second, Q.shape[-2]))
    V = torch.gather(Q2, -2, first.argsort(-1)[..., None].expand(Q2.shape))
    return Triangular(narrowed(U, A), narrowed(R2.mT, A), narrowed(V, A), trace, True)
