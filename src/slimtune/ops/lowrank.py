"""Products with W + s B A that never form B A.

Shapes: O out, I in, R rank, T batch dims flattened. W (O, I), B (O, R), A (R, I), x (*T, I), y (*T, O).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import draw_seed, dropped, keep_probability, kept, seeded_dropout
from .fused import as_dtype, base_product, fused, traced

__all__ = ["lowrank_linear", "row_square_after_update"]


def lowrank_linear(
    x: Tensor,  # (*T, I)
    W: Tensor,  # (O, I), frozen
    bias: Tensor | None,  # (O,), frozen
    B: Tensor,  # (O, R)
    A: Tensor,  # (R, I)
    scale: Tensor,  # 0-d
    row_scale: Tensor | None = None,  # (O,)
    dropout: float = 0.0,
    rank_dropout: float = 0.0,
    column_scale: Tensor | None = None,  # (I,)
) -> Tensor:
    """y = d * (z W^T + s drop(z) A^T B^T) + bias, with z = x * e, d = `row_scale` and e = `column_scale` (ones when
    None). Returns (*T, O).

    With d = e = 1 and B = 0 this is the bare layer's output bit for bit: a bias goes through the same fused product and
    is put right by bias * (1 - d).

    `rank_dropout` drops entries of z A^T instead of z. B and A may be of higher precision than x: they are
    cast for the products and their gradients come back in their own dtype. One autograd function: it keeps
    x in x's own dtype, the (T, R) product, and, with `row_scale`, one (T, O) output; dropout keeps a seed.

    Example:
        >>> x, W = torch.randn(2, 3), torch.randn(4, 3)
        >>> B, A, s = torch.randn(4, 1), torch.randn(1, 3), torch.tensor(0.5)
        >>> torch.allclose(lowrank_linear(x, W, None, B, A, s), x @ (W + s * B @ A).T, atol=1e-5)
        True
    """
    if traced(x):
        return _composed(x, W, bias, B, A, scale, row_scale, dropout, rank_dropout, column_scale)
    if not torch.is_grad_enabled():
        return _plain(x, W, bias, B, A, scale, row_scale, dropout, rank_dropout, column_scale)
    return fused(
        lambda x: _differentiable(x, W, bias, B, A, scale, row_scale, dropout, rank_dropout, column_scale), x, W, bias
    )


def _differentiable(x, W, bias, B, A, scale, row_scale, dropout, rank_dropout, column_scale):
    if scale.requires_grad:
        B, scale = scale * B, torch.ones_like(scale)
    mask = _rank_mask(x, A, rank_dropout)
    seed = draw_seed() if dropout else 0
    return _LowRankLinear.apply(x, W, bias, B, A, scale, row_scale, dropout, seed, mask, column_scale)


def _rank_mask(like, A, rank_dropout):
    return F.dropout(like.new_ones(like.shape[:-1] + A.shape[:1]), rank_dropout) if rank_dropout else None


def _composed(x, W, bias, B, A, scale, row_scale, dropout, rank_dropout, column_scale):
    """The definition in autograd's own operations; what a compiler fuses best."""
    t = x.dtype
    if column_scale is not None:
        x = x * column_scale.to(t)
    z = F.dropout(x, dropout) if dropout else x
    h = F.linear(z, A.to(t)) * scale.to(t)
    if rank_dropout:
        h = F.dropout(h, rank_dropout)
    if row_scale is None:  # as one accumulating product, which inductor keeps faster than a sum of two
        y = F.linear(x, W.to(t), None if bias is None else bias.to(t))
        return torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), B.to(t).t()).view(y.shape)
    update = F.linear(h, B.to(t))
    d = row_scale.to(t)
    if bias is None:
        return (F.linear(x, W.to(t)) + update) * d
    b = bias.to(t)
    return (F.linear(x, W.to(t), b) + update) * d + b * (1 - d)


def _plain(x, W, bias, B, A, scale, row_scale, dropout, rank_dropout, column_scale):
    """No gradient wanted: the fewest kernels. Under autocast the first product says which dtype it wants."""
    if column_scale is not None:
        x = x * as_dtype(column_scale, x.dtype)
    y = F.linear(x, W, bias)
    t = y.dtype
    mask = _rank_mask(y, A, rank_dropout)  # before the seed, as with gradients
    z = seeded_dropout(x, dropout) if dropout else x
    h = F.linear(z, as_dtype(A, t)).mul_(scale)
    if mask is not None:
        h.mul_(mask)
    if y.dim() == 2:
        y.addmm_(h, as_dtype(B, t).t())
    else:
        y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), as_dtype(B, t).t())
    if row_scale is not None:
        d = as_dtype(row_scale, t)
        y.mul_(d)
        if bias is not None:
            y.add_(as_dtype(bias, t) * (1 - d))
    return y


class _LowRankLinear(torch.autograd.Function):
    """Forward and backward written out so that both directions end in one accumulating GEMM."""

    @staticmethod
    def forward(ctx, x, W, bias, B, A, scale, row_scale, dropout, seed, rank_mask, column_scale):
        t, shape = x.dtype, x.shape
        W_, A_, B_, s = as_dtype(W, t), as_dtype(A, t), as_dtype(B, t), as_dtype(scale, t)
        x2 = x.reshape(-1, shape[-1])  # (T, I)
        e = None if column_scale is None else as_dtype(column_scale, t)
        if e is not None:
            x2 = x2 * e
        z = dropped(x2, dropout, seed) if dropout else x2
        h = (z @ A_.t()).mul_(s / keep_probability(dropout) if dropout else s)  # (T, R)
        if rank_mask is not None:
            rank_mask = rank_mask.view(h.shape)
            h.mul_(rank_mask)
        d = None if row_scale is None else as_dtype(row_scale, t)
        b = None if bias is None else as_dtype(bias, t)
        y, y2 = base_product(x2.view(shape), W_, b)
        y2.addmm_(h, B_.t())
        u = None
        if d is not None:
            # y / d gives the unscaled output back, unless a bias or fp16's range is in the way
            if b is not None or t == torch.float16:
                u, y = y, y * d
                if b is not None:
                    y.add_(b * (1 - d))
            else:
                floor = torch.finfo(t).tiny ** 0.5
                d = torch.where(d.abs() < floor, floor, d)
                y.mul_(d)
                u = y
            ctx.u_is_output = u is y
        ctx.dropout, ctx.seed = dropout, seed
        ctx.save_for_backward(x, W, bias, B, A, scale, row_scale, column_scale, h, u, rank_mask, d, e)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, W, bias, B, A, scale, row_scale, column_scale, h, u, rank_mask, d, e = ctx.saved_tensors
        need_x, _, _, need_B, need_A, _, need_d, *_, need_e = ctx.needs_input_grad
        t = x.dtype
        g = grad.reshape(-1, grad.shape[-1])  # (T, O)
        x2 = x.reshape(-1, x.shape[-1])
        A_, B_, s = as_dtype(A, t), as_dtype(B, t), as_dtype(scale, t)
        factor = s / keep_probability(ctx.dropout) if ctx.dropout else s
        mask = kept(x2, ctx.dropout, ctx.seed) if ctx.dropout and (need_A or need_x or need_e) else None
        u_is_output = row_scale is not None and ctx.u_is_output
        again = torch.is_grad_enabled()  # a second derivative: kept products are constants to autograd
        if again:
            d = None if row_scale is None else as_dtype(row_scale, t)
            e = None if column_scale is None else as_dtype(column_scale, t)
            z = x2 if e is None else x2 * e
            h = (z if mask is None else z * mask) @ A_.t() * factor
            if rank_mask is not None:
                h = h * rank_mask
            if u is not None:
                u, u_is_output = (
                    F.linear(z, as_dtype(W, t), None if bias is None else as_dtype(bias, t)) + h @ B_.t(),
                    False,
                )
        grad_d = None
        if d is not None:
            if need_d:
                grad_d = torch.linalg.vecdot(g, u.reshape(g.shape), dim=0).to(row_scale.dtype)
                if bias is not None:
                    grad_d -= bias * g.sum(0, dtype=grad_d.dtype)
                if u_is_output:
                    grad_d /= d
            B_ = d[:, None] * B_
        q = (g @ B_).mul_(factor)  # (T, R): the gradient of z A^T
        if rank_mask is not None:
            q.mul_(rank_mask)
        grad_B = None
        if need_B:
            grad_B = (h.t() @ g).t().to(B.dtype)
            if d is not None:
                grad_B = grad_B * d[:, None]
        grad_A = grad_x = grad_e = None
        if need_A:
            grad_A = (q.t() @ (x2 if mask is None else x2 * mask)).to(A.dtype)
            if e is not None:
                grad_A = grad_A * e
        if need_x or need_e:
            W_ = as_dtype(W, t)
            if d is not None:  # the smaller of the two temporaries
                W_, g = (d[:, None] * W_, g) if len(g) > W.shape[1] else (W_, g * d)
            grad_x = g @ W_  # of z
            if mask is None:
                grad_x.addmm_(q, A_)
            else:
                grad_x.addcmul_(q @ A_, mask)
            if need_e:
                grad_e = torch.linalg.vecdot(grad_x, x2, dim=0).to(column_scale.dtype)
            if not need_x:
                grad_x = None
            else:
                if e is not None:
                    grad_x = grad_x * e if again else grad_x.mul_(e)
                grad_x = grad_x.view(x.shape)
        return grad_x, None, None, grad_B, grad_A, None, grad_d, None, None, None, grad_e


def row_square_after_update(
    row_square: Tensor,  # (O,)  |W|_row^2
    WA: Tensor,  # (O, R)  W A^T
    B: Tensor,  # (O, R)
    A: Tensor,  # (R, I)
    scale: Tensor,  # 0-d
) -> Tensor:
    """|W + s B A|_row^2 = |W|_row^2 + 2 s rowsum(B * (W A^T)) + s^2 rowsum((B (A A^T)) * B). Returns (O,).

    At least fp32; clamped at 0, below which only rounding can bring it.
    """
    t = torch.promote_types(row_square.dtype, torch.float32)
    A, C = A.to(t), scale.to(t) * B.to(t)
    return (row_square.to(t) + (torch.addmm(WA.to(t), C, A @ A.t(), beta=2) * C).sum(1)).clamp_min(0)
