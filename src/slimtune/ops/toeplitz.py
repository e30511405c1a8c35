"""Matrices that are constant, or change by a low rank, along their diagonals.

Shapes: O out, I in, T batch dims, N the length of a transform. Entry [i, j] of a matrix lies on diagonal
p = j - i + O - 1, so that p runs over 0 .. O + I - 2 from the lower left corner to the upper right one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "displaced_matrix",
    "fft_length",
    "spectral_dtype",
    "toeplitz_gradient",
    "toeplitz_matrix",
    "toeplitz_product",
]


def spectral_dtype(dtype: torch.dtype) -> torch.dtype:
    """The real dtype to transform in: fp64 for fp64, else fp32."""
    return dtype if dtype == torch.float64 else torch.float32


def fft_length(at_least: int) -> int:
    """The smallest even 2^a 3^b 5^c that is not smaller.

    Example:
        >>> [fft_length(n) for n in (1, 7, 1919)]
        [2, 8, 1920]
    """
    best = 1 << max(1, (at_least - 1).bit_length())
    five = 1
    while five < best:
        odd = five
        while odd < best:
            n = 2 * odd
            while n < at_least:
                n *= 2
            best = min(best, n)
            odd *= 3
        five *= 5
    return best


def toeplitz_matrix(diagonals: Tensor, in_features: int) -> Tensor:
    """T[..., i, j] = diagonals[..., j - i + O - 1]: (*T, O + I - 1) -> (*T, O, I).

    Example:
        >>> toeplitz_matrix(torch.arange(4), 3)
        tensor([[1, 2, 3],
                [0, 1, 2]])
    """
    return diagonals.unfold(-1, in_features, 1).flip(-2)


def toeplitz_product(x: Tensor, diagonals: Tensor, out_features: int) -> Tensor:
    """x T^T by FFT, (*T, I) -> (*T, O), in the `spectral_dtype` of x's dtype."""
    t = spectral_dtype(x.dtype)
    O, v = out_features, diagonals.to(t)
    n = fft_length(v.shape[-1])
    kernel = torch.cat([v[:O].flip(0), v.new_zeros(n - v.shape[-1]), v[O:].flip(0)])
    spectrum = torch.fft.rfft(x.to(t), n) * torch.fft.rfft(kernel)
    return torch.fft.irfft(spectrum, n)[..., :O]


def toeplitz_gradient(x: Tensor, g: Tensor) -> Tensor:
    """Gradient of sum(g * x T^T) in the diagonals: (T, I), (T, O) -> (O + I - 1,)."""
    t = spectral_dtype(x.dtype)
    O, I = g.shape[-1], x.shape[-1]
    n = fft_length(O + I - 1)
    X, G = torch.fft.rfft(x.to(t), n), torch.fft.rfft(g.to(t), n)
    lags = torch.fft.irfft(torch.linalg.vecdot(G, X, dim=0), n)  # conjugates its first argument
    return torch.cat([lags[n - O + 1 :], lags[:I]])


def displaced_matrix(row: Tensor, column: Tensor, D: Tensor) -> Tensor:
    """M with M[0] = row (I,), M[:, 0] = column (O,) and M[i, j] = M[i - 1, j - 1] + D[i - 1, j - 1], (O, I).

    A sum along diagonals in log2(min(O, I)) passes. D is (O - 1, I - 1).

    Example:
        >>> displaced_matrix(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0, 5.0]), torch.tensor([[10.0], [20.0]]))
        tensor([[ 1.,  2.],
                [ 3., 11.],
                [ 5., 23.]])
    """
    M = torch.cat([row[None], torch.cat([column[1:, None], D], 1)])
    step = 1
    while step < min(M.shape):
        M = M + F.pad(M[:-step, :-step], (step, 0, step, 0))
        step *= 2
    return M
