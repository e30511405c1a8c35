"""Sums of Kronecker products of one shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import StructureError
from ..ops.products import factor_pair, kronecker_work
from .base import Structure, check_count

__all__ = ["KroneckerSum"]


class KroneckerSum(Structure):
    """dW = sum_r w1_r (x) w2_r with w1 (R, a, b), w2 (R, c, d), O = a c, I = b d.

    Van Loan and Pitsianis 1993: every matrix is one with R = min(a b, c d). It has R (a b + c d) numbers, and
    rank(dW) <= R min(a, b) min(c, d). w1 starts at zero and w2 at U(-1/sqrt(d), 1/sqrt(d)).

    Args:
        rank: R, the number of terms.
        left: (a, b), a dividing O and b dividing I; None takes the largest divisors up to their square roots.

    Raises:
        StructureError: a rank below 1, sizes that do not divide O and I.

    Example:
        >>> structure = KroneckerSum(6, 4, rank=2)
        >>> structure
        KroneckerSum(6 x 4, 2 terms (2 x 2) kron (3 x 2))
    """

    fast_parameters = ("w1",)
    rank_dims: ClassVar[dict[str, int]] = {"w1": 0, "w2": 0}

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        rank: int = 1,
        left: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features)
        check_count(rank, "KroneckerSum: rank")
        if left is None:
            left = (factor_pair(out_features)[0], factor_pair(in_features)[0])
        if isinstance(left, str) or not isinstance(left, Sequence) or len(left) != 2:
            raise StructureError(f"KroneckerSum: left must be two whole numbers, got {left!r}")
        for size, whole, what in zip(left, (out_features, in_features), ("rows", "columns"), strict=True):
            check_count(size, f"KroneckerSum: the {what} of w1")
            if whole % size:
                raise StructureError(f"KroneckerSum: {size} {what} of w1 do not divide {whole}")
        a, b = self.left = (left[0], left[1])
        c, d = self.right = (out_features // a, in_features // b)
        self.w1 = nn.Parameter(torch.empty(rank, a, b, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(rank, c, d, device=device, dtype=dtype))

    @property
    def rank(self) -> int:
        return self.w1.shape[0]

    @property
    def work(self) -> float:
        return 1.5 * self.rank * kronecker_work(self.left, self.right)  # as `Kronecker`

    def dense(self) -> Tensor:
        return torch.einsum("rab,rcd->acbd", self.w1, self.w2).reshape(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if self.work >= self.out_features * self.in_features:
            return super().forward(x)
        (a, b), (c, d) = self.left, self.right
        w1, w2 = self.w1.to(x.dtype), self.w2.to(x.dtype)
        X = x.unflatten(-1, (b, d))
        if a * d * (b + c) < b * c * (d + a):
            y = torch.einsum("...rad,rcd->...ac", torch.einsum("rab,...bd->...rad", w1, X), w2)
        else:
            y = torch.einsum("rab,...brc->...ac", w1, torch.einsum("...bd,rcd->...brc", X, w2))
        return y.flatten(-2)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            bound = 1 / math.sqrt(self.right[1])
            self.w1.zero_()
            self.w2.uniform_(-bound, bound)

    def new_ranks(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        bound = 1 / math.sqrt(self.right[1])
        w2 = torch.empty(count, *self.right).uniform_(-bound, bound, generator=generator)
        return {"w1": torch.zeros(count, *self.left), "w2": w2}

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank, "left": list(self.left)}

    def extra_repr(self) -> str:
        (a, b), (c, d) = self.left, self.right
        return f"{super().extra_repr()}, {self.rank} terms ({a} x {b}) kron ({c} x {d})"
