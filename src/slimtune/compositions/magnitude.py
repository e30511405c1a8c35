"""Compositions that train norms of the weight apart from its directions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StructureError
from ..ops import column_square_after_update, lowrank_linear, row_square_after_update, square_rmatmul
from ..structures import Factored, Structure
from .base import Composition, LinearMap, Thin, joined, square_of_rows, version

__all__ = ["Magnitude", "Rescaled", "Squares"]


class Squares:
    """Sums of squares of V = W + s dW; without building V or dW where dW = B A is factored."""

    def __init__(self, base: LinearMap, delta: Structure, scale: Tensor, row_square: Tensor | None = None) -> None:
        self.base, self.delta, self.scale, self.below = base, delta, scale, row_square
        self.V: Tensor | None = None
        if isinstance(delta, Factored):
            self.B, self.A = delta.factors()

    def rows(self) -> Tensor:
        """|V|_row^2, (O,), at least fp32."""
        if not isinstance(self.delta, Factored):
            return square_of_rows(self._sum())
        below = self.base.row_square() if self.below is None else self.below
        return row_square_after_update(below, self.base.matmul(self.A.t()), self.B, self.A, self.scale)

    def columns(self, v: Tensor) -> Tensor:
        """(V * V)^T v for v (O,), v >= 0. Returns (I,), at least fp32."""
        if not isinstance(self.delta, Factored):
            return square_rmatmul(self._sum(), v)
        WvB = self.base.rmatmul(v[:, None] * self.B)
        return column_square_after_update(self.base.square_rmatmul(v), WvB, self.B, self.A, v, self.scale)

    @classmethod
    def of(cls, V: Tensor) -> Squares:
        """Those of a V that is at hand."""
        made = cls.__new__(cls)
        made.V, made.delta, made.scale = V, SimpleNamespace(out_features=len(V)), V  # type: ignore[assignment]
        return made

    def _sum(self) -> Tensor:
        if self.V is None:
            W, dW = self.base.weight(), self.delta.matrix()
            t = torch.promote_types(W.dtype, dW.dtype)
            self.V = W.to(t) + self.scale.to(t) * dW.to(t)
        return self.V


class Rescaled(Composition):
    """W' = diag(d) V diag(e) with V = W + dW and d, e from norms of V and trained magnitudes. The common part of
    `Magnitude`, `ColumnMagnitude` and `BiMagnitude`.

    With dropout, W sees the whole input and dW the dropped one, both between the same d and e, which are those of
    the undropped V: y = diag(d) (W E x + dW E drop(x)) + bias.

    Without gradients d and e are computed once and kept until a parameter changes or `train()` or `eval()` is called,
    so that decoding token by token does not pay for norms; with gradients they are computed in every forward. An edit
    through `.data` is seen from the next `train()` or `eval()` on.

    Args:
        detach: hold the norms of V constant in the gradient. False gives the exact gradient of the definition.
        eps: smallest norm divided by.

    Raises:
        StructureError: eps outside (0, 1].
    """

    def __init__(self, *, detach: bool = True, eps: float = 1e-8) -> None:
        super().__init__()
        if not 0 < eps <= 1:
            raise StructureError(f"{type(self).__name__}: eps must be in (0, 1], got {eps!r}")
        self.detach, self.eps = detach, eps
        self._forget()

    @abstractmethod
    def scales(self, V: Squares) -> tuple[Tensor | None, Tensor | None]:
        """(d, e), (O,) and (I,); None for ones. Norms go through `norm`."""

    def norm(self, square: Callable[[], Tensor]) -> Tensor:
        """max(sqrt(square()), eps), a constant to autograd if `detach`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach):
            return square().clamp_min(self.eps**2).sqrt()

    def own(self, name: str) -> Tensor:
        """A parameter of this module; a plain attribute in DataParallel's replicas."""
        tensor: Tensor = self._parameters[name] if self._parameters else getattr(self, name)  # type: ignore[assignment]
        return tensor

    def options(self) -> dict[str, Any]:
        return {"detach": self.detach, "eps": self.eps}

    def train(self, mode: bool = True) -> Rescaled:
        self._forget()
        return super().train(mode)

    def forward(self, x: Any, base: LinearMap, delta: Structure, scale: Tensor, dropout: float) -> Tensor:
        plain = base.plain()
        d, e, V = self._scales(base, delta, scale, plain)
        if plain is not None and isinstance(delta, Factored):
            B, A = (V.B, V.A) if V is not None else delta.factors()
            rank_dropout = delta.rank_dropout if delta.training else 0.0
            return lowrank_linear(x, plain, base.bias, B, A, scale, d, dropout, rank_dropout, e)
        y, bias = base.plus(x, delta, scale, dropout, e), base.bias
        if d is None:
            return y
        d = d.to(y.dtype)
        y = y * base.rows(d)
        return y if bias is None else y + base.rows(bias.to(y.dtype) * (1 - d))

    def matmul(self, V: Tensor, base: LinearMap, delta: Structure, scale: Tensor) -> Tensor:
        d, e, _ = self._scales(base, delta, scale, None)
        if e is not None:
            V = e.to(V.dtype)[:, None] * V
        y = base.matmul(V)
        y = y + scale.to(y.dtype) * delta.matmul(V).to(y.dtype)
        return y if d is None else d.to(y.dtype)[:, None] * y

    def factors(self, W: Thin, dW: Thin) -> Thin:
        B, A = joined(W, dW)
        d, e = self.scales(Squares.of(B @ A))
        return B if d is None else d.to(B)[:, None] * B, A if e is None else A * e.to(A)

    def _forget(self) -> None:
        self._kept: tuple[Any, tuple[Tensor | None, Tensor | None]] | None = None
        self._below: tuple[Any, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None, "_below": None}  # addresses mean nothing in a copy

    def _scales(
        self, base: LinearMap, delta: Structure, scale: Tensor, plain: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Squares | None]:
        key = None
        remember = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
        if remember:
            if torch.is_grad_enabled():
                self._kept = None
            elif (below := base.key()) is not None:
                # not the factors: they may be computed anew each time, at an address used before
                own = version(scale, *_tensors(self), *_tensors(delta))
                key = None if own is None else (below, own)
                if key is not None and self._kept is not None and self._kept[0] == key:
                    return *self._kept[1], None
        V = Squares(base, delta, scale, self._row_square(base, plain) if remember and plain is not None else None)
        d, e = self.scales(V)
        if key is not None:
            self._kept = (key, (d, e))
        return d, e, V

    def _row_square(self, base: LinearMap, plain: Tensor) -> Tensor | None:
        """|W|_row^2 of a frozen Linear, computed once for each version of W."""
        key = version(plain)
        if key is None:
            return None
        if self._below is None or self._below[0] != key:
            self._below = (key, base.row_square())
        return self._below[1]


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, several times faster than through their generators."""
    found = [t for own in (module._parameters, module._buffers) for t in own.values() if t is not None]
    for child in module._modules.values():
        found += _tensors(child) if child is not None else []
    return found


class Magnitude(Rescaled):
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

    def build(self, out_features: int, in_features: int, **kwargs: Any) -> None:
        self.magnitude = nn.Parameter(torch.empty(out_features, **kwargs))

    @torch.no_grad()
    def init_from(self, base: LinearMap) -> None:
        self.magnitude.copy_(base.row_square().sqrt())

    def row_square(self, base: LinearMap, delta: Structure, scale: Tensor) -> Tensor:
        return self.magnitude.square()

    def weight(self, W: Tensor, dW: Tensor) -> Tensor:
        V = W + dW
        norm = torch.linalg.vector_norm(V, dim=1).clamp_min(self.eps)
        return (self.magnitude.to(V.dtype) / (norm.detach() if self.detach else norm))[:, None] * V

    def scales(self, V: Squares) -> tuple[Tensor | None, Tensor | None]:
        return self.own("magnitude") / self.norm(V.rows), None
