"""The largest singular values of many matrices, without decomposing them.

Shapes: N matrices, O out, I in, K = min(O, I). M (N, O, I).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["spectral_norm"]

EXACT = {"cpu": 512}
"""K up to which the eigenvalues of the Gram matrix cost less; 128 on other devices."""


@torch.no_grad()
def spectral_norm(M: Tensor, steps: int = 32) -> Tensor:
    """s_1 of each matrix of M (N, O, I), (N,), in M's dtype.

    Where K is small, from the eigenvalues of the K x K Gram matrix. Otherwise by `steps` steps of Lanczos' recursion
    on it (never built), orthogonalised anew in each, from a start that a seed gives: at most s_1, and on Gaussian
    matrices, whose spectrum is flat, within 3e-4 of it at K = 1024. No state is kept from call to call. Where rounding
    alone is left of a step, the recursion ends.

    Example:
        >>> spectral_norm(torch.tensor([[[3.0, 0.0, 4.0], [0.0, 1.0, 0.0]]])).round(decimals=4)
        tensor([5.])
    """
    if M.shape[1] > M.shape[2]:
        M = M.mT
    K = M.shape[1]
    limit = max(steps, EXACT.get(M.device.type, 128))
    if limit >= K:
        return torch.linalg.eigvalsh(M @ M.mT)[:, -1].clamp_min(0).sqrt()
    start = torch.randn(K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = (start / start.norm()).to(M).expand(len(M), K)
    Q = M.new_zeros(len(M), steps, K)
    T = torch.zeros(len(M), steps, steps, dtype=torch.float64, device=M.device)
    scale = torch.linalg.matrix_norm(M).clamp_min(torch.finfo(M.dtype).tiny)[:, None, None]
    for j in range(steps):
        Q[:, j] = q
        w = (M @ ((M.mT @ q[..., None]) / scale))[..., 0] / scale[..., 0]
        T[:, j, j] = (w * q).sum(1)
        for _ in range(2):
            w = w - (Q[:, : j + 1].mT @ (Q[:, : j + 1] @ w[..., None]))[..., 0]
        size = w.norm(dim=1)
        size = torch.where(size > 100 * torch.finfo(M.dtype).eps * T[:, : j + 1].amax((1, 2)), size, 0)
        if j + 1 < steps:
            T[:, j, j + 1] = T[:, j + 1, j] = size
        q = torch.where(size > 0, 1 / size, 0)[:, None] * w
    return torch.linalg.eigvalsh(T)[:, -1].clamp_min(0).sqrt().to(M.dtype) * scale[:, 0, 0]
