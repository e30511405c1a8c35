"""Non-negative matrix factorisation.

Shapes: A (*, M, N), K inner size, W (*, M, K), Z (*, K, N).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import StructureError
from .common import check_whole, checked, narrowed, settled, square
from .leastsquares import Factorization

__all__ = ["nmf"]


@torch.no_grad()
def nmf(
    A: Tensor,  # (*, M, N)
    rank: int,
    start: tuple[Tensor, Tensor] | None = None,
    sweeps: int = 2000,
    tolerance: float = 1e-7,
    seed: int = 0,
) -> Factorization:
    """Minimise |W Z - A|_F^2 over W >= 0, Z >= 0 for A >= 0, by the multiplicative rule of Lee and Seung 2001:
    Z <- Z * (W^T A) / (W^T W Z), then W <- W * (A Z^T) / (W Z Z^T), entry by entry.

    The objective never rises, from half-step to half-step. Entries that reach zero stay there. A half-step costs
    M N K + (M + N) K^2 multiply-adds. Weights of networks have both signs, so it replaces none of them.

    Args:
        start: (W, Z) with positive entries; drawn from U(0, 1) sqrt(mean(A) / K) when None.
        sweeps: at most, of two half-steps each.
        tolerance: stop after a sweep that lowers the objective by no more than this share of |A|_F^2.
        seed: of the start.

    Returns:
        W, Z; the objective after each half-step.

    Raises:
        StructureError: negative entries in A or the start, a start of another shape, a rank that is not a whole number
            from 1 to max(M, N).

    Example:
        >>> A = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
        >>> found = nmf(A, 1)
        >>> torch.allclose(found.dense(), A, atol=1e-4), bool((found.left >= 0).all())
        (True, True)
    """
    X = checked(A, "nmf")
    M, N = X.shape[-2:]
    check_whole(rank, "nmf: rank", 1, max(M, N))
    check_whole(sweeps, "nmf: sweeps")
    if bool((X < 0).any()):
        raise StructureError(f"nmf: A must not have negative entries; its least is {float(X.min()):.3g}")
    shapes = ((*X.shape[:-1], rank), (*X.shape[:-2], rank, N))
    if start is None:
        g = torch.Generator().manual_seed(seed)
        size = (X.mean((-2, -1), keepdim=True) / rank).sqrt()
        W, Z = (size * torch.rand(*shape, generator=g, dtype=torch.float64).to(X) for shape in shapes)
    else:
        W, Z = (checked(t, "nmf: the start").to(X.device) for t in start)
        if (tuple(W.shape), tuple(Z.shape)) != shapes or bool((W < 0).any()) or bool((Z < 0).any()):
            raise StructureError(f"nmf: the start must be non-negative and of the shapes {shapes[0]} and {shapes[1]}")
    least = torch.finfo(torch.float64).tiny
    trace: list[Tensor] = []
    scale, done = square(X).clamp_min(1e-300), False
    for _ in range(sweeps):
        Z = Z * (W.mT @ X) / (W.mT @ W @ Z).clamp_min(least)
        trace.append(square(W @ Z - X))
        W = W * (X @ Z.mT) / (W @ (Z @ Z.mT)).clamp_min(least)
        trace.append(square(W @ Z - X))
        done = settled(trace, 2, scale, tolerance)
        if done:
            break
    return Factorization(narrowed(W, A), narrowed(Z, A), torch.stack(trace), done)
