"""Gradients of two factors that follow the gradient of their product, after LoRA-Pro (arXiv 2407.18242).

Shapes: O out, I in, R rank, *T batch dims; the weight is W + s B A with B (O, R) and A (R, I), and g is its gradient,
(O, I), which nothing here needs. No matrix of size (O, O), (I, I) or (O, I) is formed, save by `tangent`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["X_CHOICES", "adjusted_gradients", "carried", "retracted", "tangent"]

X_CHOICES = ("sylvester", "zero", "symmetric")


@torch.no_grad()
def adjusted_gradients(
    A: Tensor,  # (*T, R, I)
    B: Tensor,  # (*T, O, R)
    gA: Tensor,  # (*T, R, I)
    gB: Tensor,  # (*T, O, R)
    scale: Tensor | float,  # broadcasts with (*T, 1, 1)
    X: str = "sylvester",
    damping: float = 0.0,
    absolute: bool = False,
    limits: tuple[Tensor, Tensor] | None = None,  # each broadcasts with (*T, 1, 1)
) -> tuple[Tensor, Tensor]:
    """The directions (hA, hB) that minimise |s B hA + s hB A - g|_F, from gA = s B^T g and gB = s g A^T.

    LoRA-Pro, Wang et al. 2024, arXiv 2407.18242, theorem 2.1:

        hA = (B^T B)^-1 gA / s^2 + X A
        hB = (1 - B (B^T B)^-1 B^T) gB (A A^T)^-1 / s^2 - B X

    for any X (R, R), which moves the factors along each other and leaves s (B hA + hB A) as it is: the projection of g
    on what the two factors can do to first order. The inverses are pseudo-inverses, so that a factor that is still
    zero, and single ranks that are, need no case of their own: with B = 0, hA = 0 and hB = gB (A A^T)^-1 / s^2.
    Computed in at least fp32, through the eigenvalues of the (R, R) Gram matrices.

    Args:
        X: "sylvester", which keeps (hA, hB) closest to (gA, gB): (B^T B) X + X (A A^T) = -(B^T B)^-1 gA A^T / s^2;
            "zero"; or "symmetric", X = -(B^T B)^-1 gA A^T (A A^T)^-1 / (2 s^2), for which |B hA - hB A|_F is least.
        damping: added to the eigenvalues of both Gram matrices, in units of their mean.
        absolute: damping is added as it is.
        limits: the largest norms that the two parts of the step may have: hA and what X puts beside it is shortened to
            |hA|_F <= limits[0], and what is left of hB to limits[1]. A shortened step still goes down.

    Raises:
        ValueError: another X.

    Example:
        >>> A, B, g = torch.randn(2, 5), torch.randn(4, 2), torch.randn(4, 5)
        >>> hA, hB = adjusted_gradients(A, B, 3 * B.T @ g, 3 * g @ A.T, 3)
        >>> step = tangent(A, B, hA, hB, 3)
        >>> bool(torch.isclose((step * g).sum(), (step * step).sum(), rtol=1e-3))
        True
    """
    if X not in X_CHOICES:
        raise ValueError(f"X must be one of {', '.join(X_CHOICES)}, got {X!r}")
    out, work = gA.dtype, torch.promote_types(A.dtype, torch.float32)
    with torch.autocast(A.device.type, enabled=False):
        A, B, gA, gB = (t.to(work) for t in (A, B, gA, gB))
        s2 = torch.as_tensor(scale, dtype=work, device=A.device) ** 2
        s2 = torch.where(s2 == 0, 1, s2)  # both gradients are zero then
        l, Q = torch.linalg.eigh(torch.stack([B.mT @ B, A @ A.mT]))  # (2, *T, R), (2, *T, R, R)
        l = l.clamp_min(0)
        l = l + (damping if absolute else damping * l.mean(-1, keepdim=True))
        floor = l.shape[-1] * torch.finfo(work).eps * l.amax(-1, keepdim=True)
        inverse = torch.where(l > floor, l, torch.inf).reciprocal()
        QB, QA = Q.unbind(0)
        iB, iA = ((q * i.unsqueeze(-2)) @ q.mT for q, i in zip((QB, QA), inverse.unbind(0), strict=True))
        hA = iB @ (gA / s2)
        hB = (gB - B @ (iB @ (B.mT @ gB))) @ (iA / s2)
        if limits is not None:
            hA, hB = _shortened(hA, limits[0]), _shortened(hB, limits[1])
        if X == "zero":
            return hA.to(out), hB.to(out)
        C = hA @ A.mT
        if X == "symmetric":
            shift = -0.5 * C @ iA
        else:
            lB, lA = l.unbind(0)
            sums = (lB.unsqueeze(-1) + lA.unsqueeze(-2)).clamp_min(torch.finfo(work).tiny)
            shift = -QB @ ((QB.mT @ C @ QA) / sums) @ QA.mT
        return (hA + shift @ A).to(out), (hB - B @ shift).to(out)


def _shortened(h: Tensor, limit: Tensor) -> Tensor:
    norm = torch.linalg.matrix_norm(h, keepdim=True)
    return h * (limit / norm.clamp_min(torch.finfo(h.dtype).tiny)).clamp_max(1)


def tangent(A: Tensor, B: Tensor, hA: Tensor, hB: Tensor, scale: Tensor | float) -> Tensor:
    """s (B hA + hB A), (*T, O, I): what a step along (hA, hB) does to the weight, to first order."""
    return (scale * torch.cat([B, hB], -1)) @ torch.cat([hA, A], -2)


def carried(
    A: Tensor, B: Tensor, hA: Tensor, hB: Tensor, A1: Tensor, B1: Tensor, scale: Tensor | float
) -> tuple[Tensor, Tensor]:
    """(s B1^T M, s M A1^T) for M = s (B hA + hB A), which is not formed: the gradients that factors A1, B1 would have
    if M were the gradient of their product. All they can express of M follows from these two thin matrices."""
    s2 = scale**2
    return s2 * ((B1.mT @ B) @ hA + (B1.mT @ hB) @ A), s2 * (B @ (hA @ A1.mT) + hB @ (A @ A1.mT))


@torch.no_grad()
def retracted(A: Tensor, B: Tensor, dA: Tensor, dB: Tensor) -> tuple[Tensor, Tensor]:
    """(A', B') with B' A' the matrix of rank R nearest to B A + B dA + dB A, which leaves out the step's own dB dA.

    By two thin QR decompositions and the SVD of a (2R, 2R) matrix, O(R^2 (O + I)). The rows of A' are orthogonal and
    of one length, so that a rank of which nothing is left can learn again; that length is the larger of the root mean
    square lengths of A's rows and B's columns.

    Example:
        >>> A, B = torch.randn(2, 5), torch.randn(4, 2)
        >>> A1, B1 = retracted(A, B, torch.zeros_like(A), torch.zeros_like(B))
        >>> torch.allclose(B1 @ A1, B @ A, atol=1e-4)
        True
    """
    R, out, work = A.shape[-2], A.dtype, torch.promote_types(A.dtype, torch.float32)
    A, B, dA, dB = (t.to(work) for t in (A, B, dA, dB))
    Q1, R1 = torch.linalg.qr(torch.cat([B, dB], -1))
    Q2, R2 = torch.linalg.qr(torch.cat([A + dA, A], -2).mT)
    U, S, Vh = torch.linalg.svd(R1 @ R2.mT, full_matrices=False)
    length = torch.maximum(torch.linalg.matrix_norm(A, keepdim=True), torch.linalg.matrix_norm(B, keepdim=True))
    length = (length / R**0.5).clamp_min(torch.finfo(work).tiny)
    A1 = length * (Vh[..., :R, :] @ Q2.mT)
    B1 = (Q1 @ U[..., :, :R]) * (S[..., None, :R] / length)
    lacking = R - A1.shape[-2]  # R above min(O, I)
    return F.pad(A1, (0, 0, 0, lacking)).to(out), F.pad(B1, (0, lacking)).to(out)
