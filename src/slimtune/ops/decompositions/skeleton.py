"""Approximations by a matrix's own columns and rows.

Shapes: A (*, M, N), K chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .common import checked, narrowed, square
from .triangular import strong_qr

__all__ = ["CUR", "Interpolation", "cur", "interpolative"]


class Interpolation(NamedTuple):
    """A ~ C T with C = A[:, columns] and T[:, columns] = I."""

    C: Tensor  # (*, M, K)
    T: Tensor  # (*, K, N)
    columns: Tensor  # (*, K)
    trace: Tensor  # (1, *)
    converged: bool

    def dense(self) -> Tensor:
        """C T, (*, M, N)."""
        return self.C @ self.T


class CUR(NamedTuple):
    """A ~ C U R with C = A[:, columns] and R = A[rows]."""

    C: Tensor  # (*, M, K)
    U: Tensor  # (*, K, K)
    R: Tensor  # (*, K, N)
    rows: Tensor  # (*, K)
    columns: Tensor  # (*, K)
    trace: Tensor  # (1, *)
    converged: bool

    def dense(self) -> Tensor:
        """C U R, (*, M, N)."""
        return self.C @ self.U @ self.R


@torch.no_grad()
def interpolative(A: Tensor, rank: int, bound: float = 2.0) -> Interpolation:
    """A ~ A[:, J] T: J the columns of `strong_qr`, T = [I, R11^-1 R12] P^T (Cheng, Gimbutas, Martinsson and Rokhlin
    2005). Exact where rank(A) <= K; no entry of T exceeds `bound`.

    The transposed matrix's gives rows. The numbers needed are those of C and T without its identity, K (M + N - K).

    Args:
        rank: K.
        bound: f of `strong_qr`.

    Returns:
        C, T, J; the squared error.

    Raises:
        StructureError: as `strong_qr`.

    Example:
        >>> found = interpolative(torch.tensor([[1.0, 2.0, 4.0], [2.0, 4.0, 8.0]]), 1)
        >>> found.columns.tolist(), found.T.tolist()
        ([2], [[0.25, 0.5, 1.0]])
    """
    X = checked(A, "interpolative")
    found = strong_qr(X, rank, bound)
    columns = found.order[..., :rank]
    C, T = _taken(X, columns), found.coefficients()
    return Interpolation(narrowed(C, A), narrowed(T, A), columns, square(X - C @ T)[None], found.converged)


@torch.no_grad()
def cur(A: Tensor, rank: int, project: bool = True, bound: float = 2.0) -> CUR:
    """A ~ C U R: columns by `strong_qr` of A, rows by that of C^T.

    Args:
        rank: K of both.
        project: U = C^+ A R^+, the best core for these columns and rows (Stewart 1999; Mahoney and Drineas 2009); else
            U = A[rows, columns]^-1, the skeleton, which repeats these rows and columns of A exactly and needs no other
            entries of it.
        bound: f of `strong_qr`.

    Returns:
        C, U, R, the rows and columns; the squared error.

    Raises:
        StructureError: as `strong_qr`.

    Example:
        >>> A = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0, 2.0]))
        >>> found = cur(A, 1)
        >>> found.rows.tolist(), found.columns.tolist(), torch.allclose(found.dense(), A)
        ([1], [1], True)
    """
    X = checked(A, "cur")
    across = strong_qr(X, rank, bound)
    columns = across.order[..., :rank]
    C = _taken(X, columns)
    down = strong_qr(C.mT, rank, bound)
    rows = down.order[..., :rank]
    R = _taken(X.mT, rows).mT
    inverse = torch.linalg.pinv
    U = inverse(C) @ X @ inverse(R) if project else inverse(_taken(R, columns))
    trace = square(X - C @ U @ R)[None]
    C, U, R = (narrowed(t, A) for t in (C, U, R))
    return CUR(C, U, R, rows, columns, trace, across.converged and down.converged)


def _taken(X: Tensor, columns: Tensor) -> Tensor:
    return torch.gather(X, -1, columns[..., None, :].expand(*X.shape[:-1], columns.shape[-1]))
