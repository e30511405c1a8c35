"""Toeplitz matrices and products of two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import displaced_matrix, fft_length, toeplitz_gradient, toeplitz_matrix, toeplitz_product
from .circulant import check_std
from .spectral import Spectral

__all__ = ["Toeplitz", "ToeplitzProduct"]


class Toeplitz(Spectral):
    """dW[i, j] = d[j - i + O - 1]: any matrix that is constant along its diagonals, of any shape.

    SURM, Sehanobish et al. 2024, arXiv 2406.17740, lists the Toeplitz variant; the published code has square
    symmetric matrices only. Starts at d = 0.

    Parameter `diagonals` d (O + I - 1,), from the lower left corner to the upper right one: the first column of dW is
    d[:O] backwards, its first row d[O-1:]. A training step in fp32 with rows enough is one GEMM with W + s dW and two
    FFTs of at least O + I - 1 per row for the gradient; in 16 bit the gradient comes from g^T x, which is cheaper
    there. Few rows go through FFTs alone.

    Example:
        >>> structure = Toeplitz(2, 3)
        >>> with torch.no_grad(): _ = structure.diagonals.copy_(torch.arange(4))
        >>> structure.dense().tolist()
        [[1.0, 2.0, 3.0], [0.0, 1.0, 2.0]]
    """

    fast_parameters = ("diagonals",)

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features)
        self.diagonals = nn.Parameter(torch.empty(out_features + in_features - 1, device=device, dtype=dtype))

    @property
    def length(self) -> int:
        return fft_length(self.out_features + self.in_features - 1)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.diagonals,)

    def dense(self) -> Tensor:
        return self.columns(torch.arange(self.in_features, device=self.diagonals.device)).t()

    def matrix(self) -> Tensor:
        return toeplitz_matrix(self.diagonals, self.in_features)

    def product(self, x: Tensor, *parameters: Tensor) -> Tensor:
        return toeplitz_product(x, parameters[0], self.out_features)

    def columns(self, index: Tensor) -> Tensor:
        i = torch.arange(self.out_features, device=self.diagonals.device)
        return self.diagonals[index[..., None] - i + self.out_features - 1]

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...] | None:
        return (toeplitz_gradient(x, g),)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.diagonals.zero_()

    def options(self) -> dict[str, Any]:
        return {}


class ToeplitzProduct(Spectral):
    """dW = T(b) T(a) with symmetric T(v)[i, j] = v[|i - j|] of order N = max(O, I).

    SURM, Sehanobish et al. 2024, arXiv 2406.17740, the symmetric Toeplitz variant, whose published code takes square
    layers only; here a layer that is not square takes the upper left corner. Starts: a ~ N(0, std^2), b = 0, so that
    b alone receives a gradient at the first step.

    Parameters a, b: 2 N numbers. With rows enough dW is built in O(O I log N), not by a product of order N, since it
    changes by rank 2 along its diagonals; few rows go through four FFTs.

    Args:
        std: of a at the start.

    Raises:
        StructureError: std not above 0.

    Example:
        >>> structure = ToeplitzProduct(2, 2)
        >>> with torch.no_grad():
        ...     _ = structure.a.copy_(torch.tensor([1.0, 2.0])), structure.b.copy_(torch.tensor([3.0, 0.0]))
        >>> structure.dense().tolist()
        [[3.0, 6.0], [6.0, 3.0]]
    """

    fast_parameters = ("b",)
    passes = 12
    transforms = 4
    pulls_product = True

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features)
        check_std("ToeplitzProduct", std)
        self.std = float(std)
        self.a = nn.Parameter(torch.empty(self.order, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.empty(self.order, device=device, dtype=dtype))

    @property
    def order(self) -> int:
        """N."""
        return max(self.out_features, self.in_features)

    @property
    def length(self) -> int:
        return fft_length(2 * self.order - 1)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.a, self.b

    def dense(self) -> Tensor:
        n, O, I = self.order, self.out_features, self.in_features
        i, k, j = (torch.arange(s, device=self.a.device) for s in (O, n, I))
        return self.b[(i[:, None] - k).abs()] @ self.a[(k[:, None] - j).abs()]

    def matrix(self) -> Tensor:
        # M[i, j] = M[i - 1, j - 1] + b[i] a[j] - b[N - i] a[N - j]
        n, O, I = self.order, self.out_features, self.in_features
        a, b = self.a, self.b
        A, B = (torch.cat([v[1:].flip(0), v]) for v in (a, b))
        row, column = toeplitz_product(b, A, n)[:I].to(a.dtype), toeplitz_product(a, B, n)[:O].to(a.dtype)
        left = torch.stack([b[1:O], -b[n - O + 1 :].flip(0)], 1)
        right = torch.stack([a[1:I], a[n - I + 1 :].flip(0)])
        return displaced_matrix(row, column, left, right)

    def product(self, x: Tensor, *parameters: Tensor) -> Tensor:
        A, B = (torch.cat([v[1:].flip(0), v]) for v in parameters)  # T(v)'s diagonals
        n = self.order
        # the diagonals of the corner T(v)[:O, :I] are N - O .. N + I - 2
        inner = toeplitz_product(x, A[: n + self.in_features - 1], n)
        return toeplitz_product(inner, B[n - self.out_features :], self.out_features)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.a.normal_(0, self.std)
            self.b.zero_()

    def options(self) -> dict[str, Any]:
        return {"std": self.std}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, order {self.order}"
