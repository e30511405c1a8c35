"""A grid of low-rank blocks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import StructureError
from ..ops.blocks import block_lowrank, block_lowrank_linear
from .base import Structure, check_count

__all__ = ["BlockLowRank"]


class BlockLowRank(Structure):
    """dW in K x K blocks, block (j, n) = (A[n][:, jS:(j+1)S] B[j][nS:(n+1)S, :])^T with S = R / K.

    A (K, I / K, R) and B (K, R, O / K): every block of outputs meets every block of inputs through a product of rank
    S of its own, so dW has rank up to K R for the R (O + I) parameters of a `LowRank`, which it is at K = 1. B
    starts at zero and A at U(-sqrt(K / I), sqrt(K / I)), sqrt(K) times LoRA's width, as in the authors' code. The
    gradient is local: inputs of block n reach A[n] and rows nS to (n+1)S of each B[j] only.

    GraLoRA, Jung et al. 2025, arXiv 2505.20355; the layout of A and B is PEFT's.

    Args:
        rank: R >= 1.
        blocks: K, a divisor of O, I and R. When None it is chosen: aimed at is the largest power of two with
            R / K^2 >= 8, at least 2; taken is the largest common divisor of O, I and R up to that, the smallest one
            above where only 1 is below, and 1 where they share none. `options()` and the printed module say which.

    Raises:
        StructureError: rank below 1, or `blocks` does not divide O, I and R.

    Example:
        >>> structure = BlockLowRank(6, 4, rank=2, blocks=2)
        >>> structure.A.shape, structure.B.shape
        (torch.Size([2, 2, 2]), torch.Size([2, 2, 3]))
        >>> BlockLowRank(6, 4, rank=32)
        BlockLowRank(6 x 4, rank 32, 2 x 2 blocks)
    """

    fast_parameters = ("B",)

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        rank: int = 32,
        blocks: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features)
        check_count(rank, "BlockLowRank: rank")
        fits = _divisors(math.gcd(out_features, in_features, rank))
        if blocks is None:
            blocks = _automatic(rank, fits)
        if isinstance(blocks, bool) or blocks not in fits:
            raise StructureError(
                f"BlockLowRank: blocks must divide {out_features} outputs, {in_features} inputs and rank {rank}, "
                f"that is be one of {', '.join(map(str, fits))}; got {blocks!r}"
            )
        self.blocks = blocks
        self.A = nn.Parameter(torch.empty(blocks, in_features // blocks, rank, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(blocks, rank, out_features // blocks, device=device, dtype=dtype))

    @property
    def rank(self) -> int:
        return self.A.shape[2]

    @property
    def work(self) -> float:
        return self.rank * (self.out_features + self.in_features)

    def _grid(self) -> tuple[Tensor, Tensor]:
        """A as (n, i, j, S) and B as (j, n, S, o)."""
        K, S = self.blocks, self.rank // self.blocks
        return self.A.unflatten(2, (K, S)), self.B.unflatten(1, (K, S))

    def dense(self) -> Tensor:
        return torch.einsum("nijs,jnso->joni", *self._grid()).reshape(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return block_lowrank(x, self.A, self.B)

    def linear(self, x: Tensor, W: Tensor, bias: Tensor | None, scale: Tensor, dropout: float = 0.0) -> Tensor:
        return block_lowrank_linear(x, W, bias, self.A, self.B, scale, dropout)

    def columns(self, index: Tensor) -> Tensor:
        A, B = self._grid()
        K, N = A.shape[:2]
        h = F.embedding(index, A.reshape(K * N, self.rank)).unflatten(-1, (K, 1, -1))  # (*T, j, 1, S)
        own = F.one_hot((index // N).long(), K).to(h.dtype)[..., None, :, None]  # (*T, 1, n, 1)
        return torch.einsum("...jns,jnso->...jo", h * own, B).flatten(-2)

    def exact_factors(self) -> tuple[Tensor, Tensor]:
        """(B, A) of rank K R: row (j, n, t) of A is A[n][:, jS + t] on block n of the inputs, column (j, n, t) of B
        is B[j][nS + t] on block j of the outputs."""
        A, B = self._grid()
        eye = torch.eye(self.blocks, dtype=A.dtype, device=A.device)
        wide = torch.einsum("nijs,nm->jnsmi", A, eye).flatten(3).flatten(0, 2)
        tall = torch.einsum("jnso,jm->mojns", B, eye).flatten(2).flatten(0, 1)
        return tall, wide

    def reset_parameters(self) -> None:
        with torch.no_grad():
            bound = math.sqrt(self.blocks / self.in_features)
            self.A.uniform_(-bound, bound)
            self.B.zero_()

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank, "blocks": self.blocks}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank {self.rank}, {self.blocks} x {self.blocks} blocks"


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _automatic(rank: int, fits: list[int]) -> int:
    aim = 2
    while rank >= 8 * (2 * aim) ** 2:
        aim *= 2
    below = [d for d in fits if 1 < d <= aim]
    return below[-1] if below else fits[min(1, len(fits) - 1)]
