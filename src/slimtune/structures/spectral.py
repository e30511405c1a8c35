"""What the structures with a fast Fourier transform have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ..ops import recomputed
from .base import Structure

__all__ = ["Spectral"]


class Spectral(Structure):
    """A structure whose `product` is a chain of FFTs, in fp32 (fp64 for fp64 inputs) whatever the dtype of x.

    With rows enough, `linear` is one GEMM with W + s dW all the same: dW is cheap to build, and no FFT beats a GEMM
    that is done anyway. The chain serves few rows and dropout; it keeps x alone for the backward pass.
    """

    transforms: int = 2
    """Real transforms in `product`."""

    passes: ClassVar[int] = 1
    """Times that `matrix` writes dW."""

    pulls_product: ClassVar[bool] = False
    """Whether the gradients are taken from g^T x."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Of one transform."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters."""

    @abstractmethod
    def product(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """x dW^T, (*T, I) -> (*T, O), for these parameters instead of the own ones."""

    @property
    def work(self) -> float:
        # one real transform of 512 numbers takes as long as some 40,000 multiply-adds of a GEMM
        return self.transforms * 10 * self.length * math.log2(max(2, self.length))

    def _weight_pays(self, rows: int) -> bool:
        size = self.out_features * self.in_features
        spared = 3 * self.work - size if self.pulls_product else 2 * self.work
        return rows * spared > 32 * self.passes * size

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():  # FFT libraries refuse an empty batch
            return super().forward(x)
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return recomputed(lambda x, *p: self.product(x, *p).to(x.dtype), x, *self.tensors())
