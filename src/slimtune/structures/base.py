"""The noun `Structure`: a parametrised matrix dW.

Shapes: O out, I in, R rank, *T batch dims.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Factored", "Structure"]


class Structure(nn.Module, ABC):
    """An (O, I) matrix dW with few parameters. Subclasses are final and take `(out_features, in_features,
    *, <options>, device=None, dtype=None)`.

    Parameters are allocated, not filled, by `__init__`; `reset_parameters` makes dW = 0 with gradients that
    are not all zero.
    """

    fast_parameters: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters that start at zero and like a larger step (LoRA+'s B)."""

    rank_dropout: float = 0.0
    """Probability of dropping an entry of the (T, R) product, for factored structures."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features

    @property
    def rank(self) -> int | None:
        """The number R that a scale alpha / R**power divides by; None where rank has no meaning."""
        return None

    @abstractmethod
    def dense(self) -> Tensor:
        """dW, (O, I): the definition."""

    def forward(self, x: Tensor) -> Tensor:  # (*T, I) -> (*T, O)
        """x dW^T. Override with a faster way of computing the same."""
        return F.linear(x, self.dense().to(x.dtype))

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the starting values from torch's global generator; afterwards dW = 0."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The constructor's keyword options that rebuild this structure at its present size."""

    def extra_repr(self) -> str:
        return f"{self.out_features} x {self.in_features}"


class Factored(Structure):
    """A structure whose dW = B A is best applied as two thin products."""

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """(B, A): (O, R) and (R, I), differentiable in the parameters."""

    def dense(self) -> Tensor:
        B, A = self.factors()
        return B @ A

    def forward(self, x: Tensor) -> Tensor:
        B, A = self.factors()
        h = F.linear(x, A.to(x.dtype))
        if self.training and self.rank_dropout:
            h = F.dropout(h, self.rank_dropout)
        return F.linear(h, B.to(x.dtype))
