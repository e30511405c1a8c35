"""Matrices of circulant blocks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StructureError
from ..ops import block_circulant_gradient, block_circulant_matrix, block_circulant_product
from .spectral import Spectral

__all__ = ["BlockCirculant"]


class BlockCirculant(Spectral):
    """dW[i N + k, j N + l] = f w[i, j, (l - k) mod N]: circulant blocks of N x N, given by their first rows.

    C3A, Chen et al. 2024, arXiv 2407.19342, eq. 1, with f = 1 / I for normalization "published" and f = 1 for "unit",
    where entries of w are entries of dW: a step of AdamW moves them by the learning rate, whatever the width, so
    that usual rates do. `kernel_for` converts exactly; a published rate r is a rate r / I here, and weight decay per
    step keeps its meaning. Starts at w = 0; the paper draws w small, which it found not to matter.

    Where N does not divide a side, x is padded with zeros to a multiple of N and outputs from O on are dropped
    (published code refuses). Parameter `kernel` w (ceil(O / N), ceil(I / N), N). Linear in w; the gradient in x is
    the transpose, which it is not in the paper's algorithm A1 and in PEFT.

    A training step with rows enough is one GEMM with W + s dW and FFTs of x and g for the gradient; few rows go
    through FFTs alone.

    Args:
        block: N >= 1. None takes the common divisor of O and I nearest to sqrt(O I) / 8, on a logarithmic scale, if
            one is within a factor of 4 of it, and otherwise the power of two that is nearest, with padding. `options()`
            and the module's representation say what was chosen.
        normalization: "unit" or "published".

    Raises:
        StructureError: block below 1 or above max(O, I), or another normalization.

    Example:
        >>> structure = BlockCirculant(2, 4, block=2)
        >>> with torch.no_grad(): _ = structure.kernel.copy_(torch.arange(4.0).view(1, 2, 2))
        >>> structure.dense().tolist()
        [[0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 3.0, 2.0]]
    """

    fast_parameters = ("kernel",)

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        block: int | None = None,
        normalization: str = "unit",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features)
        largest = max(out_features, in_features)
        if block is None:
            block = choose_block(out_features, in_features)
        if isinstance(block, bool) or not isinstance(block, int) or not 1 <= block <= largest:
            raise StructureError(
                f"BlockCirculant: block must be a whole number from 1 to {largest} for a layer of {out_features} x "
                f"{in_features}, got {block!r}; without padding: {_divisors(out_features, in_features)}"
            )
        self._check(normalization)
        self.block, self.normalization = block, normalization
        shape = (-(-out_features // block), -(-in_features // block), block)
        self.kernel = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    @staticmethod
    def _check(normalization: object) -> None:
        if normalization not in ("unit", "published"):
            raise StructureError(f"BlockCirculant: normalization must be 'unit' or 'published', got {normalization!r}")

    def factor(self, normalization: str | None = None) -> float:
        """f, by which entries of w are multiplied; of this structure's own normalization by default."""
        name = self.normalization if normalization is None else normalization
        self._check(name)
        return 1 / self.in_features if name == "published" else 1.0

    def kernel_for(self, normalization: str) -> Tensor:
        """The w, (Km, Kn, N), that gives the same dW under another normalization.

        Example:
            >>> structure = BlockCirculant(4, 4, block=4)
            >>> with torch.no_grad(): _ = structure.kernel.fill_(1.0)
            >>> structure.kernel_for("published").tolist()
            [[[4.0, 4.0, 4.0, 4.0]]]
        """
        ratio = self.factor() / self.factor(normalization)
        return self.kernel.detach() * ratio

    @property
    def length(self) -> int:
        return self.block

    @property
    def work(self) -> float:
        m, n, b = self.kernel.shape
        transforms = 5 * (m + n) * b * math.log2(max(2, b)) + 2 * (m + n) * b  # short ones cost more than their share
        return 2 * transforms + 10 * m * n * (b // 2 + 1)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.kernel,)

    def _scaled(self, w: Tensor) -> Tensor:
        return w if self.normalization == "unit" else w * self.factor()

    def dense(self) -> Tensor:
        w, b = self._scaled(self.kernel), self.block
        i, j = torch.arange(self.out_features, device=w.device), torch.arange(self.in_features, device=w.device)
        return w[i[:, None] // b, j // b, (j % b - i[:, None] % b) % b]

    def matrix(self) -> Tensor:
        return block_circulant_matrix(self._scaled(self.kernel))[: self.out_features, : self.in_features]

    def product(self, x: Tensor, *parameters: Tensor) -> Tensor:
        return block_circulant_product(x, self._scaled(parameters[0]), self.out_features)

    def columns(self, index: Tensor) -> Tensor:
        w, b = self._scaled(self.kernel), self.block
        i, j = torch.arange(self.out_features, device=w.device), index[..., None]
        return w[i // b, j // b, (j % b - i % b) % b]

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return (self._scaled(block_circulant_gradient(x, g, tuple(self.kernel.shape))),)  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.kernel.zero_()

    def options(self) -> dict[str, Any]:
        return {"block": self.block, "normalization": self.normalization}

    def extra_repr(self) -> str:
        m, n, b = self.kernel.shape
        padded = "" if (m * b, n * b) == (self.out_features, self.in_features) else f" padded to {m * b} x {n * b}"
        return f"{super().extra_repr()}{padded}, block {b}, {self.normalization}"


def choose_block(out_features: int, in_features: int) -> int:
    """The block of a layer that was given none; see `BlockCirculant`.

    Example:
        >>> [choose_block(*size) for size in ((512, 512), (1408, 512), (768, 768), (896, 4864), (101, 97))]
        [64, 128, 96, 128, 16]
    """
    target = math.sqrt(out_features * in_features) / 8

    def distance(b: int) -> float:
        return abs(math.log(b / target))

    near = min(_divisors(out_features, in_features), key=distance)
    if target <= 1 or distance(near) <= math.log(4) + 1e-9:
        return near
    return 2 ** round(math.log2(target))


def _divisors(out_features: int, in_features: int) -> list[int]:
    common = math.gcd(out_features, in_features)
    return [b for b in range(1, common + 1) if common % b == 0]
