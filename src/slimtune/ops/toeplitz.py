"""Matrices that are constant, or change by a low rank, along their diagonals.

Shapes: O out, I in, T batch dims, N the length of a transform. Entry [i, j] of a matrix lies on diagonal
p = j - i + O - 1, so that p runs over 0 .. O + I - 2 from the lower left corner to the upper right one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import traced

__all__ = [
    "diagonal_totals",
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
    rows = diagonals.unfold(-1, in_features, 1)
    # not flip, whose output would take over the order of strides
    return rows.index_select(-2, torch.arange(rows.shape[-2] - 1, -1, -1, device=rows.device))


def toeplitz_product(x: Tensor, diagonals: Tensor, out_features: int) -> Tensor:
    """x T^T by FFT, (*T, I) -> (*T, O), in the `spectral_dtype` of x's dtype."""
    t = spectral_dtype(x.dtype)
    O, v = out_features, diagonals.to(t)
    n = fft_length(v.shape[-1])
    kernel = torch.cat([v[:O].flip(0), v.new_zeros(n - v.shape[-1]), v[O:].flip(0)])
    spectrum = torch.fft.rfft(x.to(t), n) * torch.fft.rfft(kernel)
    return torch.fft.irfft(spectrum, n)[..., :O]


def toeplitz_gradient(x: Tensor, g: Tensor) -> Tensor:
    """Gradient of sum(g * x T^T) in the diagonals: (T, I), (T, O) -> (O + I - 1,).

    By FFT; in 16 bit from g^T x, whose product is cheaper there.
    """
    if x.dtype.itemsize < 4:
        return diagonal_totals(g.t() @ x)
    t = spectral_dtype(x.dtype)
    O, I = g.shape[-1], x.shape[-1]
    n = fft_length(O + I - 1)
    X, G = torch.fft.rfft(x.to(t), n), torch.fft.rfft(g.to(t), n)
    lags = torch.fft.irfft(torch.linalg.vecdot(G, X, dim=0), n)  # conjugates its first argument
    return torch.cat([lags[n - O + 1 :], lags[:I]])


def diagonal_totals(G: Tensor) -> Tensor:
    """sum of G[..., i, j] over j - i + O - 1 = p: (*T, O, I) -> (*T, O + I - 1), in at least fp32.

    The transpose of `toeplitz_matrix`.

    Example:
        >>> diagonal_totals(torch.tensor([[1, 2, 3], [0, 1, 2]]).float())
        tensor([0., 2., 4., 3.])
    """
    O, I = G.shape[-2:]
    # read with one column less, each row of the padded matrix slides by one
    G = G.to(torch.promote_types(G.dtype, torch.float32))  # summing in a wider dtype than that of the terms is slow
    padded = F.pad(G.flip(-2), (0, O)).flatten(-2)[..., : O * (O + I - 1)]
    return padded.unflatten(-1, (O, O + I - 1)).sum(-2)


def displaced_matrix(row: Tensor, column: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """M with M[0] = row (I,), M[:, 0] = column (O,) and M[i, j] = M[i - 1, j - 1] + (U V)[i - 1, j - 1], (O, I).

    For U (O - 1, R), V (R, I - 1); row[0] = column[0]. A sum along diagonals in log2(min(O, I)) passes.

    Example:
        >>> U, V = torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0]])
        >>> displaced_matrix(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0, 5.0]), U, V)
        tensor([[ 1.,  2.],
                [ 3., 11.],
                [ 5., 23.]])
    """
    below = torch.cat([column.new_zeros(1), column[1:]])
    corner = F.pad(column.new_ones(1), (0, max(len(row), len(column)) - 1))
    left = torch.cat([corner[: len(column), None], below[:, None], F.pad(U, (0, 0, 1, 0))], 1)
    right = torch.cat([row[None], corner[None, : len(row)], F.pad(V, (1, 0))])
    if not left.is_meta and torch.is_autocast_enabled(left.device.type):
        with torch.autocast(left.device.type, enabled=False):  # differences in 16 bit would add up
            D = left @ right
    else:
        D = left @ right
    if traced(D):
        return _running(D)
    return _Running.apply(D, False)


def _running(M: Tensor) -> Tensor:
    """sum_t M[i - t, j - t]: sums along diagonals, from the top left."""
    step = 1
    while step < min(M.shape):
        M = M + F.pad(M[:-step, :-step], (step, 0, step, 0))
        step *= 2
    return M


class _Running(torch.autograd.Function):
    """`_running` without an intermediate per pass, or from the bottom right."""

    @staticmethod
    def forward(ctx, M, back):
        ctx.back = back
        if min(M.shape) == 1:
            return M.clone()
        spare, step = [torch.empty_like(M), torch.empty_like(M)], 1
        while step < min(M.shape):
            new = spare.pop()
            if back:
                new[-step:] = M[-step:]
                new[:-step, -step:] = M[:-step, -step:]
                torch.add(M[:-step, :-step], M[step:, step:], out=new[:-step, :-step])
            else:
                new[:step] = M[:step]
                new[step:, :step] = M[step:, :step]
                torch.add(M[step:, step:], M[:-step, :-step], out=new[step:, step:])
            if step > 1:
                spare.append(M)
            M, step = new, 2 * step
        return M

    @staticmethod
    def backward(ctx, grad):
        return _Running.apply(grad, not ctx.back), None
