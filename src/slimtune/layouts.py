"""Layer 2: kinds of layers as linear maps: the weight seen as an (O, I) matrix, and the layer's own layout.

Shapes: O out, I in (a convolution's I is its input channels per group times its kernel), R rank, *T batch dims.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compositions import LinearMap
from .compositions.base import version
from .ops import replayed_dropout
from .ops.convolution import CONVOLVE, Convolution
from .structures import Factored, Structure

__all__ = ["Conv1DLayout", "ConvLayout", "EmbeddingLayout", "LinearLayout", "is_packed", "layout_of"]


def is_packed(W: Tensor) -> bool:
    """Whether a weight's numbers are codes (integers, fp8) that only its own layer can read."""
    return not W.is_floating_point() or W.dtype.itemsize < 2


class LinearLayout(LinearMap):
    """torch.nn.Linear and its subclasses, packed weights included."""

    __slots__ = ("layer",)
    takes_dropout = True
    is_matrix = True

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer.base_class.forward(self.layer, x)

    @property
    def bias(self) -> Tensor | None:
        own = self.layer._parameters
        return own["bias"] if "bias" in own else getattr(self.layer, "bias", None)

    def plain(self) -> Tensor | None:
        layer = self.layer
        W, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        if not layer.is_plain or W is None or W.requires_grad or (bias is not None and bias.requires_grad):
            return None
        return self._oriented(W)

    def _oriented(self, W: Tensor) -> Tensor:
        return W

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        W = self.layer.weight
        if not is_packed(W):
            W = self._oriented(W)
        else:
            W = self.matmul(torch.eye(self.layer.in_features, device=W.device))
        return W if dtype is None else W.to(dtype)

    def matmul(self, V: Tensor) -> Tensor:
        W = self.layer.weight
        if not is_packed(W):
            return self._oriented(W) @ V.to(W.dtype)
        y = self(V.t().contiguous())  # packed: ask the layer itself
        return (y if self.bias is None else y - self.bias).t()

    def key(self) -> tuple[Any, ...] | None:
        return version(self.layer.weight)

    def row_square(self) -> Tensor:
        W = self.weight()
        t = torch.promote_types(W.dtype, torch.float32)
        return torch.linalg.vector_norm(W, dim=1, dtype=t).square()

    def change(self, x: Tensor, delta: Structure, dropout: float = 0.0) -> Tensor:
        return replayed_dropout(delta, x, dropout) if dropout else delta(x)

    def plus(
        self,
        x: Tensor,
        delta: Structure,
        scale: Tensor,
        dropout: float = 0.0,
        columns: Tensor | None = None,
        of: LinearMap | None = None,
    ) -> Tensor:
        if columns is not None:
            x = x * columns.to(x.dtype)
        if of is None and (W := self.plain()) is not None:
            return delta.linear(x, W, self.bias, scale, dropout)
        y = (of or self)(x)
        return y + scale.to(y.dtype) * self.change(x, delta, dropout)

    def with_weight(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, W.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def rows(self, v: Tensor) -> Tensor:
        return v

    @torch.no_grad()
    def is_affine(self) -> bool:
        """Whether the layer's own forward is W x + b, tried on one small input unless the class is torch's own."""
        if self.layer.base_class.__module__.startswith("torch.nn."):
            return True
        x, W = self._sample(), self.weight()
        a, b = self(x), self.with_weight(x, W, self.bias)
        return a.shape == b.shape and bool((a - b).norm() <= 0.02 * b.norm())

    def shaped(self, W: Tensor) -> Tensor:
        """W (O, I), viewed as the layer would store it."""
        return W

    def _sample(self) -> Tensor:
        W = self.layer.weight
        return torch.linspace(-1, 2, 3 * self.sizes(self.layer)[1], dtype=W.dtype, device=W.device).view(3, -1)

    @staticmethod
    def sizes(layer: Any) -> tuple[int, int]:
        """(O, I)."""
        return layer.out_features, layer.in_features

    @staticmethod
    def store(W: Tensor, like: Tensor) -> Tensor:
        """W (O, I), laid out as the layer stores its weight."""
        return W.reshape(like.shape)


class Conv1DLayout(LinearLayout):
    """transformers' Conv1D (GPT-2): a Linear whose weight is stored as (I, O)."""

    __slots__ = ()

    def _oriented(self, W: Tensor) -> Tensor:
        return W.t()

    def shaped(self, W: Tensor) -> Tensor:
        return W.t()

    @staticmethod
    def sizes(layer: Any) -> tuple[int, int]:
        return layer.weight.shape[1], layer.weight.shape[0]

    @staticmethod
    def store(W: Tensor, like: Tensor) -> Tensor:
        return W.t().contiguous()


class ConvLayout(LinearLayout):
    """torch.nn.Conv1d, Conv2d, Conv3d: any stride, padding, padding mode, dilation and groups.

    W is the kernel flattened to (O, I / groups * kernel). A factored change is a convolution with A as its
    kernel, then a pointwise one with B; with groups, A serves every group.
    """

    __slots__ = ()
    is_matrix = False

    def plain(self) -> Tensor | None:
        return None

    def _oriented(self, W: Tensor) -> Tensor:
        return W.flatten(1)

    def _convolve(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        return Convolution.of(self.layer)(x, W, bias)

    def change(self, x: Tensor, delta: Structure, dropout: float = 0.0) -> Tensor:
        return self._change(x, delta, dropout, None)

    def _change(
        self, x: Tensor, delta: Structure, dropout: float, columns: Tensor | None, bias: Tensor | None = None
    ) -> Tensor:
        """dW diag(columns) drop(x) + bias."""
        if dropout:
            return replayed_dropout(lambda z: self._change(z, delta, 0.0, columns), x, dropout)
        if columns is None and (y := delta.convolve(x, Convolution.of(self.layer), bias)) is not None:
            return y
        if not isinstance(delta, Factored):
            dW = delta.matrix()
            return self.with_weight(x, dW if columns is None else dW * columns, bias)
        B, A = delta.factors()
        B, A = B.to(x.dtype), (A if columns is None else A * columns).to(x.dtype)
        kernel, groups = self.layer.kernel_size, self.layer.groups
        A = A.view(-1, self.layer.in_channels // groups, *kernel)
        h = self._convolve(x, A.repeat(groups, *(1,) * (A.dim() - 1)) if groups > 1 else A, None)
        if delta.training and delta.rank_dropout:
            h = F.dropout(h, delta.rank_dropout)
        return CONVOLVE[len(kernel)](h, B.reshape(*B.shape, *(1,) * len(kernel)), bias, groups=groups)

    def plus(
        self,
        x: Tensor,
        delta: Structure,
        scale: Tensor,
        dropout: float = 0.0,
        columns: Tensor | None = None,
        of: LinearMap | None = None,
    ) -> Tensor:
        if columns is None and of is None and (dropout or isinstance(delta, Factored) or not self.layer.is_plain):
            return super().plus(x, delta, scale, dropout)
        W = (of or self).weight()
        if dropout or isinstance(delta, Factored):
            y = self.with_weight(x, W if columns is None else W * columns, self.bias)
            return y + scale.to(y.dtype) * self._change(x, delta, dropout, columns)
        dW = delta.matrix()  # one convolution instead of two
        new = W + scale.to(dW.dtype) * dW
        return self.with_weight(x, new if columns is None else new * columns, self.bias)

    def with_weight(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        return self._convolve(x, self.shaped(W.to(x.dtype)), None if bias is None else bias.to(x.dtype))

    def shaped(self, W: Tensor) -> Tensor:
        c = self.layer
        return W.view(c.out_channels, c.in_channels // c.groups, *c.kernel_size)

    def _sample(self) -> Tensor:
        c, W = self.layer, self.layer.weight
        shape = (1, c.in_channels, *(d * (k - 1) + 3 for d, k in zip(c.dilation, c.kernel_size, strict=True)))
        return torch.linspace(-1, 2, math.prod(shape), dtype=W.dtype, device=W.device).view(shape)

    def rows(self, v: Tensor) -> Tensor:
        return v.view(-1, *(1,) * len(self.layer.kernel_size))

    @staticmethod
    def sizes(layer: Any) -> tuple[int, int]:
        return layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.kernel_size)


class EmbeddingLayout(LinearLayout):
    """torch.nn.Embedding as a map of one-hot vectors: O its width, I its number of entries.

    Dropout of the input would drop whole tokens and is left out, as in PEFT. A subclass that multiplies its output
    by `embed_scale` is followed.
    """

    __slots__ = ()
    takes_dropout = False
    is_matrix = False

    def plain(self) -> Tensor | None:
        return None

    def _oriented(self, W: Tensor) -> Tensor:
        return W.t()

    def _look_up(self, x: Tensor, table: Tensor) -> Tensor:
        return self._scaled(F.embedding(x, table))  # padding_idx would only hide that entry's share of the gradient

    def _scaled(self, y: Tensor) -> Tensor:
        factor = getattr(self.layer, "embed_scale", None)
        return y if factor is None else y * factor

    def change(self, x: Tensor, delta: Structure, dropout: float = 0.0) -> Tensor:
        t = self.layer.weight.dtype
        return self._scaled(delta.columns(x).to(t))

    def plus(
        self,
        x: Tensor,
        delta: Structure,
        scale: Tensor,
        dropout: float = 0.0,
        columns: Tensor | None = None,
        of: LinearMap | None = None,
    ) -> Tensor:
        y = super().plus(x, delta, scale, dropout, None, of)
        return y if columns is None else y * F.embedding(x, columns.to(y.dtype)[:, None])

    def with_weight(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        return self._look_up(x, W.t().to(self.layer.weight.dtype))

    def _sample(self) -> Tensor:
        return torch.arange(min(3, self.layer.num_embeddings), device=self.layer.weight.device)

    @staticmethod
    def sizes(layer: Any) -> tuple[int, int]:
        return layer.embedding_dim, layer.num_embeddings

    @staticmethod
    def store(W: Tensor, like: Tensor) -> Tensor:
        return W.t().contiguous()


def _is_hf_conv1d(cls: type) -> bool:
    return any(c.__module__ == "transformers.pytorch_utils" and c.__name__ == "Conv1D" for c in cls.__mro__)


def layout_of(cls: type[nn.Module]) -> type[LinearLayout] | None:
    """The layout for a class of layers, which it may name itself as `own_layout`; None if adapters do not fit it."""
    if own := getattr(cls, "own_layout", None):
        return own
    if issubclass(cls, nn.modules.lazy.LazyModuleMixin):
        return None
    if issubclass(cls, nn.Linear):
        return LinearLayout
    if _is_hf_conv1d(cls):
        return Conv1DLayout
    if issubclass(cls, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return ConvLayout
    if issubclass(cls, nn.Embedding):
        return EmbeddingLayout
    return None
