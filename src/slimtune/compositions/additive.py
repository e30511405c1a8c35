"""W' = W + dW."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops import row_square_after_update
from ..structures import Factored, Structure
from .base import Composition, LinearMap, Thin, joined

__all__ = ["Additive"]


class Additive(Composition):
    """W' = W + dW."""

    def weight(self, W: Tensor, dW: Tensor) -> Tensor:
        return W + dW

    def factors(self, W: Thin, dW: Thin) -> Thin:
        return joined(W, dW)

    def forward(self, x: Any, base: LinearMap, delta: Structure, scale: Tensor, dropout: float) -> Tensor:
        return base.plus(x, delta, scale, dropout)

    def matmul(self, V: Tensor, base: LinearMap, delta: Structure, scale: Tensor) -> Tensor:
        y = base.matmul(V)
        return y + scale.to(y.dtype) * delta.matmul(V).to(y.dtype)

    def row_square(self, base: LinearMap, delta: Structure, scale: Tensor) -> Tensor:
        if not isinstance(delta, Factored):
            return super().row_square(base, delta, scale)
        B, A = delta.factors()
        return row_square_after_update(base.row_square(), base.matmul(A.t()), B, A, scale)
