"""Low-rank matrices."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import Factored, Pair, check_count, check_dropout

__all__ = ["LowRank"]


class LowRank(Factored):
    """dW = B A with B (O, R), A (R, I); with a core, dW = B diag(core) A.

    LoRA, Hu et al. 2021, arXiv 2106.09685, eq. 3. B starts at zero and A at U(-1/sqrt(I), 1/sqrt(I)), which
    is `kaiming_uniform_(a=sqrt(5))`, so dW = 0 and only B receives a gradient at the first step.

    The core (R,) is that of AdaLoRA, Zhang et al. 2023, arXiv 2303.10512, eq. 3, P Lambda Q there: it starts at zero
    and A and B at N(0, 0.02^2), so that only the core receives a gradient at the first step, and each rank j is one
    triplet (B[:, j], core[j], A[j]) that can be switched off by its core alone.

    Args:
        rank: R >= 1. R may exceed min(O, I), where it only wastes parameters.
        rank_dropout: probability, 0 <= p < 1, of dropping an entry of the (T, R) product x A^T while training.
        core: whether there is one.

    Raises:
        StructureError: rank below 1, or rank_dropout outside [0, 1).

    Example:
        >>> structure = LowRank(6, 4, rank=2)
        >>> structure.reset_parameters()
        >>> structure.dense().abs().max().item()
        0.0
    """

    fast_parameters = ("B",)
    rank_dims: ClassVar[dict[str, int]] = {"A": 0, "B": 1}
    start_deviation = 0.02

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        rank: int = 8,
        rank_dropout: float = 0.0,
        core: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features)
        check_count(rank, "LowRank: rank")
        check_dropout(rank_dropout, "LowRank: rank_dropout")
        self.rank_dropout = rank_dropout
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.has_core = core
        if core:
            self.core = nn.Parameter(torch.empty(rank, device=device, dtype=dtype))
            self.fast_parameters = ("core",)  # type: ignore[misc]
            self.rank_dims = {"A": 0, "B": 1, "core": 0}  # type: ignore[misc]

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        # straight from the dict: attribute look-up on a module costs as much as a small kernel. Replicas
        # (DataParallel) and parametrizations keep plain attributes instead
        own = self._parameters
        B, A = (own["B"], own["A"]) if own else (self.B, self.A)
        return (B, self.core[:, None] * A) if self.has_core else (B, A)  # type: ignore[return-value,operator]

    def pair(self) -> Pair | None:
        return None if self.has_core else Pair(self.B, self.A, self.B, self.A)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            if self.has_core:
                self.A.normal_(std=self.start_deviation)
                self.B.normal_(std=self.start_deviation)
                self.core.zero_()
                return
            bound = 1 / math.sqrt(self.in_features)
            self.A.uniform_(-bound, bound)
            self.B.zero_()

    def new_ranks(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        A, B = torch.empty(count, self.in_features), torch.zeros(self.out_features, count)
        if self.has_core:
            A.normal_(std=self.start_deviation, generator=generator)
            B.normal_(std=self.start_deviation, generator=generator)
            return {"A": A, "B": B, "core": torch.zeros(count)}
        bound = 1 / math.sqrt(self.in_features)
        return {"A": A.uniform_(-bound, bound, generator=generator), "B": B}

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"rank": self.rank, "rank_dropout": self.rank_dropout}
        return options | {"core": True} if self.has_core else options

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank {self.rank}"
