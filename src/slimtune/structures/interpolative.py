"""Low-rank matrices spelled out by some of their own rows or columns."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import StructureError
from .base import Structure, check_count

__all__ = ["Interpolative"]

SIDES = ("rows", "columns")


class Interpolative(Structure):
    """dW[order] = [I; T] S with S (R, I), rows of dW, and T (O - R, R); or by columns dW[:, order] = S [I, T] with
    S (O, R) and T (R, I - R).

    The interpolative decomposition of Cheng, Gimbutas, Martinsson and Rokhlin 2005. Any matrix of rank R has the form,
    with R (O + I - R) numbers where B A has R (O + I): fewer than O I at every R below min(O, I); products cost as much
    less. Zhao et al. 2025, arXiv 2501.19090, put it in the place of layers' low-rank factors. `order`, a permutation,
    is a buffer of whole numbers and saved with the parameters. S starts at zero, T at U(-1/sqrt(R), 1/sqrt(R)), `order`
    at the identity.

    Args:
        rank: R, at most O ("rows") or I ("columns").
        side: "rows" or "columns".

    Raises:
        StructureError: a rank below 1 or above that, another side.

    Example:
        >>> structure = Interpolative(6, 4, rank=2)
        >>> structure.reset_parameters()
        >>> sum(p.numel() for p in structure.parameters()), structure.dense().abs().max().item()
        (16, 0.0)
    """

    fast_parameters = ("S",)

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        rank: int = 8,
        side: str = "rows",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features)
        if side not in SIDES:
            raise StructureError(f"Interpolative: side must be 'rows' or 'columns', got {side!r}")
        check_count(rank, "Interpolative: rank")
        n = out_features if side == "rows" else in_features
        if rank > n:
            raise StructureError(f"Interpolative: rank must be at most the {n} {side}, got {rank}")
        self.side = side
        shapes = ((rank, in_features), (n - rank, rank)) if side == "rows" else ((out_features, rank), (rank, n - rank))
        self.S, self.T = (nn.Parameter(torch.empty(*shape, device=device, dtype=dtype)) for shape in shapes)
        self.register_buffer("order", torch.arange(n, device=device))
        self.order: Tensor

    @property
    def rank(self) -> int:
        return self.S.shape[0 if self.side == "rows" else 1]

    @property
    def work(self) -> float:
        return self.S.numel() + self.T.numel()

    def dense(self) -> Tensor:
        if self.side == "rows":
            return torch.cat([self.S, self.T @ self.S])[self.order.argsort()]
        return torch.cat([self.S, self.S @ self.T], 1)[:, self.order.argsort()]

    def exact_factors(self) -> tuple[Tensor, Tensor]:
        """(B, A), (O, R) and (R, I)."""
        eye = torch.eye(self.rank, device=self.S.device, dtype=self.S.dtype)
        if self.side == "rows":
            return torch.cat([eye, self.T])[self.order.argsort()], self.S
        return self.S, torch.cat([eye, self.T], 1)[:, self.order.argsort()]

    def forward(self, x: Tensor) -> Tensor:
        S, T, R = self.S.to(x.dtype), self.T.to(x.dtype), self.rank
        if self.side == "rows":
            z = F.linear(x, S)
            return torch.cat([z, F.linear(z, T)], -1).index_select(-1, self.order.argsort())
        some, rest = x.index_select(-1, self.order).split([R, self.in_features - R], -1)
        return F.linear(some + F.linear(rest, T), S)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.S.zero_()
            bound = 1 / math.sqrt(self.rank)
            self.T.uniform_(-bound, bound)
            self.order.copy_(torch.arange(len(self.order), device=self.order.device))

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank, "side": self.side}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.rank} {self.side}"
