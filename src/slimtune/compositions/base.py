"""The noun `Composition`: how a change dW meets the linear map below it.

Shapes: O out, I in, R rank, *T batch dims. A linear map is whatever answers the `LinearMap` protocol: a frozen
layer, or such a layer under further adapters; compositions never look behind it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import replayed_dropout, square_rmatmul
from ..structures import Structure

__all__ = ["Composition", "LinearMap", "version"]


Thin = tuple[Tensor, Tensor]
"""(B, A), (O, R) and (R, I)."""


class LinearMap(ABC):
    """x -> W x + bias, W seen as an (O, I) matrix whatever the layer (a convolution's I counts its kernel)."""

    is_matrix: bool
    """Whether the layer itself computes x W^T + bias on the last dimension of x, packed weights included."""

    @abstractmethod
    def __call__(self, x: Any) -> Tensor:
        """W x + bias, in the layer's own layout."""

    @abstractmethod
    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W, (O, I), dequantised if need be, in `dtype` if given."""

    @abstractmethod
    def matmul(self, V: Tensor) -> Tensor:
        """W V for V (I, R). Returns (O, R)."""

    def rmatmul(self, V: Tensor) -> Tensor:
        """W^T V for V (O, R). Returns (I, R)."""
        W = self.weight()
        return W.t() @ V.to(W.dtype)

    @abstractmethod
    def row_square(self) -> Tensor:
        """|W|_row^2, (O,), at least fp32."""

    def square_rmatmul(self, v: Tensor) -> Tensor:
        """(W * W)^T v for v (O,). Returns (I,), at least fp32; v = 1 gives |W|_column^2."""
        return square_rmatmul(self.weight(), v)

    @abstractmethod
    def key(self) -> tuple[Any, ...] | None:
        """Something that differs once `weight()` may have changed; None if that cannot be told."""

    @property
    @abstractmethod
    def bias(self) -> Tensor | None:
        """(O,) or None."""

    @abstractmethod
    def plain(self) -> Tensor | None:
        """W itself if x -> x W^T on the last dimension is all the layer does, else None."""

    @abstractmethod
    def change(self, x: Any, delta: Structure, dropout: float = 0.0) -> Tensor:
        """dW drop(x) in the layer's own layout, no bias."""

    @abstractmethod
    def plus(
        self,
        x: Any,
        delta: Structure,
        scale: Tensor,
        dropout: float = 0.0,
        columns: Tensor | None = None,
        of: LinearMap | None = None,
    ) -> Tensor:
        """W E x + bias + s dW E drop(x), in the layer's own layout, with E = diag(`columns`), (I,); 1 when None.

        W is this map's own, or that of a map `of` on top of it.
        """

    @abstractmethod
    def with_weight(self, x: Any, W: Tensor, bias: Tensor | None) -> Tensor:
        """W x + bias for another W (O, I), in the layer's own layout."""

    @abstractmethod
    def rows(self, v: Tensor) -> Tensor:
        """v (O,), viewed so that it broadcasts against the layer's output."""


class Composition(nn.Module, ABC):
    """A function from (linear map, dW) to a linear map. Subclasses are final and take keyword options."""

    @abstractmethod
    def weight(self, W: Tensor, dW: Tensor) -> Tensor:
        """The effective weight, (O, I) from (O, I) and the scaled change (O, I): the definition."""

    def forward(self, x: Any, base: LinearMap, delta: Structure, scale: Tensor, dropout: float) -> Tensor:
        """The layer's output. `dropout` > 0 drops entries of the input on the branch of the change only.

        Override to avoid building W.
        """
        new = self.effective(base, delta, scale)
        if not dropout:
            return base.with_weight(x, new, base.bias)
        change = new - base.weight().to(new.dtype)
        return base(x) + replayed_dropout(lambda z: base.with_weight(z, change, None), x, dropout)

    def build(self, out_features: int, in_features: int, **kwargs: Any) -> None:
        """Allocate own parameters on `device` in `dtype`; most compositions have none."""

    @torch.no_grad()
    def init_from(self, base: LinearMap) -> None:
        """Fill own parameters from the map below, so that dW = 0 leaves it unchanged."""

    def matmul(self, V: Tensor, base: LinearMap, delta: Structure, scale: Tensor) -> Tensor:
        """W' V for V (I, R), for a composition stacked on top of this one. Override to avoid building W'."""
        W = self.effective(base, delta, scale)
        return W @ V.to(W.dtype)

    def row_square(self, base: LinearMap, delta: Structure, scale: Tensor) -> Tensor:
        """|W'|_row^2, (O,), likewise."""
        return square_of_rows(self.effective(base, delta, scale))

    def effective(self, base: LinearMap, delta: Structure, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """W', (O, I), computed in `dtype`; by default in the wider of the dtypes of W and dW."""
        W, dW = base.weight(dtype), delta.matrix()
        t = dtype or torch.promote_types(W.dtype, dW.dtype)
        return self.weight(W.to(t), scale.to(t) * dW.to(t))

    def factors(self, W: Thin, dW: Thin) -> Thin | None:
        """(B, A) with W' = B A from such factors of W and of the scaled change; None where W' has
        none of the sum of their ranks."""
        return None

    def options(self) -> dict[str, Any]:
        """The constructor's keyword options, as they stand."""
        return {}


def joined(W: Thin, dW: Thin) -> Thin:
    """Thin of W + dW."""
    return torch.cat([W[0], dW[0]], 1), torch.cat([W[1], dW[1]])


def version(*tensors: Tensor) -> tuple[Any, ...] | None:
    """A key of these tensors' contents, by address and autograd's version counter; None for tensors without (inference
    tensors, fake ones)."""
    if any(t.is_inference() for t in tensors):
        return None
    try:
        return tuple((t.data_ptr(), t._version) for t in tensors)
    except RuntimeError:
        return None


def square_of_rows(W: Tensor) -> Tensor:
    t = torch.promote_types(W.dtype, torch.float32)
    return torch.linalg.vector_norm(W, dim=1, dtype=t).square()
