"""Khatri-Rao products: Kronecker products column by column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import StructureError
from ..ops import khatri_rao, lowrank_linear
from ..ops.products import balanced_sizes
from .base import Structure

__all__ = ["KhatriRao"]

ORIENTATIONS = ("columns", "rows")
MOST = 64  # factors; more can only be ones


class KhatriRao(Structure):
    """dW = F_1 kr F_2 kr ... kr F_k with F_j (N_j, I) and N_1 N_2 ... N_k >= O, its first O rows:
    dW[(n_1, ..., n_k), i] = F_1[n_1, i] ... F_k[n_k, i].

    The Khatri-Rao adapter of Lu, "Low-Rank Approximation, Adaptation, and Other Tales", arXiv 2408.05883, in two
    readings: the chain above, and, with a rank R, (B_1 A_1) kr (B_2 A_2) with B_j (N_j, R) and A_j (R, I), whose rank
    is at most R^k. The chain has I (N_1 + ... + N_k) parameters and rank up to min(O, I); the other reading
    R (N_1 + ... + N_k + k I). F_1 (or B_1) starts at zero, the others at U(-1/sqrt(N_j), 1/sqrt(N_j)) (B_j and A_j at
    U(-1/sqrt(n), 1/sqrt(n)) for n columns).

    With orientation "rows" the same holds of dW^T, with O and I exchanged: I is factored, and the parameters are
    O (N_1 + ... + N_k). Better where I factors better than O, or is larger.

    Args:
        rank: R of each factor; None for the chain of whole factors.
        factors: k, from 2 to 64.
        sizes: N_1, ..., N_k. By default close to each other, with the smallest product that is at least O and allows
            it; where the product is above O, the rows past O are left out.
        orientation: "columns" or "rows".

    Raises:
        StructureError: a rank below 1, fewer than two factors or more than 64, sizes whose product is below O,
            another orientation.

    Example:
        >>> structure = KhatriRao(6, 4)
        >>> structure.reset_parameters()
        >>> structure
        KhatriRao(6 x 4, columns, sizes 2 3)
        >>> structure.dense().abs().max().item()
        0.0
    """

    fast_parameters = ("F1", "B1")

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        rank: int | None = None,
        factors: int = 2,
        sizes: Sequence[int] | None = None,
        orientation: str = "columns",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features)
        if orientation not in ORIENTATIONS:
            raise StructureError(f"KhatriRao: orientation must be 'columns' or 'rows', got {orientation!r}")
        if rank is not None and not _is_count(rank):
            raise StructureError(f"KhatriRao: rank must be a whole number of at least 1 or None, got {rank!r}")
        self.orientation = orientation
        tall, wide = (out_features, in_features) if orientation == "columns" else (in_features, out_features)
        if sizes is None:
            if not _is_count(factors) or not 2 <= factors <= MOST:
                raise StructureError(f"KhatriRao: factors must be a whole number from 2 to {MOST}, got {factors!r}")
            sizes = balanced_sizes(tall, factors)
        elif isinstance(sizes, str) or not isinstance(sizes, Sequence) or not all(map(_is_count, sizes)):
            raise StructureError(f"KhatriRao: sizes must be whole numbers of at least 1, got {sizes!r}")
        elif not 2 <= len(sizes) <= MOST or math.prod(sizes) < tall:
            raise StructureError(
                f"KhatriRao: sizes must be 2 to {MOST} numbers with a product of at least {tall}, got {list(sizes)}; "
                f"{balanced_sizes(tall, min(max(2, len(sizes)), MOST))} would do"
            )
        self.sizes, self._rank = tuple(sizes), rank

        for j, n in enumerate(sizes, 1):
            shapes = {f"F{j}": (n, wide)} if rank is None else {f"B{j}": (n, rank), f"A{j}": (rank, wide)}
            for name, shape in shapes.items():
                self.register_parameter(name, nn.Parameter(torch.empty(*shape, device=device, dtype=dtype)))

    @property
    def rank(self) -> int | None:
        return self._rank

    @property
    def work(self) -> float:
        dense = self.out_features * self.in_features
        if self._rank is None:
            return dense
        return min(dense, self._rank ** len(self.sizes) * (self.out_features + self.in_features))

    @property
    def _is_thin(self) -> bool:
        return self.work < self.out_features * self.in_features

    def factors(self) -> list[Tensor]:
        """F_1, ..., F_k, each (N_j, I), or (N_j, O) by rows."""
        if self._rank is None:
            return self._all("F")
        return [B @ A for B, A in zip(self._all("B"), self._all("A"), strict=True)]

    def _all(self, letter: str) -> list[Tensor]:
        return [getattr(self, f"{letter}{j}") for j in range(1, len(self.sizes) + 1)]

    def dense(self) -> Tensor:
        product = khatri_rao(self.factors())
        return product[: self.out_features] if self.orientation == "columns" else product[: self.in_features].t()

    def exact_factors(self) -> tuple[Tensor, Tensor] | None:
        """With a rank: (B_1 (x) B_2 ..., A_1 kr A_2 ...), of rank R^k."""
        if self._rank is None:
            return None
        left, *rest = self._all("B")
        for B in rest:
            left = torch.kron(left, B)
        right = khatri_rao(self._all("A"))
        if self.orientation == "columns":
            return left[: self.out_features], right
        return right.t(), left[: self.in_features].t()

    def forward(self, x: Tensor) -> Tensor:
        thin = self.exact_factors() if self._is_thin else None
        if thin is None:
            return super().forward(x)
        B, A = thin
        return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))

    def columns(self, index: Tensor) -> Tensor:
        if self.orientation == "columns":  # column i of dW holds column i of every factor
            product, *rest = (F.embedding(index, f.t()) for f in self.factors())
            for f in rest:
                product = (product[..., :, None] * f[..., None, :]).flatten(-2)
            return product[..., : self.out_features]
        rows = []
        for size, f in zip(reversed(self.sizes), reversed(self.factors()), strict=True):
            rows.append(F.embedding(index % size, f))
            index = torch.div(index, size, rounding_mode="floor")
        return math.prod(rows[1:], start=rows[0])  # type: ignore[type-var]

    def linear(self, x: Tensor, W: Tensor, bias: Tensor | None, scale: Tensor, dropout: float = 0.0) -> Tensor:
        if self._is_thin and (dropout or not self._weight_pays(x.numel() // self.in_features)):
            thin = self.exact_factors()
            assert thin is not None
            return lowrank_linear(x, W, bias, *thin, scale, None, dropout)
        return super().linear(x, W, bias, scale, dropout)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name in self.fast_parameters:
                    p.zero_()
                else:
                    bound = 1 / math.sqrt(p.shape[0] if self._rank is None else p.shape[1])
                    p.uniform_(-bound, bound)

    def options(self) -> dict[str, Any]:
        return {"rank": self._rank, "sizes": list(self.sizes), "orientation": self.orientation}

    def extra_repr(self) -> str:
        rank = "" if self._rank is None else f", rank {self._rank}"
        return f"{super().extra_repr()}, {self.orientation}, sizes {' '.join(map(str, self.sizes))}{rank}"


def _is_count(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= 1
