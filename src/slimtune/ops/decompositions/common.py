"""What the decompositions share: checks, drawn starts, and rows of weighted least squares problems.

Shapes: A (*, M, N), K inner size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import StructureError

__all__ = [
    "check_whole",
    "checked",
    "drawn",
    "narrowed",
    "settled",
    "shared_rows",
    "square",
    "weighted_rows",
    "weights_of",
]

CHUNK = 2**24  # numbers of a temporary


def check_whole(value: object, what: str, least: int = 1, most: int | None = None) -> None:
    """Raise StructureError unless `value` is a whole number from `least` to `most`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise StructureError(f"{what} must be a whole number {span}, got {value!r}")


def check_least(value: float, what: str, least: float = 0.0) -> None:
    """Raise StructureError unless `value` is a finite number of at least `least`."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= least):
        raise StructureError(f"{what} must be a number of at least {least:g}, got {value!r}")


def checked(A: Tensor, where: str, dims: int | None = None) -> Tensor:
    """A in fp64.

    Raises:
        StructureError: no matrix or batch of them (exactly `dims` dimensions where given), an empty, complex or
            integer one, or numbers that are not finite.
    """
    if A.dim() < 2 or (dims is not None and A.dim() != dims):
        asked = "a matrix" if dims == 2 else "a matrix or a batch of them"
        raise StructureError(f"{where}: expected {asked}, got the shape {tuple(A.shape)}")
    if not A.is_floating_point() or A.numel() == 0:
        raise StructureError(f"{where}: expected real numbers, got {tuple(A.shape)} of {A.dtype}")
    wide = A.detach().double()
    if not bool(torch.isfinite(wide).all()):
        raise StructureError(f"{where}: some entries are not finite")
    return wide


def narrowed(result: Tensor, like: Tensor) -> Tensor:
    """In the dtype of `like`, or fp32 if that is narrower."""
    return result.to(torch.promote_types(like.dtype, torch.float32)).contiguous()


def weights_of(weights: Tensor | None, A: Tensor, where: str) -> Tensor | None:
    """Weights of entries in fp64, of A's shape.

    Raises:
        StructureError: a shape that does not broadcast to A's, or a weight that is negative or not finite.
    """
    if weights is None:
        return None
    try:
        wide = weights.detach().to(A.device, torch.float64).expand(A.shape)
    except RuntimeError:
        shapes = f"{tuple(weights.shape)} for a matrix of {tuple(A.shape)}"
        raise StructureError(f"{where}: weights of shape {shapes}") from None
    if not bool(((wide >= 0) & torch.isfinite(wide)).all()):
        raise StructureError(f"{where}: weights must be finite and not negative")
    return wide


def drawn(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, 1), drawn on the CPU."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(like)


def square(X: Tensor) -> Tensor:
    """|X|_F^2, (*)."""
    return X.square().sum((-2, -1))


def settled(trace: list[Tensor], half_steps: int, scale: Tensor, tolerance: float) -> bool:
    """Whether the last sweep of so many half-steps lowered the objective by at most tolerance * scale everywhere."""
    if len(trace) <= half_steps:
        return False
    return bool((trace[-1 - half_steps] - trace[-1] <= tolerance * scale).all())


def shared_rows(D: Tensor, T: Tensor, ridge: float) -> Tensor:
    """C (*, M, K), the smallest argmin_C |C D - T|^2 + ridge |C|^2 for D (*, K, N), T (*, M, N)."""
    U, s, Vh = torch.linalg.svd(D, full_matrices=False)
    floor = s[..., :1] * (max(D.shape[-2:]) * torch.finfo(s.dtype).eps)
    gain = torch.where(s > floor, s / (s.square() + ridge), 0.0)
    return ((T @ Vh.mT) * gain[..., None, :]) @ U.mT


def weighted_rows(D: Tensor, P: Tensor, T: Tensor, ridge: float) -> Tensor:
    """C (*, M, K): row c_m = (D diag(p_m) D^T + ridge I)^-1 D t_m, for D (*, K, N), P (*, M, N), T (*, M, N).

    With p = o h^2 and t = o h a it minimises sum_n o_n (h_n (c D)_n - a_n)^2 + ridge |c|^2. The smallest
    solution is taken where the system is singular.
    """
    K, N = D.shape[-2:]
    rhs = T @ D.mT
    rows = max(1, CHUNK // (K * K))
    return torch.cat(
        [_solved(_grams(D, p, K, N), r, ridge) for p, r in zip(P.split(rows, -2), rhs.split(rows, -2), strict=True)], -2
    )


def _grams(D: Tensor, P: Tensor, K: int, N: int) -> Tensor:
    """(*, M, K, K): D diag(p_m) D^T, as products with the columns' own products, a few rows of D at a time."""
    some = max(1, CHUNK // (K * N))
    parts = []
    for d in D.split(some, -2):
        pairs = (d[..., :, None, :] * D[..., None, :, :]).flatten(-3, -2)  # (*, k K, N)
        parts.append((P @ pairs.mT).unflatten(-1, (d.shape[-2], K)))
    return torch.cat(parts, -2)


def _solved(G: Tensor, rhs: Tensor, ridge: float) -> Tensor:
    if ridge:
        G.diagonal(dim1=-2, dim2=-1).add_(ridge)
    L, info = torch.linalg.cholesky_ex(G)
    d = L.diagonal(dim1=-2, dim2=-1)
    sound = (info == 0) & (d.amin(-1) > 1e-7 * d.amax(-1))
    if bool(sound.all()):
        return torch.cholesky_solve(rhs[..., None], L)[..., 0]
    bad = ~sound
    L = torch.where(bad[..., None, None], torch.eye(L.shape[-1]).to(L), L)
    C = torch.cholesky_solve(rhs[..., None], L)[..., 0]
    values, Q = torch.linalg.eigh(G[bad])
    floor = values[:, -1:].clamp_min(0) * (G.shape[-1] * torch.finfo(G.dtype).eps)
    kept = values > floor
    inverse = torch.where(kept, 1 / torch.where(kept, values, torch.ones_like(values)), 0.0)
    C[bad] = ((rhs[bad][:, None] @ Q) * inverse[:, None] @ Q.mT)[:, 0]
    return C
