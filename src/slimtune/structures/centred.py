"""Changes of a low-rank part of the weight itself."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops import centred_factors, centred_linear
from .base import Factored, Pair, check_count, check_dropout

__all__ = ["CentredLowRank"]


class CentredLowRank(Factored):
    """dW = (B0 + dB)(A0 + dA) - B0 A0 with B0, dB (O, R) and A0, dA (R, I).

    LoRA's B A that starts somewhere else than at zero, seen from its start. PiSSA, OLoRA and LoRA-GA take s B0 A0 out
    of the weight and train B and A; written as here the weight is never edited, dW = 0 exactly whatever B0 and A0, the
    adapter fits the original base, and weight decay pulls towards it. Trained are dB and dA, which start at zero; B0
    and A0 are frozen, saved, and filled by an initialiser. Without one they are LoRA's start, B0 = 0 and A0 at
    U(-1/sqrt(I), 1/sqrt(I)), and this is LoRA.

    dW has rank 2 R: [dB, B0] [A0 + dA; dA], which also says how to compute it without cancellation.

    Args:
        rank: R >= 1.
        rank_dropout: probability, 0 <= p < 1, of dropping an entry of the (T, 2 R) product x [A0 + dA; dA]^T while
            training.

    Raises:
        StructureError: rank below 1, or rank_dropout outside [0, 1).

    Example:
        >>> structure = CentredLowRank(6, 4, rank=2)
        >>> structure.reset_parameters()
        >>> _ = structure.B0.normal_()
        >>> structure.dense().abs().max().item(), [B_or_A.shape[1] for B_or_A in structure.factors()]
        (0.0, [4, 4])
    """

    fast_parameters = ("dB",)
    rank_dims: ClassVar[dict[str, int]] = {"A0": 0, "B0": 1, "dA": 0, "dB": 1}
    A0: Tensor
    B0: Tensor

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        rank: int = 8,
        rank_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features)
        check_count(rank, "CentredLowRank: rank")
        check_dropout(rank_dropout, "CentredLowRank: rank_dropout")
        self.rank_dropout = rank_dropout
        self.dA = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.dB = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.register_buffer("A0", torch.empty(rank, in_features, device=device, dtype=dtype))
        self.register_buffer("B0", torch.empty(out_features, rank, device=device, dtype=dtype))

    @property
    def rank(self) -> int:
        return self.dA.shape[0]

    @property
    def work(self) -> float:
        return 2 * super().work

    def factors(self) -> tuple[Tensor, Tensor]:
        return centred_factors(self.B0, self.A0, self.dB, self.dA)

    def dense(self) -> Tensor:
        return self.dB @ (self.A0 + self.dA) + self.B0 @ self.dA

    def pair(self) -> Pair:
        return Pair(self.dB, self.dA, self.B0 + self.dB, self.A0 + self.dA)

    def rank_sizes(self) -> Tensor:
        A = self.A0 + self.dA
        squares = _squares(self.dB) * _squares(A.t()) + _squares(self.B0) * _squares(self.dA.t())
        return (squares + 2 * (self.dB * self.B0).sum(0) * (A * self.dA).sum(1)).clamp_min(0).sqrt()

    def linear(self, x: Tensor, W: Tensor, bias: Tensor | None, scale: Tensor, dropout: float = 0.0) -> Tensor:
        rank_dropout = self.rank_dropout if self.training else 0.0
        return centred_linear(x, W, bias, self.B0, self.A0, self.dB, self.dA, scale, dropout, rank_dropout)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            bound = 1 / math.sqrt(self.in_features)
            self.A0.uniform_(-bound, bound)
            for t in (self.B0, self.dB, self.dA):
                t.zero_()

    def new_ranks(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        bound = 1 / math.sqrt(self.in_features)
        wide, tall = torch.zeros(count, self.in_features), torch.zeros(self.out_features, count)
        A0 = torch.empty(count, self.in_features).uniform_(-bound, bound, generator=generator)
        return {"A0": A0, "B0": tall, "dA": wide, "dB": tall}

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank, "rank_dropout": self.rank_dropout}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank {self.rank}"


def _squares(B: Tensor) -> Tensor:
    return B.square().sum(0)
