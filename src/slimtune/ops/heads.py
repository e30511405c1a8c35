"""Products with W + s dW where dW is low-rank head by head, without the zeros between heads.

Shapes: O out, I in, H heads, S ranks of each, N = O / H or I / H, T batch dims flattened. W (O, I), x (*T, I),
y (*T, O).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import draw_seed, dropped, keep_probability, kept
from .fused import as_dtype, base_product, fused

__all__ = ["heads_linear"]


def heads_linear(
    x: Tensor,  # (*T, I)
    W: Tensor,  # (O, I), frozen
    bias: Tensor | None,  # (O,), frozen
    B: Tensor,  # (N, H S), or (O, H S)
    A: Tensor,  # (H S, I), or (H S, N)
    scale: Tensor,  # 0-d
    heads: int,
    dropout: float = 0.0,
) -> Tensor:
    """y = x W^T + s drop(x) dW^T + bias, (*T, O); block h of dW is B[:, hS:(h+1)S] A[hS:(h+1)S].

    The blocks are those of the outputs where A is as wide as x, and else those of the inputs. Two batched products end
    in the memory of the large ones; kept for backward are x and a (T, H S) product.

    Example:
        >>> x, W, s = torch.randn(2, 5), torch.randn(4, 5), torch.tensor(0.5)
        >>> B, A = torch.randn(2, 6), torch.randn(6, 5)  # two heads of rank 3
        >>> dW = torch.cat([B[:, :3] @ A[:3], B[:, 3:] @ A[3:]])
        >>> torch.allclose(heads_linear(x, W, None, B, A, s, heads=2), x @ (W + 0.5 * dW).T, atol=1e-5)
        True
    """
    seed = draw_seed() if dropout else 0
    return fused(lambda x: _Heads.apply(x, W, bias, scale, dropout, seed, heads, A, B), x, W, bias)  # type: ignore[no-any-return]


def _split(x: Tensor, heads: int) -> Tensor:
    """(T, H N) as H matrices (H, T, N), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)


def _turned(B: Tensor, heads: int) -> Tensor:
    """(N, H S) as H matrices (H, S, N) in memory of their own: batched products are twice as fast with them."""
    return _split(B, heads).transpose(1, 2).contiguous()


def _joined(x: Tensor) -> Tensor:
    """(H, T, N) as (T, H N)."""
    return x.transpose(0, 1).flatten(1)


def _change(z: Tensor, A: Tensor, B: Tensor, heads: int) -> Tensor:
    """z dW^T, the definition, (T, O)."""
    if A.shape[1] == z.shape[-1]:
        h = z @ as_dtype(A, z.dtype).t()
        return _joined(torch.bmm(_split(h, heads), _split(as_dtype(B, z.dtype), heads).transpose(1, 2)))
    h = _joined(torch.bmm(_split(z, heads), as_dtype(A, z.dtype).unflatten(0, (heads, -1)).transpose(1, 2)))
    return h @ as_dtype(B, z.dtype).t()


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, bias, scale, dropout, seed, heads, A, B):
        t = x.dtype
        x2 = x.reshape(-1, x.shape[-1])
        y, y2 = base_product(x, W, bias)
        z = dropped(x2, dropout, seed) if dropout else x2
        s = as_dtype(scale, t) / keep_probability(dropout) if dropout else as_dtype(scale, t)
        A_, B_ = as_dtype(A, t), as_dtype(B, t)
        if A.shape[1] == x.shape[-1]:
            h = (z @ A_.t()).mul_(s)  # (T, R)
            _split(y2, heads).baddbmm_(_split(h, heads), _turned(B_, heads))
        else:
            h = _joined(torch.bmm(_split(z, heads), A_.unflatten(0, (heads, -1)).transpose(1, 2))).mul_(s)
            y2.addmm_(h, B_.t())
        ctx.dropout, ctx.seed, ctx.heads = dropout, seed, heads
        ctx.save_for_backward(x, W, scale, A, B, h)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, W, scale, A, B, h = ctx.saved_tensors
        need_x, need_A, need_B = (ctx.needs_input_grad[i] for i in (0, 7, 8))
        t, heads = x.dtype, ctx.heads
        x2, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        s = as_dtype(scale, t) / keep_probability(ctx.dropout) if ctx.dropout else as_dtype(scale, t)
        mask = kept(x2, ctx.dropout, ctx.seed) if ctx.dropout and (need_x or need_A) else None
        if torch.is_grad_enabled():  # a second derivative: differentiate the definition
            y = F.linear(x2, as_dtype(W, t)) + s * _change(x2 if mask is None else x2 * mask, A, B, heads)
            wanted = [v for v, need in ((x, need_x), (A, need_A), (B, need_B)) if need]
            found = iter(torch.autograd.grad(y, wanted, g, create_graph=True))
            each = [next(found) if need else None for need in (need_x, need_A, need_B)]
            return each[0], None, None, None, None, None, None, *each[1:]
        z = x2 if mask is None or not need_A else x2 * mask
        A_, B_ = as_dtype(A, t), as_dtype(B, t)
        grad_A = grad_B = grad_x = branch = None
        if need_x:
            grad_x = g @ as_dtype(W, t)
            branch = grad_x if mask is None else torch.zeros_like(grad_x)
        if A.shape[1] == x.shape[-1]:
            blocks = _split(g, heads)
            q = _joined(torch.bmm(blocks, _turned(B_, heads).transpose(1, 2))).mul_(s)  # (T, R), of z A^T
            if need_B:
                grad_B = _joined(torch.bmm(_split(h, heads).transpose(1, 2), blocks).transpose(1, 2)).to(B.dtype)
            if need_A:
                grad_A = (q.t() @ z).to(A.dtype)
            if branch is not None:
                branch.addmm_(q, A_)
        else:
            q = (g @ B_).mul_(s)
            if need_B:
                grad_B = (h.t() @ g).t().to(B.dtype)
            if need_A:
                grad_A = torch.bmm(_split(q, heads).transpose(1, 2), _split(z, heads)).flatten(0, 1).to(A.dtype)
            if branch is not None:
                _split(branch, heads).baddbmm_(_split(q, heads), A_.unflatten(0, (heads, -1)))
        if grad_x is not None:
            grad_x = (grad_x if mask is None else grad_x.addcmul_(branch, mask)).view(x.shape)
        return grad_x, None, None, None, None, None, None, grad_A, grad_B
