"""Magnitudes of the columns, and of rows and columns together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import LinearMap
from .magnitude import Rescaled, Squares

__all__ = ["BiMagnitude", "ColumnMagnitude"]


class ColumnMagnitude(Rescaled):
    """W' = V diag(m / |V|_column) with V = W + dW, m (I,) trained from m = |W|_column.

    DoRA's decomposition, Liu et al. 2024, arXiv 2402.09353, eq. 5, with one norm per input feature instead of one
    per output feature. Columns whose norm is below `eps` are divided by `eps`.

    The norms of a factored dW need no (O, I) matrix besides W, and a Linear keeps x alone for the backward pass. A
    convolution scales its kernel instead of its input, which costs a second kernel. Dropout, and what is remembered
    without gradients: see `Rescaled`.

    Args:
        detach: hold |V|_column constant in the gradient, as section 4.3 of the paper does. False gives the exact
            gradient of the definition.
        eps: smallest norm divided by.

    Example:
        >>> composition = ColumnMagnitude()
        >>> composition.build(4, 3)
        >>> with torch.no_grad(): _ = composition.magnitude.fill_(2.0)
        >>> [round(n, 3) for n in composition.weight(torch.randn(4, 3), torch.zeros(4, 3)).norm(dim=0).tolist()]
        [2.0, 2.0, 2.0]
    """

    def build(self, out_features: int, in_features: int, **kwargs: Any) -> None:
        self.magnitude = nn.Parameter(torch.empty(in_features, **kwargs))

    @torch.no_grad()
    def init_from(self, base: LinearMap) -> None:
        self.magnitude.copy_(_column_norm(base))

    def weight(self, W: Tensor, dW: Tensor) -> Tensor:
        V = W + dW
        norm = torch.linalg.vector_norm(V, dim=0).clamp_min(self.eps)
        return V * (self.magnitude.to(V.dtype) / (norm.detach() if self.detach else norm))

    def scales(self, V: Squares) -> tuple[Tensor | None, Tensor | None]:
        ones = torch.ones(V.delta.out_features, device=V.scale.device)
        return None, self.own("magnitude") / self.norm(lambda: V.columns(ones))


class BiMagnitude(Rescaled):
    """W' = diag(d) V diag(e): the rows of V = W + dW get the norms m_row, then the columns the norms m_column.

        H = diag(m_row / |V|_row) V
        W' = H diag(m_column / |H|_column)

    with m_row (O,) and m_column (I,) trained from |W|_row and |W|_column, so that dW = 0 gives W' = W. The columns
    of W' have the norms m_column exactly, its rows do not have the norms m_row, and m_row -> c m_row changes nothing.

    BoRA, Wang et al. 2024, arXiv 2412.06441. This is our reading: the paper's equations were seen only in a port
    (MonadForge), which gives the order, rows first, and holds both norms constant in the gradient. What the authors
    do is not confirmed; `detach=False` gives the exact gradient, which leaves the direction m_row -> c m_row alone.

    For a factored dW both norms come from W, B and A without an (O, I) matrix besides W,

        |H|_column^2 = (W * W)^T d^2 + 2 s rowsum(A^T * (W^T C)) + s^2 rowsum(A^T * (A^T (B^T C))),  C = diag(d^2) B

    in fp32, and a Linear is one product of x * e with W. Norms below `eps` count as `eps`. A convolution scales its
    kernel instead of its input, which costs a second kernel. The output of a bias-free Linear is kept for the
    backward pass: do not overwrite it in place. Dropout, and what is remembered without gradients: see `Rescaled`.

    Args:
        detach: hold |V|_row and |H|_column constant in the gradient. False gives the exact gradient.
        eps: smallest norm divided by.

    Example:
        >>> composition = BiMagnitude()
        >>> composition.build(2, 3)
        >>> W = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
        >>> with torch.no_grad():
        ...     _ = composition.row_magnitude.copy_(W.norm(dim=1)), composition.column_magnitude.copy_(W.norm(dim=0))
        >>> torch.allclose(composition.weight(W, torch.zeros(2, 3)), W)
        True
    """

    def build(self, out_features: int, in_features: int, **kwargs: Any) -> None:
        self.row_magnitude = nn.Parameter(torch.empty(out_features, **kwargs))
        self.column_magnitude = nn.Parameter(torch.empty(in_features, **kwargs))

    @torch.no_grad()
    def init_from(self, base: LinearMap) -> None:
        self.row_magnitude.copy_(base.row_square().sqrt())
        self.column_magnitude.copy_(_column_norm(base))

    def weight(self, W: Tensor, dW: Tensor) -> Tensor:
        V = W + dW
        rows = torch.linalg.vector_norm(V, dim=1).clamp_min(self.eps)
        H = (self.row_magnitude.to(V.dtype) / (rows.detach() if self.detach else rows))[:, None] * V
        columns = torch.linalg.vector_norm(H, dim=0).clamp_min(self.eps)
        return H * (self.column_magnitude.to(V.dtype) / (columns.detach() if self.detach else columns))

    def scales(self, V: Squares) -> tuple[Tensor | None, Tensor | None]:
        d = self.own("row_magnitude") / self.norm(V.rows)
        return d, self.own("column_magnitude") / self.norm(lambda: V.columns(d.square()))


def _column_norm(base: LinearMap) -> Tensor:
    """|W|_column, by the very sums the forward takes, so that dW = 0 gives the bare layer's output bit for bit."""
    W = base.weight()
    return base.square_rmatmul(torch.ones(W.shape[0], device=W.device)).sqrt()
