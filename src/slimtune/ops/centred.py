"""Products with W + s (B A - B0 A0), both factors trained from where they start.

Shapes: O out, I in, R rank, T batch dims flattened. W (O, I), B0 and dB (O, R), A0 and dA (R, I), x (*T, I),
y (*T, O).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import draw_seed, dropped, keep_probability, kept
from .fused import as_dtype, base_product, fused, traced
from .lowrank import lowrank_linear

__all__ = ["centred_factors", "centred_linear"]


def centred_factors(B0: Tensor, A0: Tensor, dB: Tensor, dA: Tensor) -> tuple[Tensor, Tensor]:
    """([dB, B0], [A0 + dA; dA]), (O, 2 R) and (2 R, I), whose product is (B0 + dB)(A0 + dA) - B0 A0.

    Nothing cancels in it: the two terms of the difference are never formed.

    Example:
        >>> B0, A0, dB, dA = torch.ones(1, 1), torch.ones(1, 1), torch.tensor([[1e-6]]), torch.zeros(1, 1)
        >>> B, A = centred_factors(B0, A0, dB, dA)
        >>> (B @ A).item() == dB.item(), ((B0 + dB) @ (A0 + dA) - B0 @ A0).item() == dB.item()
        (True, False)
    """
    return torch.cat([dB, B0], 1), torch.cat([A0 + dA, dA])


def centred_linear(
    x: Tensor,  # (*T, I)
    W: Tensor,  # (O, I), frozen
    bias: Tensor | None,  # (O,), frozen
    B0: Tensor,  # (O, R), frozen
    A0: Tensor,  # (R, I), frozen
    dB: Tensor,  # (O, R)
    dA: Tensor,  # (R, I)
    scale: Tensor,  # 0-d
    dropout: float = 0.0,
    rank_dropout: float = 0.0,
) -> Tensor:
    """y = x W^T + s drop(x) dW^T + bias with dW = (B0 + dB)(A0 + dA) - B0 A0. Returns (*T, O).

    With dB = dA = 0 this is the bare layer's output bit for bit. Where x has rows enough to pay for it, and W more than
    half precision, to which a small change would be lost, W + s dW is a temporary in both directions and a step costs
    about as much as LoRA's: four thin products beside. Otherwise dW is applied as the product of rank 2 R that
    `centred_factors` gives. `rank_dropout` drops entries of the (T, 2 R) product, dB's and B0's each by themselves.

    One autograd function. It keeps x and, where thin, the (T, 2 R) product; dropout keeps a seed.

    Example:
        >>> x, W, B0, A0, dB, dA = (torch.randn(*s) for s in ((2, 3), (4, 3), (4, 1), (1, 3), (4, 1), (1, 3)))
        >>> y = centred_linear(x, W, None, B0, A0, dB, dA, torch.tensor(0.5))
        >>> torch.allclose(y, x @ (W + 0.5 * ((B0 + dB) @ (A0 + dA) - B0 @ A0)).T, atol=1e-5)
        True
    """
    wanted = torch.is_grad_enabled() and (x.requires_grad or dB.requires_grad or dA.requires_grad)
    if not wanted or scale.requires_grad or traced(x):
        return lowrank_linear(x, W, bias, *centred_factors(B0, A0, dB, dA), scale, None, dropout, rank_dropout)
    mask = F.dropout(x.new_ones(*x.shape[:-1], 2 * len(A0)), rank_dropout) if rank_dropout else None
    seed = draw_seed() if dropout else 0
    return fused(lambda x: _CentredLinear.apply(x, W, bias, B0, A0, dB, dA, scale, dropout, seed, mask), x, W, bias)


def weight_pays(rows: int, W: Tensor, rank: int) -> bool:
    """Whether W + s dW, built in both directions, is cheaper than the thin products that it saves for so many rows."""
    O, I = W.shape
    return W.dtype.itemsize > 2 and O * I * (rank + 16) < rows * (O + I) * rank  # measured; 16 for writing the sum


class _CentredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, bias, B0, A0, dB, dA, scale, dropout, seed, rank_mask):
        t = x.dtype
        x2 = x.reshape(-1, x.shape[-1])  # (T, I)
        h = None
        dense = t == W.dtype and not dropout and rank_mask is None and weight_pays(len(x2), W, len(A0))
        if dense:
            y, _ = base_product(x, _sum(W, B0, A0, dB, dA, scale), bias)
        else:
            B, A = (as_dtype(f, t) for f in centred_factors(B0, A0, dB, dA))
            z = dropped(x2, dropout, seed) if dropout else x2
            h = (z @ A.t()).mul_(_factor(scale, dropout, t))  # (T, 2 R)
            if rank_mask is not None:
                rank_mask = rank_mask.view(h.shape)
                h.mul_(rank_mask)
            y, y2 = base_product(x, W, bias)
            y2.addmm_(h, B.t())
        ctx.dense, ctx.dropout, ctx.seed = dense, dropout, seed
        ctx.save_for_backward(x, W, B0, A0, dB, dA, scale, h, rank_mask)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, W, B0, A0, dB, dA, scale, h, rank_mask = ctx.saved_tensors
        need_x, _, _, _, _, need_B, need_A, *_ = ctx.needs_input_grad
        t, R = x.dtype, len(A0)
        g, x2 = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])  # (T, O), (T, I)
        mask = kept(x2, ctx.dropout, ctx.seed) if ctx.dropout else None
        if torch.is_grad_enabled():  # a second derivative: differentiate the definition
            return _again(ctx, g, x2, mask)
        grad_x = grad_B = grad_A = None
        if ctx.dense:
            s = as_dtype(scale, t)
            if need_B:
                grad_B = (g.t() @ (x2 @ as_dtype(A0 + dA, t).t()).mul_(s)).to(dB.dtype)
            if need_A:
                grad_A = ((g @ as_dtype(B0 + dB, t)).mul_(s).t() @ x2).to(dA.dtype)
            if need_x:
                grad_x = g @ _sum(W, B0, A0, dB, dA, scale)
        else:
            B, A = (as_dtype(f, t) for f in centred_factors(B0, A0, dB, dA))
            q = (g @ B).mul_(_factor(scale, ctx.dropout, t))  # (T, 2 R): the gradient of z A^T
            if rank_mask is not None:
                q.mul_(rank_mask)
            if need_B:
                grad_B = (h[:, :R].t() @ g).t().to(dB.dtype)
            if need_A:
                both = q[:, :R] + q[:, R:]
                grad_A = (both.t() @ (x2 if mask is None else x2 * mask)).to(dA.dtype)
            if need_x:
                grad_x = g @ as_dtype(W, t)
                if mask is None:
                    grad_x.addmm_(q, A)
                else:
                    grad_x.addcmul_(q @ A, mask)
        if grad_x is not None:
            grad_x = grad_x.view(x.shape)
        return grad_x, None, None, None, None, grad_B, grad_A, None, None, None, None


def _sum(W: Tensor, B0: Tensor, A0: Tensor, dB: Tensor, dA: Tensor, scale: Tensor) -> Tensor:
    """W + s dW, (O, I), in W's dtype."""
    B, A = centred_factors(B0, A0, dB, dA)
    return torch.addmm(W, as_dtype(B * scale, W.dtype), as_dtype(A, W.dtype))


def _factor(scale: Tensor, dropout: float, dtype: torch.dtype) -> Tensor:
    s = as_dtype(scale, dtype)
    return s / keep_probability(dropout) if dropout else s


def _again(ctx, g, x2, mask):
    x, W, B0, A0, dB, dA, scale, _, rank_mask = ctx.saved_tensors
    t = x.dtype
    B, A = centred_factors(B0, A0, dB, dA)
    z = x2 if mask is None else x2 * mask
    h = F.linear(z, A.to(t)) * _factor(scale, ctx.dropout, t)
    if rank_mask is not None:
        h = h * rank_mask
    y = F.linear(x2, W.to(t)) + F.linear(h, B.to(t))
    need = (0, 5, 6)
    wanted = [v for v, i in zip((x, dB, dA), need, strict=True) if ctx.needs_input_grad[i]]
    found = iter(torch.autograd.grad(y, wanted, g, create_graph=True))
    every = [next(found) if ctx.needs_input_grad[i] else None for i in need]
    return every[0], None, None, None, None, every[1], every[2], None, None, None, None
