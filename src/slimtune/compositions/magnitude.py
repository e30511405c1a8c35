"""Compositions that train norms of the weight apart from its directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import lowrank_linear, row_square_after_update
from ..structures import Factored, Structure
from .base import Composition, LinearMap, version

__all__ = ["Magnitude"]


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
