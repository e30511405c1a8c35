"""Entrywise products of low-rank matrices."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import hadamard_factors, lowrank_linear
from .base import Structure, check_count

__all__ = ["Hadamard"]


class Hadamard(Structure):
    """dW = (w1_a w1_b) * (w2_a w2_b), entry by entry, with w1_a (O, R1), w1_b (R1, I), w2_a (O, R2), w2_b (R2, I).

    FedPara, Hyeon-Woo et al. 2021, arXiv 2108.06098, proposition 1; LoHa in LyCORIS, Yeh et al. 2023,
    arXiv 2309.14859. rank(dW) <= R1 R2. w2_b starts at zero, the others at `kaiming_uniform_(a=sqrt(5))`, which is
    U(-1/sqrt(n), 1/sqrt(n)) for n columns, so dW = 0 and only w2_b receives a gradient at the first step.

    By the Khatri-Rao identity dW is one product B A of rank R1 R2. That product is used where it is cheaper than dW.

    Args:
        rank: R1 >= 1.
        second_rank: R2 >= 1; R1 when None.

    Raises:
        StructureError: a rank below 1.

    Example:
        >>> structure = Hadamard(6, 4, rank=2)
        >>> structure.reset_parameters()
        >>> structure.dense().abs().max().item()
        0.0
    """

    fast_parameters = ("w2_b",)

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        rank: int = 8,
        second_rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features)
        second = rank if second_rank is None else second_rank
        for name, r in (("rank", rank), ("second_rank", second)):
            check_count(r, f"Hadamard: {name}")

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.w1_a, self.w1_b = empty(out_features, rank), empty(rank, in_features)
        self.w2_a, self.w2_b = empty(out_features, second), empty(second, in_features)

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def work(self) -> float:
        dense = self.out_features * self.in_features
        return min(dense, self.w1_b.shape[0] * self.w2_b.shape[0] * (self.out_features + self.in_features))

    @property
    def _is_thin(self) -> bool:
        return self.work < self.out_features * self.in_features

    def dense(self) -> Tensor:
        return (self.w1_a @ self.w1_b) * (self.w2_a @ self.w2_b)

    def exact_factors(self) -> tuple[Tensor, Tensor]:
        """(B, A), (O, R1 R2) and (R1 R2, I)."""
        return hadamard_factors(self.w1_a, self.w1_b, self.w2_a, self.w2_b)

    def forward(self, x: Tensor) -> Tensor:
        if not self._is_thin:
            return super().forward(x)
        B, A = self.exact_factors()
        return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))

    def columns(self, index: Tensor) -> Tensor:
        first = F.linear(F.embedding(index, self.w1_b.t()), self.w1_a)
        return first * F.linear(F.embedding(index, self.w2_b.t()), self.w2_a)

    def linear(self, x: Tensor, W: Tensor, bias: Tensor | None, scale: Tensor, dropout: float = 0.0) -> Tensor:
        if self._is_thin and (dropout or not self._weight_pays(x.numel() // self.in_features)):
            return lowrank_linear(x, W, bias, *self.exact_factors(), scale, None, dropout)
        return super().linear(x, W, bias, scale, dropout)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for p in (self.w1_a, self.w1_b, self.w2_a):
                p.uniform_(-1 / math.sqrt(p.shape[1]), 1 / math.sqrt(p.shape[1]))
            self.w2_b.zero_()

    def options(self) -> dict[str, Any]:
        second = self.w2_b.shape[0]
        return {"rank": self.rank} if second == self.rank else {"rank": self.rank, "second_rank": second}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ranks {self.rank} and {self.w2_b.shape[0]}"
