"""Circulant matrices, and sums of products of circulant and skew-circulant ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StructureError
from ..ops import (
    circulant_gradient,
    circulant_matrix,
    circulant_product,
    displaced_matrix,
    ldr_product,
    skew_circulant_matrix,
    skew_product,
)
from .base import check_count
from .spectral import Spectral

__all__ = ["LDR", "Circulant"]


class Circulant(Spectral):
    """dW[i, j] = c[(i - j) mod N], c = a * b entry by entry, N = max(O, I).

    SURM, Sehanobish et al. 2024, arXiv 2406.17740, the circulant variant with first-column convention. Published for
    square layers; here a layer that is not square takes the upper left corner of the square matrix, which is padding
    x with zeros to N and dropping outputs from O on. a * b is not a product of two circulants, C(a) C(b) is the
    circulant of their cyclic convolution: b only gives a start at zero. Starts: a ~ N(0, std^2), b = 0, so that b
    alone receives a gradient at the first step; or c = 0.

    Parameters `a`, `b` (N,), or `c` (N,) alone. A training step with rows enough is one GEMM with W + s dW and two
    FFTs of N per row for the gradient; few rows go through FFTs alone. N with large prime factors is slow.

    Args:
        hadamard: c = a * b, as published; False trains c itself.
        std: of a at the start.

    Raises:
        StructureError: std not above 0.

    Example:
        >>> structure = Circulant(3, 2, hadamard=False)
        >>> with torch.no_grad(): _ = structure.c.copy_(torch.tensor([1.0, 2.0, 3.0]))
        >>> structure.dense().tolist()
        [[1.0, 3.0], [2.0, 1.0], [3.0, 2.0]]
    """

    a: Tensor
    b: Tensor
    c: Tensor

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        hadamard: bool = True,
        std: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features)
        check_std("Circulant", std)
        self.hadamard, self.std = bool(hadamard), float(std)
        for name in ("a", "b") if hadamard else ("c",):
            self.register_parameter(name, nn.Parameter(torch.empty(self.length, device=device, dtype=dtype)))

    @property
    def fast_parameters(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("b",) if self.hadamard else ("c",)

    @property
    def length(self) -> int:
        return max(self.out_features, self.in_features)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a, self.b) if self.hadamard else (self.c,)

    def _vector(self) -> Tensor:
        return self.a * self.b if self.hadamard else self.c

    def dense(self) -> Tensor:
        c = self._vector()
        i, j = torch.arange(self.out_features, device=c.device), torch.arange(self.in_features, device=c.device)
        return c[(i[:, None] - j) % self.length]

    def matrix(self) -> Tensor:
        return circulant_matrix(self._vector(), self.out_features, self.in_features)

    def product(self, x: Tensor, *parameters: Tensor) -> Tensor:
        return circulant_product(x, math.prod(parameters[1:], start=parameters[0]), self.out_features)

    def columns(self, index: Tensor) -> Tensor:
        c = self._vector()
        return c[(torch.arange(self.out_features, device=c.device) - index[..., None]) % self.length]

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        of_c = circulant_gradient(x, g, self.length)
        return (of_c * self.b, of_c * self.a) if self.hadamard else (of_c,)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            if self.hadamard:
                self.a.normal_(0, self.std)
                self.b.zero_()
            else:
                self.c.zero_()

    def options(self) -> dict[str, Any]:
        return {"hadamard": self.hadamard, "std": self.std}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, order {self.length}{', a * b' if self.hadamard else ''}"


class LDR(Spectral):
    """dW = sum_k C(g_k) S(h_k), k < K: circulant times skew-circulant matrices of order N = max(O, I).

        C(g)[i, j] = g[(i - j) mod N]
        S(h)[i, j] = h[i - j] for i >= j, -h[N + i - j] for i < j

    SURM, Sehanobish et al. 2024, arXiv 2406.17740, the matrices of low displacement rank; the published code's
    factors alpha_k are absorbed by g_k. Any Toeplitz matrix is C(g) + S(h); with K terms this is every matrix whose
    displacement has rank K. A layer that is not square takes the upper left corner. Starts: h ~ N(0, std^2), g = 0,
    so that g alone receives a gradient at the first step.

    Parameters g, h (K, N): 2 K N numbers. With rows enough dW is built in O(O I (K + log N)), never by products of
    order N; few rows go through 3 K + 2 FFTs.

    Args:
        terms: K >= 1.
        std: of h at the start.

    Raises:
        StructureError: terms below 1, or std not above 0.

    Example:
        >>> structure = LDR(4, 4, terms=2)
        >>> structure.reset_parameters()
        >>> structure.dense().abs().max().item()
        0.0
    """

    fast_parameters = ("g",)
    passes = 12
    pulls_product = True

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        terms: int = 2,
        std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features)
        check_count(terms, "LDR: terms")
        check_std("LDR", std)
        self.std = float(std)
        self.transforms = 2 + 4 * terms  # a complex one counts for two
        self.g = nn.Parameter(torch.empty(terms, self.length, device=device, dtype=dtype))
        self.h = nn.Parameter(torch.empty(terms, self.length, device=device, dtype=dtype))

    @property
    def length(self) -> int:
        return max(self.out_features, self.in_features)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.g, self.h

    def dense(self) -> Tensor:
        n, O, I = self.length, self.out_features, self.in_features
        return (circulant_matrix(self.g, O, n) @ skew_circulant_matrix(self.h, n, I)).sum(0)

    def matrix(self) -> Tensor:
        # Z C = C Z for the cyclic shift Z, S Z' = Z' S for the skew one, and Z - Z' = 2 e_0 e_{N-1}^T, so that
        # M[i, j] = M[i - 1, j - 1] - 2 sum_k g_k[i] h_k[N - j]
        n, O, I = self.length, self.out_features, self.in_features
        g, h = self.g, self.h
        column = circulant_product(h, g, O).sum(0).to(h.dtype)
        g_row = torch.cat([g[:, :1], g[:, 1:].flip(1)], 1)
        h_row = torch.cat([h[:, :1], -h[:, 1:].flip(1)], 1)
        row = skew_product(g_row, h_row)[:, :I].sum(0).to(h.dtype)
        return displaced_matrix(row, column, (-2 * g[:, 1:O]).t(), h[:, n - I + 1 :].flip(1))

    def product(self, x: Tensor, *parameters: Tensor) -> Tensor:
        g, h = parameters
        return ldr_product(x, g, h, self.out_features)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.h.normal_(0, self.std)
            self.g.zero_()

    def options(self) -> dict[str, Any]:
        return {"terms": self.g.shape[0], "std": self.std}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, order {self.length}, {self.g.shape[0]} terms"


def check_std(name: str, std: object) -> None:
    if isinstance(std, bool) or not isinstance(std, (int, float)) or not 0 < std < math.inf:
        raise StructureError(f"{name}: std must be a finite number above 0, got {std!r}")
