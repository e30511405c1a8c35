"""Kernels of convolutions as products of thin kernels.

Shapes: O out, C in channels of a group, h x w kernel, I = C h w, R rank, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import StructureError
from ..ops.convolution import CONVOLVE, Convolution
from .base import Structure, check_count

__all__ = ["GroupedLowRank", "SeparableKernel"]


class _Thin(Structure):
    """Two thin kernels, of which B starts at zero."""

    fast_parameters = ("B",)
    A: nn.Parameter
    B: nn.Parameter

    def reset_parameters(self) -> None:
        with torch.no_grad():
            bound = 1 / math.sqrt(self.in_features)
            self.A.uniform_(-bound, bound)
            self.B.zero_()


class GroupedLowRank(_Thin):
    """dW whose rows of group g are B_g A_g, with A (G, R, I) and B (G, O / G, R).

    The kernel of a grouped convolution as one with A, of G R outputs and as many groups, and a pointwise one with B.
    With one group it is `LowRank`. B starts at zero, A at U(-1/sqrt(I), 1/sqrt(I)).

    Args:
        rank: R >= 1, of each group.
        groups: G >= 1, a divisor of O.

    Raises:
        StructureError: a count below 1, or groups that do not divide O.

    Example:
        >>> structure = GroupedLowRank(6, 4, rank=1, groups=2)
        >>> structure.A.shape, structure.B.shape
        (torch.Size([2, 1, 4]), torch.Size([2, 3, 1]))
    """

    rank_dims: ClassVar[dict[str, int]] = {"A": 1, "B": 2}

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        rank: int = 8,
        groups: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features)
        check_count(rank, "GroupedLowRank: rank")
        check_count(groups, "GroupedLowRank: groups")
        if out_features % groups:
            raise StructureError(f"GroupedLowRank: {groups} groups do not divide {out_features} outputs")
        self.A = nn.Parameter(torch.empty(groups, rank, in_features, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(groups, out_features // groups, rank, device=device, dtype=dtype))

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    @property
    def work(self) -> float:
        return self.A.shape[0] * self.rank * (self.out_features / self.A.shape[0] + self.in_features)

    def dense(self) -> Tensor:
        return (self.B @ self.A).flatten(0, 1)

    def convolve(self, x: Tensor, by: Convolution, bias: Tensor | None = None) -> Tensor | None:
        groups, rank = self.A.shape[:2]
        if by.groups != groups:
            return None
        A = self.A.view(groups * rank, -1, *by.kernel).to(x.dtype)
        B = self.B.view(self.out_features, rank, *(1,) * len(by.kernel)).to(x.dtype)
        return CONVOLVE[len(by.kernel)](by(x, A), B, bias, groups=groups)

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank, "groups": self.A.shape[0]}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank {self.rank}, groups {self.A.shape[0]}"


class SeparableKernel(_Thin):
    """A 2-d kernel dW[o, c, i, j] = sum_r B[o, r, j] A[r, c, i], with A (R, C, h) and B (O, R, w).

    A vertical convolution of R outputs and then a horizontal one: Jaderberg, Vedaldi and Zisserman 2014, arXiv
    1405.3866, scheme 2; "spatial" in TRP, Xu et al. 2020, arXiv 2004.14566. It has R (C h + O w) numbers. B starts at
    zero, A at U(-1/sqrt(I), 1/sqrt(I)).

    Args:
        rank: R >= 1.
        kernel: (h, w); h w divides I.

    Raises:
        StructureError: a rank below 1, or a kernel that does not fit I.

    Example:
        >>> structure = SeparableKernel(6, 4 * 9, rank=2, kernel=(3, 3))
        >>> structure.A.shape, structure.B.shape
        (torch.Size([2, 4, 3]), torch.Size([6, 2, 3]))
    """

    rank_dims: ClassVar[dict[str, int]] = {"A": 0, "B": 1}

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        rank: int = 8,
        kernel: Sequence[int] = (1, 1),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features)
        check_count(rank, "SeparableKernel: rank")
        if len(kernel) != 2 or in_features % math.prod(kernel):
            raise StructureError(f"SeparableKernel: a 2-d kernel whose size divides {in_features}, got {kernel!r}")
        h, w = self.kernel = (kernel[0], kernel[1])
        self.A = nn.Parameter(torch.empty(rank, in_features // (h * w), h, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(out_features, rank, w, device=device, dtype=dtype))

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def work(self) -> float:
        return self.A.numel() + self.B.numel()

    def dense(self) -> Tensor:
        return torch.einsum("orj,rci->ocij", self.B, self.A).flatten(1)

    def convolve(self, x: Tensor, by: Convolution, bias: Tensor | None = None) -> Tensor | None:
        if by.groups != 1 or by.kernel != self.kernel:
            return None
        h = by.along([0])(x, self.A[..., None].to(x.dtype))
        return by.along([1])(h, self.B[:, :, None].to(x.dtype), bias)

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank, "kernel": list(self.kernel)}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank {self.rank}, kernel {self.kernel[0]} x {self.kernel[1]}"
