"""The noun `Composition`: how a change dW meets the linear map below it.

Shapes: O out, I in, R rank, *T batch dims. A linear map is whatever answers the `LinearMap` protocol: a frozen
layer, or such a layer under further adapters; compositions never look behind it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from .ops import lowrank_linear, replayed_dropout, row_square_after_update
from .structures import Factored, Structure

__all__ = ["Additive", "Composition", "LinearMap", "Magnitude"]


class LinearMap(ABC):
    """x -> W x + bias, W seen as an (O, I) matrix whatever the layer (a convolution's I counts its kernel)."""

    @abstractmethod
    def __call__(self, x: Any) -> Tensor:
        """W x + bias, in the layer's own layout."""

    @abstractmethod
    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W, (O, I), dequantised if need be, in `dtype` if given."""

    @abstractmethod
    def matmul(self, V: Tensor) -> Tensor:
        """W V for V (I, R). Returns (O, R)."""

    @abstractmethod
    def row_square(self) -> Tensor:
        """|W|_row^2, (O,), at least fp32."""

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
        return _row_square(self.effective(base, delta, scale))

    def effective(self, base: LinearMap, delta: Structure, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """W', (O, I), computed in `dtype`; by default in the wider of the dtypes of W and dW."""
        W, dW = base.weight(dtype), delta.dense()
        t = dtype or torch.promote_types(W.dtype, dW.dtype)
        return self.weight(W.to(t), scale.to(t) * dW.to(t))

    def options(self) -> dict[str, Any]:
        """The constructor's keyword options, as they stand."""
        return {}


def version(*tensors: Tensor) -> tuple[Any, ...] | None:
    """A key of these tensors' contents, by address and autograd's version counter; None for inference tensors."""
    if any(t.is_inference() for t in tensors):
        return None
    return tuple((t.data_ptr(), t._version) for t in tensors)


def _row_square(W: Tensor) -> Tensor:
    t = torch.promote_types(W.dtype, torch.float32)
    return torch.linalg.vector_norm(W, dim=1, dtype=t).square()


class Additive(Composition):
    """W' = W + dW."""

    def weight(self, W: Tensor, dW: Tensor) -> Tensor:
        return W + dW

    def forward(self, x: Any, base: LinearMap, delta: Structure, scale: Tensor, dropout: float) -> Tensor:
        if isinstance(delta, Factored) and (W := base.plain()) is not None:
            B, A = delta.factors()
            rank_dropout = delta.rank_dropout if delta.training else 0.0
            return lowrank_linear(x, W, base.bias, B, A, scale, None, dropout, rank_dropout)
        y = base(x)
        return y + scale.to(y.dtype) * base.change(x, delta, dropout)

    def matmul(self, V: Tensor, base: LinearMap, delta: Structure, scale: Tensor) -> Tensor:
        y = base.matmul(V)
        if isinstance(delta, Factored):  # not delta(V): its rank dropout is for data
            B, A = delta.factors()
            change = B @ (A @ V.to(A.dtype))
        else:
            dW = delta.dense()
            change = dW @ V.to(dW.dtype)
        return y + scale.to(y.dtype) * change.to(y.dtype)

    def row_square(self, base: LinearMap, delta: Structure, scale: Tensor) -> Tensor:
        if not isinstance(delta, Factored):
            return super().row_square(base, delta, scale)
        B, A = delta.factors()
        return row_square_after_update(base.row_square(), base.matmul(A.t()), B, A, scale)


class Magnitude(Composition):
    """W' = diag(m / |V|_row) V with V = W + dW, m (O,) trained from m = |W|_row.

    DoRA, Liu et al. 2024, arXiv 2402.09353, eq. 5; |.|_row is one norm per output feature, as in the authors'
    code and PEFT. For a factored dW the norm comes from

        |W + s B A|_row^2 = |W|_row^2 + 2 s rowsum(B * (W A^T)) + s^2 rowsum((B A A^T) * B)

    in fp32, so neither V nor dW is built. Rows whose norm is below `eps` are divided by `eps`. With dropout, the
    base keeps the whole input and only the change sees the dropped one; the norm is that of the undropped V.

    Without gradients, m / |V|_row is computed once and kept until a parameter changes or `train()` or `eval()` is
    called, so that decoding token by token does not pay for the norm; an edit through `.data` is seen from the next
    `train()` or `eval()` on. The output of a bias-free Linear is kept for the backward pass: do not overwrite it in
    place. In bf16 a bias much larger than the product costs the gradient of m its precision.

    Args:
        detach: hold |V|_row constant in the gradient, as section 4.3 of the paper does. False gives the exact
            gradient of the definition.
        eps: smallest norm divided by.
    """

    def __init__(self, *, detach: bool = True, eps: float = 1e-8) -> None:
        super().__init__()
        self.detach, self.eps = detach, eps
        self._kept: tuple[Any, Tensor] | None = None

    def train(self, mode: bool = True) -> Magnitude:
        self._kept = None
        return super().train(mode)

    def build(self, out_features: int, in_features: int, **kwargs: Any) -> None:
        self.magnitude = nn.Parameter(torch.empty(out_features, **kwargs))

    @torch.no_grad()
    def init_from(self, base: LinearMap) -> None:
        self.magnitude.copy_(base.row_square().sqrt())

    def options(self) -> dict[str, Any]:
        return {"detach": self.detach, "eps": self.eps}

    def row_square(self, base: LinearMap, delta: Structure, scale: Tensor) -> Tensor:
        return self.magnitude.square()

    def weight(self, W: Tensor, dW: Tensor) -> Tensor:
        V = W + dW
        norm = torch.linalg.vector_norm(V, dim=1).clamp_min(self.eps)
        return (self.magnitude.to(V.dtype) / (norm.detach() if self.detach else norm))[:, None] * V

    def forward(self, x: Any, base: LinearMap, delta: Structure, scale: Tensor, dropout: float) -> Tensor:
        if not isinstance(delta, Factored):
            return super().forward(x, base, delta, scale, dropout)
        B, A = delta.factors()
        d = self._row_scale(base, B, A, scale)
        if (W := base.plain()) is not None:
            rank_dropout = delta.rank_dropout if delta.training else 0.0
            return lowrank_linear(x, W, base.bias, B, A, scale, d, dropout, rank_dropout)
        y, bias = base(x), base.bias
        d = d.to(y.dtype)
        y = (y + scale.to(y.dtype) * base.change(x, delta, dropout)) * base.rows(d)
        return y if bias is None else y + base.rows(bias.to(y.dtype) * (1 - d))

    def _row_scale(self, base: LinearMap, B: Tensor, A: Tensor, scale: Tensor) -> Tensor:
        """m / |W + s B A|_row, (O,)."""
        m: Tensor = self._parameters["magnitude"] if self._parameters else self.magnitude  # type: ignore[assignment]
        key = None
        if not torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                self._kept = None
            elif (below := base.key()) is not None and (own := version(m, B, A, scale)) is not None:
                key = (below, own)
                if self._kept is not None and self._kept[0] == key:
                    return self._kept[1]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach):
            square = row_square_after_update(base.row_square(), base.matmul(A.t()), B, A, scale)
            norm = square.clamp_min(self.eps**2).sqrt()
        d = m / norm
        if key is not None:
            self._kept = (key, d)
        return d
