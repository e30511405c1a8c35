"""Low-rank matrices."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StructureError
from .base import Factored, check_count

__all__ = ["LowRank"]


class LowRank(Factored):
    """dW = B A with B (O, R), A (R, I).

    LoRA, Hu et al. 2021, arXiv 2106.09685, eq. 3. B starts at zero and A at U(-1/sqrt(I), 1/sqrt(I)), which
    is `kaiming_uniform_(a=sqrt(5))`, so dW = 0 and only B receives a gradient at the first step.

    Args:
        rank: R >= 1. R may exceed min(O, I), where it only wastes parameters.
        rank_dropout: probability, 0 <= p < 1, of dropping an entry of the (T, R) product x A^T while training.

    Raises:
        StructureError: rank below 1, or rank_dropout outside [0, 1).

    Example:
        >>> structure = LowRank(6, 4, rank=2)
        >>> structure.reset_parameters()
        >>> structure.dense().abs().max().item()
        0.0
    """

    fast_parameters = ("B",)

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
        check_count(rank, "LowRank: rank")
        if not 0 <= rank_dropout < 1:
            raise StructureError(f"LowRank: rank_dropout must be in [0, 1), got {rank_dropout!r}")
        self.rank_dropout = rank_dropout
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        # straight from the dict: attribute look-up on a module costs as much as a small kernel. Replicas
        # (DataParallel) and parametrizations keep plain attributes instead
        own = self._parameters
        return (own["B"], own["A"]) if own else (self.B, self.A)  # type: ignore[return-value]

    def reset_parameters(self) -> None:
        with torch.no_grad():
            bound = 1 / math.sqrt(self.in_features)
            self.A.uniform_(-bound, bound)
            self.B.zero_()

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank, "rank_dropout": self.rank_dropout}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank {self.rank}"
