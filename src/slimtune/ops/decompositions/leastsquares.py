"""Alternating least squares: plain, with ridges, with weights or a mask.

Shapes: A (*, M, N), K inner size, W (*, M, K), Z (*, K, N).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import StructureError
from .common import (
    check_least,
    check_whole,
    checked,
    drawn,
    narrowed,
    settled,
    shared_rows,
    square,
    weighted_rows,
    weights_of,
)

__all__ = ["Factorization", "als"]


class Factorization(NamedTuple):
    """A ~ left right."""

    left: Tensor  # (*, M, K)
    right: Tensor  # (*, K, N)
    trace: Tensor  # (S, *)
    converged: bool

    def dense(self) -> Tensor:
        """left right, (*, M, N)."""
        return self.left @ self.right


@torch.no_grad()
def als(
    A: Tensor,  # (*, M, N)
    rank: int,
    ridge: tuple[float, float] = (0.0, 0.0),
    weights: Tensor | None = None,  # (*, M, N)
    start: Tensor | None = None,  # (*, M, K)
    sweeps: int = 200,
    tolerance: float = 1e-10,
    seed: int = 0,
) -> Factorization:
    """Minimise sum_mn o_mn (W Z - A)_mn^2 + l_w |W|_F^2 + l_z |Z|_F^2 by solving for Z, then W, in turn.

    Without weights Z = (W^T W + l_z I)^-1 W^T A and W^T = (Z Z^T + l_w I)^-1 Z A^T; with them every column of Z and row
    of W has a system of its own, z_n = (W^T diag(o_n) W + l_z I)^-1 W^T diag(o_n) a_n. A mask is weights of 0 and 1.
    Without ridge or weights this is subspace iteration: the limit is sum_{j > K} s_j^2, that of Eckart and Young. With
    both ridges and K >= rank(A) it is A's singular values lowered by sqrt(l_w l_z), the proximal point of the nuclear
    norm. With weights only a local minimum is promised. Singular systems take their smallest solution.

    The objective never rises, from half-step to half-step. A half-step costs M N K multiply-adds, with weights M N K^2.

    Args:
        ridge: (l_w, l_z).
        weights: o_mn >= 0 of the entries, broadcast to A; None for ones.
        start: W, drawn from N(0, 1) when None.
        sweeps: at most, of two half-steps each.
        tolerance: stop after a sweep that lowers the objective by no more than this share of sum_mn o_mn a_mn^2.
        seed: of the start.

    Returns:
        W, Z; the objective after each half-step.

    Raises:
        StructureError: a rank that is not a whole number from 1 to max(M, N), weights or a start of another shape,
            negative ridges, entries that are not finite where they count.

    Example:
        >>> A = torch.tensor([[2.0, 4.0, 6.0], [1.0, 2.0, 3.0]])
        >>> mask = torch.tensor([[1, 1, 1], [1, 0, 1]])
        >>> round(als(A * mask, 1, weights=mask).dense()[1, 1].item(), 4)
        2.0
    """
    what = "als"
    o = weights_of(weights, A, what)
    X = checked(A if o is None else torch.where(o > 0, A, torch.zeros_like(A)), what)
    M, N = X.shape[-2:]
    check_whole(rank, f"{what}: rank", 1, max(M, N))
    check_whole(sweeps, f"{what}: sweeps")
    for value in ridge:
        check_least(value, f"{what}: a ridge")
    l_w, l_z = ridge
    W = _start(start, (*X.shape[:-1], rank), X, seed)
    target = X if o is None else o * X

    def rows(D: Tensor, T: Tensor, P: Tensor | None, own: float) -> Tensor:
        return shared_rows(D, T, own) if P is None else weighted_rows(D, P, T, own)

    def objective(W: Tensor, Z: Tensor) -> Tensor:
        E = (W @ Z - X).square()
        return (E if o is None else o * E).sum((-2, -1)) + l_w * square(W) + l_z * square(Z)

    trace: list[Tensor] = []
    scale = (X * target).sum((-2, -1)).clamp_min(1e-300)
    done = False
    for _ in range(sweeps):
        Z = rows(W.mT, target.mT, None if o is None else o.mT, l_z).mT
        trace.append(objective(W, Z))
        W = rows(Z, target, o, l_w)
        trace.append(objective(W, Z))
        done = settled(trace, 2, scale, tolerance)
        if done:
            break
    return Factorization(narrowed(W, A), narrowed(Z, A), torch.stack(trace), done)


def _start(start: Tensor | None, shape: tuple[int, ...], like: Tensor, seed: int) -> Tensor:
    if start is None:
        return drawn(shape, like, torch.Generator().manual_seed(seed))
    if tuple(start.shape) != shape:
        raise StructureError(f"als: a start of shape {tuple(start.shape)}, expected {shape}")
    return start.detach().to(like)
