"""Circulant matrices, skew-circulant ones, and matrices of circulant blocks.

    C(c)[i, j] = c[(i - j) mod N]                   first column c
    S(h)[i, j] = h[i - j] for i >= j, else -h[N + i - j]    first column h
    block (p, q)[k, l] = w[p, q, (l - k) mod N]     first row w[p, q]

Shapes: O out, I in, N the order, *T batch dims, K blocks per side. Matrices of O <= N rows and I <= N columns are the
upper left corners of square ones.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .toeplitz import spectral_dtype, toeplitz_matrix

__all__ = [
    "block_circulant_gradient",
    "block_circulant_matrix",
    "block_circulant_product",
    "circulant_gradient",
    "circulant_matrix",
    "circulant_product",
    "ldr_product",
    "skew_circulant_matrix",
    "skew_product",
]


def circulant_matrix(c: Tensor, out_features: int, in_features: int) -> Tensor:
    """C(c), (*T, N) -> (*T, O, I).

    Example:
        >>> circulant_matrix(torch.arange(3), 3, 2)
        tensor([[0, 2],
                [1, 0],
                [2, 1]])
    """
    above = c[..., c.shape[-1] - in_features + 1 :]
    return toeplitz_matrix(torch.cat([above, c[..., :out_features]], -1).flip(-1), in_features)


def skew_circulant_matrix(h: Tensor, out_features: int, in_features: int) -> Tensor:
    """S(h), (*T, N) -> (*T, O, I).

    Example:
        >>> skew_circulant_matrix(torch.tensor([1, 2]), 2, 2)
        tensor([[ 1, -2],
                [ 2,  1]])
    """
    above = -h[..., h.shape[-1] - in_features + 1 :]
    return toeplitz_matrix(torch.cat([above, h[..., :out_features]], -1).flip(-1), in_features)


def circulant_product(x: Tensor, c: Tensor, out_features: int) -> Tensor:
    """x C(c)^T by FFT, (*T, I) -> (*T, O), in the `spectral_dtype` of x's dtype."""
    t, n = spectral_dtype(x.dtype), c.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(x.to(t), n) * torch.fft.rfft(c.to(t)), n)[..., :out_features]


def circulant_gradient(x: Tensor, g: Tensor, n: int) -> Tensor:
    """Gradient of sum(g * x C(c)^T) in c: (T, I), (T, O) -> (N,)."""
    t = spectral_dtype(x.dtype)
    X, G = torch.fft.rfft(x.to(t), n), torch.fft.rfft(g.to(t), n)
    return torch.fft.irfft(torch.linalg.vecdot(X, G, dim=0), n)  # conjugates its first argument


def _root(n: int, like: Tensor) -> Tensor:
    """exp(i pi k / N) for k < N: its N-th power is -1, which makes a skew-circulant product a cyclic one."""
    angle = torch.arange(n, device=like.device, dtype=like.dtype) * (math.pi / n)
    return torch.polar(torch.ones_like(angle), angle)


def skew_product(x: Tensor, h: Tensor) -> Tensor:
    """x S(h)^T by FFT for x (*T, I) and h (*T, N), both padded and broadcast: (*T, N)."""
    t, n = spectral_dtype(x.dtype), h.shape[-1]
    eta = _root(n, x.to(t))
    spectrum = torch.fft.fft(eta * F.pad(x.to(t), (0, n - x.shape[-1]))) * torch.fft.fft(eta * h.to(t))
    return (eta.conj() * torch.fft.ifft(spectrum)).real


def ldr_product(x: Tensor, g: Tensor, h: Tensor, out_features: int) -> Tensor:
    """x (sum_k C(g_k) S(h_k))^T by FFT, (*T, I) -> (*T, O), for g and h (K, N)."""
    t, n = spectral_dtype(x.dtype), h.shape[-1]
    inner = torch.fft.rfft(skew_product(x[..., None, :], h))
    return torch.fft.irfft((inner * torch.fft.rfft(g.to(t))).sum(-2), n)[..., :out_features]


def block_circulant_matrix(w: Tensor) -> Tensor:
    """(Km, Kn, N) -> (Km N, Kn N).

    Example:
        >>> block_circulant_matrix(torch.arange(3).view(1, 1, 3))
        tensor([[0, 1, 2],
                [2, 0, 1],
                [1, 2, 0]])
    """
    m, n, b = w.shape
    rows = torch.cat([w, w], -1).unfold(-1, b, 1)[:, :, 1:]  # (Km, Kn, N, N), last row first
    downwards = torch.arange(b - 1, -1, -1, device=w.device)
    # not flip, whose output would take over the order of strides and be copied again
    return rows.permute(0, 2, 1, 3).index_select(1, downwards).reshape(m * b, n * b)


def _blocks(x: Tensor, count: int, b: int) -> Tensor:
    """(*T, I) -> (*T, K, N), padded with zeros, in the `spectral_dtype`."""
    x = x.to(spectral_dtype(x.dtype))
    if x.shape[-1] < count * b:
        x = F.pad(x, (0, count * b - x.shape[-1]))
    return x.unflatten(-1, (count, b))


def block_circulant_product(x: Tensor, w: Tensor, out_features: int) -> Tensor:
    """x dW^T by FFT for dW the upper left corner of the matrix of w (Km, Kn, N): (*T, I) -> (*T, O)."""
    _, n, b = w.shape
    t = spectral_dtype(x.dtype)
    X, K = torch.fft.rfft(_blocks(x, n, b)), torch.fft.rfft(w.to(t))
    y = torch.fft.irfft(torch.einsum("...nf,mnf->...mf", X, K.conj()), b)
    return y.flatten(-2)[..., :out_features]


def block_circulant_gradient(x: Tensor, g: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Gradient of sum(g * x dW^T) in w, of shape (Km, Kn, N): (T, I), (T, O) -> (Km, Kn, N)."""
    m, n, b = shape
    X, G = torch.fft.rfft(_blocks(x, n, b)), torch.fft.rfft(_blocks(g, m, b))
    products = torch.bmm(X.permute(2, 1, 0), G.permute(2, 0, 1).conj_physical())  # one per frequency, (Kn, Km)
    return torch.fft.irfft(products.permute(2, 1, 0), b)
