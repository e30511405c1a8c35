"""Matrices made of one tile, or of one block per row or column of blocks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import StructureError
from ..ops.blocks import block_sum, tiled, tiled_linear
from .base import Factored, Structure, check_count

__all__ = ["BlockTiled", "Tiled"]


class Tiled(Factored):
    """dW[o, i] = D[i mod R, o] with D (R, O): one tile for every R inputs.

    x dW^T is the sum of x over its blocks of R, times D: a `LowRank` whose A is the frozen [1 1 ... 1] of identities,
    of which only the (T, R) sum is kept for backward. With `period` q, D itself repeats M (R, q):
    dW[o, i] = M[i mod R, o mod q]. Both start at zero. R need not divide I, nor q divide O: the last tile is cut.

    MiSS, Kang & Yin, arXiv 2409.15371v12, the efficient form of eq. 3 (earlier versions: Bone, DiSHA).

    Args:
        rank: R >= 1. Rows of D beyond I are never used.
        period: q, at most O.

    Raises:
        StructureError: rank below 1, or a period outside 1 .. O.

    Example:
        >>> structure = Tiled(3, 5, rank=2)
        >>> with torch.no_grad():
        ...     _ = structure.D.copy_(torch.arange(6.0).view(2, 3))
        >>> structure.dense()[0]
        tensor([0., 3., 0., 3., 0.], grad_fn=<SelectBackward0>)
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        rank: int = 64,
        period: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features)
        check_count(rank, "Tiled: rank")
        if period is not None and (
            isinstance(period, bool) or not isinstance(period, int) or not 1 <= period <= out_features
        ):
            raise StructureError(f"Tiled: period must be a whole number of 1 to {out_features}, got {period!r}")
        self.period = period
        self._own = "D" if period is None else "M"
        tile = nn.Parameter(torch.empty(rank, period or out_features, device=device, dtype=dtype))
        self.register_parameter(self._own, tile)

    def _tile(self) -> Tensor:
        tile: Tensor = getattr(self, self._own)
        return tile

    @property
    def rank(self) -> int:
        return self._tile().shape[0]

    @property
    def work(self) -> float:
        return self.rank * self.out_features + self.in_features

    def tile(self) -> Tensor:
        """D, (R, O)."""
        return self._tile() if self.period is None else tiled(self._tile(), self.out_features)

    def factors(self) -> tuple[Tensor, Tensor]:
        D = self.tile()
        return D.t(), tiled(torch.eye(self.rank, dtype=D.dtype, device=D.device), self.in_features)

    def dense(self) -> Tensor:
        return tiled(self.tile().t(), self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return block_sum(x, self.rank) @ self.tile().to(x.dtype)

    def linear(self, x: Tensor, W: Tensor, bias: Tensor | None, scale: Tensor, dropout: float = 0.0) -> Tensor:
        return tiled_linear(x, W, bias, self.tile(), scale, dropout)

    def columns(self, index: Tensor) -> Tensor:
        return F.embedding(index % self.rank, self.tile())

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for p in self.parameters():
                p.zero_()

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank} if self.period is None else {"rank": self.rank, "period": self.period}

    def extra_repr(self) -> str:
        period = "" if self.period is None else f", period {self.period}"
        return f"{super().extra_repr()}, rank {self.rank}{period}"


class BlockTiled(Structure):
    """dW in N x N blocks that are equal along each row of blocks, dW_ac = B_a, or along each column, dW_ac = B_c.

    B (ceil(O / N), N, N) for `side` "col" and (ceil(I / N), N, N) for "row", after the published names: *col* has one
    block for each block of outputs. It starts at zero. Where N does not divide O or I the last blocks are cut. Made
    for `BlockAffine`, which also multiplies the weight by it.

    Bone (Bat), Kang & Yin 2024, arXiv 2409.15371v1.

    Args:
        block: N >= 1.
        side: "col" or "row".

    Raises:
        StructureError: block below 1, or another side.

    Example:
        >>> structure = BlockTiled(4, 6, block=2, side="row")
        >>> structure.B.shape
        torch.Size([3, 2, 2])
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        block: int = 64,
        side: str = "col",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features)
        check_count(block, "BlockTiled: block")
        if side not in ("col", "row"):
            raise StructureError(f"BlockTiled: side must be 'col' or 'row', got {side!r}")
        self.block, self.side = block, side
        count = -(-(out_features if side == "col" else in_features) // block)
        self.B = nn.Parameter(torch.empty(count, block, block, device=device, dtype=dtype))

    @property
    def rank(self) -> int:
        return self.block

    @property
    def work(self) -> float:
        return self.block * (self.out_features if self.side == "col" else self.in_features)

    def dense(self) -> Tensor:
        if self.side == "col":
            return tiled(self.B.flatten(0, 1)[: self.out_features], self.in_features)
        return tiled(self.B.transpose(1, 2).flatten(0, 1)[: self.in_features], self.out_features).t()

    def forward(self, x: Tensor) -> Tensor:
        B = self.B.to(x.dtype)
        if self.side == "col":
            return block_sum(x, self.block) @ B.flatten(0, 1)[: self.out_features].t()
        return tiled(x @ B.transpose(1, 2).flatten(0, 1)[: self.in_features], self.out_features)

    def exact_factors(self) -> tuple[Tensor, Tensor]:
        B = self.B
        eye = torch.eye(self.block, dtype=B.dtype, device=B.device)
        if self.side == "col":
            return B.flatten(0, 1)[: self.out_features], tiled(eye, self.in_features)
        return tiled(eye, self.out_features).t(), B.transpose(1, 2).flatten(0, 1)[: self.in_features].t()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.B.zero_()

    def options(self) -> dict[str, Any]:
        return {"block": self.block, "side": self.side}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.side} blocks of {self.block}"
