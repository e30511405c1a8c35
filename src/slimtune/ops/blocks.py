"""Products with a weight W whose change is said block by block, without building the change.

Shapes: O out, I in, R rank, K blocks per side, N block size, T batch dims flattened. x (*T, I), W (O, I), y (*T, O).
Sizes that N does not divide are meant as padded with zeros to a multiple of N, and cut afterwards.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import draw_seed, dropped, keep_probability, kept, seeded_dropout
from .fused import as_dtype, base_product, fused, traced

__all__ = [
    "add_tiled_",
    "block_column_change",
    "block_lowrank",
    "block_lowrank_linear",
    "block_row_change",
    "block_row_linear",
    "block_sum",
    "blocks",
    "blockwise_product",
    "tiled",
    "tiled_linear",
]


def blocks(x: Tensor, size: int) -> Tensor:
    """x (*T, I) padded with zeros and cut into blocks: (*T, ceil(I / size), size)."""
    missing = -x.shape[-1] % size
    return (F.pad(x, (0, missing)) if missing else x).unflatten(-1, (-1, size))


def block_sum(x: Tensor, size: int) -> Tensor:
    """The sum over the blocks of x: (*T, I) to (*T, size).

    Example:
        >>> block_sum(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), 2)
        tensor([9., 6.])
    """
    if x.shape[-1] < size:
        return F.pad(x, (0, size - x.shape[-1]))
    whole = x.shape[-1] // size * size
    total = x[..., :whole].unflatten(-1, (-1, size)).sum(-2)
    rest = x.shape[-1] - whole
    return total + F.pad(x[..., whole:], (0, size - rest)) if rest else total


def tiled(q: Tensor, width: int) -> Tensor:
    """q (*T, size) repeated along the last dimension and cut to `width`: the transpose of `block_sum`.

    Example:
        >>> tiled(torch.tensor([1, 2]), 5)
        tensor([1, 2, 1, 2, 1])
    """
    count = -(-width // q.shape[-1])
    return q.unsqueeze(-2).expand(*q.shape[:-1], count, q.shape[-1]).flatten(-2)[..., :width]


def add_tiled_(y: Tensor, q: Tensor) -> Tensor:
    """y (T, width) += tiled(q (T, size), width), in place."""
    size, width = q.shape[-1], y.shape[-1]
    if y.dtype.itemsize < 4 and y.device.type == "cpu":  # a broadcast sum of 16-bit numbers is 20 times slower
        return y.addmm_(q, tiled(torch.eye(size, dtype=y.dtype, device=y.device), width))
    whole = width // size * size
    if whole:
        y[:, :whole].unflatten(-1, (-1, size)).add_(q[:, None])
    if whole < width:
        y[:, whole:] += q[:, : width - whole]
    return y


def _direct(x: Tensor, *needed: Tensor) -> bool:
    """Whether a hand-written autograd function applies: a gradient is wanted, by autograd itself."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in (x, *needed)) and not traced(x)


def _applied(function, x, W, bias, scale, dropout, *rest):
    """An autograd function of this file, in the dtype that autocast asks for."""
    seed = draw_seed() if dropout else 0
    return fused(lambda x: function.apply(x, W, bias, scale, dropout, seed, *rest), x, W, bias)


def _factor(scale: Tensor, dtype: torch.dtype, dropout: float) -> Tensor:
    s = as_dtype(scale, dtype)
    return s / keep_probability(dropout) if dropout else s


def _composed(x, W, bias, scale, dropout, change):
    """The definition in autograd's own operations."""
    y = F.linear(x, W, bias)
    z = seeded_dropout(x, dropout) if dropout else x
    return y + scale.to(y.dtype) * change(as_dtype(z, y.dtype))


# ---------------------------------------------------------------- K x K low-rank blocks


def block_lowrank(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """x dW^T where block (j, n) of dW is (A[n][:, jS:(j+1)S] B[j][nS:(n+1)S])^T, S = R / K.

    A (K, I / K, R), B (K, R, O / K). Returns (*T, O).
    """
    K, _, R = A.shape
    h = torch.einsum("...ni,nir->...nr", x.unflatten(-1, (K, -1)), A.to(x.dtype))
    h = h.unflatten(-1, (K, R // K)).transpose(-3, -2).flatten(-2)  # (*T, K, R), blocks of y first
    return torch.einsum("...jr,jro->...jo", h, B.to(x.dtype)).flatten(-2)


def block_lowrank_linear(
    x: Tensor,  # (*T, I)
    W: Tensor,  # (O, I), frozen
    bias: Tensor | None,  # (O,), frozen
    A: Tensor,  # (K, I / K, R)
    B: Tensor,  # (K, R, O / K)
    scale: Tensor,  # 0-d
    dropout: float = 0.0,
) -> Tensor:
    """y = x W^T + s block_lowrank(drop(x), A, B) + bias, (*T, O).

    Two batched products that end in the base product's memory; kept for backward are x and a (K, T, R) product.

    Example:
        >>> x, W, s = torch.randn(2, 4), torch.randn(6, 4), torch.tensor(0.5)
        >>> A, B = torch.randn(2, 2, 2), torch.randn(2, 2, 3)
        >>> y = block_lowrank_linear(x, W, None, A, B, s)
        >>> torch.allclose(y, x @ W.T + 0.5 * block_lowrank(x, A, B), atol=1e-5)
        True
    """
    if scale.requires_grad or not _direct(x, A, B):
        return _composed(x, W, bias, scale, dropout, lambda z: block_lowrank(z, A, B))
    return _applied(_BlockLowRank, x, W, bias, scale, dropout, A, B)


def _split(x: Tensor, K: int) -> Tensor:
    """(T, I) as K matrices (K, T, I / K), a view."""
    return x.unflatten(-1, (K, -1)).transpose(0, 1)


def _exchange(h: Tensor) -> Tensor:
    """(K, T, (K, S)) to (K, T, (K, S)) with the two K exchanged: from blocks of x to blocks of y and back."""
    K, T, R = h.shape
    return h if K == 1 else h.view(K, T, K, R // K).permute(2, 1, 0, 3).reshape(K, T, R)


class _BlockLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, bias, scale, dropout, seed, A, B):
        t, K = x.dtype, A.shape[0]
        x2 = x.reshape(-1, x.shape[-1])
        y, y2 = base_product(x, W, bias)
        z = dropped(x2, dropout, seed) if dropout else x2
        s = _factor(scale, t, dropout)
        h = _exchange(torch.bmm(_split(z, K), as_dtype(A, t)).mul_(s))  # (K, T, R)
        _split(y2, K).baddbmm_(h, as_dtype(B, t))
        ctx.dropout, ctx.seed = dropout, seed
        ctx.save_for_backward(x, W, scale, A, B, h)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, W, scale, A, B, h = ctx.saved_tensors
        need_x, need_A, need_B = (ctx.needs_input_grad[i] for i in (0, 6, 7))
        t, K = x.dtype, A.shape[0]
        x2, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        s = _factor(scale, t, ctx.dropout)
        mask = kept(x2, ctx.dropout, ctx.seed) if ctx.dropout and (need_x or need_A) else None
        if torch.is_grad_enabled():  # a second derivative: differentiate the definition
            z = x2 if mask is None else x2 * mask
            y = F.linear(x2, as_dtype(W, t)) + s * block_lowrank(z, A, B)
            wanted = [v for v, need in ((x, need_x), (A, need_A), (B, need_B)) if need]
            found = iter(torch.autograd.grad(y, wanted, g, create_graph=True))
            each = [next(found) if need else None for need in (need_x, need_A, need_B)]
            return each[0], None, None, None, None, None, *each[1:]
        g_blocks = _split(g, K)
        q = _exchange(torch.bmm(g_blocks, as_dtype(B, t).transpose(1, 2)).mul_(s))  # (K, T, R), of z A
        grad_B = torch.bmm(h.transpose(1, 2), g_blocks).to(B.dtype) if need_B else None
        grad_A = grad_x = None
        if need_A:
            z = x2 if mask is None else x2 * mask
            grad_A = torch.bmm(q.transpose(1, 2), _split(z, K)).transpose(1, 2).to(A.dtype)  # twice as fast as (z^T q)
        if need_x:
            grad_x = g @ as_dtype(W, t)
            At = as_dtype(A, t).transpose(1, 2)
            if mask is None:
                _split(grad_x, K).baddbmm_(q, At)
            else:
                branch = torch.empty_like(grad_x)
                _split(branch, K).baddbmm_(q, At, beta=0)
                grad_x.addcmul_(branch, mask)
            grad_x = grad_x.view(x.shape)
        return grad_x, None, None, None, None, None, grad_A, grad_B


# ---------------------------------------------------------------- one tile of D, repeated


def tiled_linear(
    x: Tensor,  # (*T, I)
    W: Tensor,  # (O, I), frozen
    bias: Tensor | None,  # (O,), frozen
    D: Tensor,  # (R, O)
    scale: Tensor,  # 0-d
    dropout: float = 0.0,
) -> Tensor:
    """y = x W^T + s block_sum(drop(x), R) D + bias, (*T, O). Kept for backward is the (T, R) sum, not x.

    Example:
        >>> x, W, D, s = torch.randn(2, 5), torch.randn(3, 5), torch.randn(2, 3), torch.tensor(0.5)
        >>> y = tiled_linear(x, W, None, D, s)
        >>> torch.allclose(y, x @ (W + 0.5 * D.repeat(3, 1)[:5].T).T, atol=1e-5)
        True
    """
    if scale.requires_grad or not _direct(x, D):
        return _composed(x, W, bias, scale, dropout, lambda z: block_sum(z, D.shape[0]) @ D.to(z.dtype))
    return _applied(_Tiled, x, W, bias, scale, dropout, D)[0]


class _Tiled(torch.autograd.Function):
    """Also returns the sums: kept as an output, they stay tied to x in a second derivative without keeping x."""

    @staticmethod
    def forward(ctx, x, W, bias, scale, dropout, seed, D):
        t = x.dtype
        x2 = x.reshape(-1, x.shape[-1])
        y, y2 = base_product(x, W, bias)
        s = _factor(scale, t, dropout)
        S = block_sum(dropped(x2, dropout, seed) if dropout else x2, D.shape[0]).mul_(s)
        y2.addmm_(S, as_dtype(D, t))
        ctx.dropout, ctx.seed, ctx.shape = dropout, seed, x.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(W, scale, D, S)
        return y, S

    @staticmethod
    def backward(ctx, grad, grad_S):
        if grad is None and grad_S is None:
            return (None,) * 7
        W, scale, D, S = ctx.saved_tensors
        need_x, need_D = ctx.needs_input_grad[0], ctx.needs_input_grad[6]
        t, T, I = S.dtype, S.shape[0], ctx.shape[-1]
        g = S.new_zeros(T, W.shape[0]) if grad is None else grad.reshape(T, W.shape[0])
        grad_x = None
        if need_x:
            q = g @ as_dtype(D, t).t()
            q = (q if grad_S is None else q + grad_S) * _factor(scale, t, ctx.dropout)
            mask = kept(S.new_empty(T, I), ctx.dropout, ctx.seed) if ctx.dropout else None
            if torch.is_grad_enabled():
                grad_x = g @ as_dtype(W, t) + tiled(q, I) * (1 if mask is None else mask)
            elif mask is None:
                grad_x = add_tiled_(g @ as_dtype(W, t), q)
            else:
                grad_x = (g @ as_dtype(W, t)).addcmul_(tiled(q, I), mask)
            grad_x = grad_x.view(ctx.shape)
        grad_D = (S.t() @ g).to(D.dtype) if need_D else None
        return grad_x, None, None, None, None, None, grad_D


# ---------------------------------------------------------------- blocks that also multiply the weight


def blockwise_product(M: Tensor, V: Tensor, size: int) -> Tensor:
    """(O, I) with block (a, c) = M_ac V_ac, blocks of size x size, both matrices (O, I)."""

    size = min(size, max(M.shape))  # the rest would be padding

    def grid(m: Tensor) -> Tensor:  # (O/N, I/N, N, N)
        m = F.pad(m, (0, -m.shape[1] % size, 0, -m.shape[0] % size))
        return m.unflatten(0, (-1, size)).unflatten(2, (-1, size)).transpose(1, 2)

    product = grid(M) @ grid(V)
    return product.transpose(1, 2).flatten(2).flatten(0, 1)[: M.shape[0], : M.shape[1]]


def block_column_change(W: Tensor, B: Tensor) -> Tensor:
    """(O, I) with block (a, c) = W_ac B_a + B_a, in W's dtype. B (ceil(O / N), N, N)."""
    (O, I), N = W.shape, B.shape[1]
    B = B.to(W.dtype)
    cut = F.pad(W, (0, -I % N, 0, -O % N)) if O % N or I % N else W
    rows, width = cut.shape
    if O % N:  # rows of the last block that dW does not have
        B = torch.cat([B[:-1], F.pad(B[-1:, : O % N], (0, 0, 0, N - O % N))])
    grid = (rows // N, -1, N)
    change = torch.baddbmm(tiled(B.reshape(rows, N), width).reshape(grid), cut.reshape(grid), B)
    return change.view(rows, width)[:O, :I]


def block_row_change(x: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """(u, S) for the change W_ac B_c + B_c of every block: W u + tiled(S), with u_c = B_c x_c and S = sum_c u_c.

    B (C, N, N); x (*T, I); u (*T, I), S (*T, N).
    """
    u = torch.einsum("...cj,cij->...ci", blocks(x, B.shape[1]), B.to(x.dtype))
    return u.flatten(-2)[..., : x.shape[-1]], u.sum(-2)


def block_row_linear(
    x: Tensor,  # (*T, I)
    W: Tensor,  # (O, I), frozen
    bias: Tensor | None,  # (O,), frozen
    B: Tensor,  # (ceil(I / N), N, N)
    scale: Tensor,  # 0-d
    dropout: float = 0.0,
) -> Tensor:
    """y = W (x + u) + tiled(sum_c u_c) + bias with u_c = s B_c drop(x)_c, (*T, O): W'_ac = W_ac + s (W_ac B_c + B_c).

    One product with W; kept for backward is x alone.
    """
    if scale.requires_grad or not _direct(x, B):
        z = seeded_dropout(x, dropout) if dropout else x
        u, S = block_row_change(z, scale.to(B.dtype) * B)
        return F.linear(x + u, W, bias) + tiled(S, W.shape[0])
    return _applied(_BlockRow, x, W, bias, scale, dropout, B)


class _BlockRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, bias, scale, dropout, seed, B):
        t, I = x.dtype, x.shape[-1]
        x2 = x.reshape(-1, I)
        z = dropped(x2, dropout, seed) if dropout else x2
        Bt = (_factor(scale, B.dtype, dropout) * B).to(t).transpose(1, 2)
        u = _each_block(z, Bt)
        S = u.sum(1)
        u = u.flatten(1)
        y, y2 = base_product((u if u.shape[1] == I else u[:, :I].contiguous()).add_(x2).view(x.shape), W, bias)
        add_tiled_(y2, S)
        ctx.dropout, ctx.seed = dropout, seed
        ctx.save_for_backward(x, W, scale, B)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, W, scale, B = ctx.saved_tensors
        need_x, need_B = ctx.needs_input_grad[0], ctx.needs_input_grad[6]
        t, I, N = x.dtype, x.shape[-1], B.shape[1]
        x2, g = x.reshape(-1, I), grad.reshape(-1, grad.shape[-1])
        s = _factor(scale, B.dtype, ctx.dropout)
        mask = kept(x2, ctx.dropout, ctx.seed) if ctx.dropout else None
        z = x2 if mask is None else x2 * mask
        if torch.is_grad_enabled():  # a second derivative: differentiate the definition
            u, S = block_row_change(z, s * B)
            y = F.linear(x2 + u, as_dtype(W, t)) + tiled(S, W.shape[0])
            wanted = [v for v, need in ((x, need_x), (B, need_B)) if need]
            found = iter(torch.autograd.grad(y, wanted, g, create_graph=True))
            each = [next(found) if need else None for need in (need_x, need_B)]
            return each[0], None, None, None, None, None, each[1]
        grad_x = g @ as_dtype(W, t)  # (T, I), of x + u
        grad_u = F.pad(grad_x, (0, -I % N)) if I % N else grad_x.clone()
        add_tiled_(grad_u, block_sum(g, N))
        grad_B = None
        if need_B:
            left, right = grad_u.unflatten(1, (-1, N)).transpose(0, 1), blocks(z, N).transpose(0, 1)
            if t.itemsize < 4:  # batched products of 16-bit numbers are several times slower on strided blocks
                left, right = left.contiguous(), right.contiguous()
            grad_B = torch.bmm(left.transpose(1, 2), right).to(B.dtype).mul_(s)
        if not need_x:
            return None, None, None, None, None, None, grad_B
        Bs = (s * B).to(t)
        if mask is None and I % N == 0:
            grad_x.unflatten(1, (-1, N)).transpose(0, 1).baddbmm_(grad_u.unflatten(1, (-1, N)).transpose(0, 1), Bs)
        else:
            branch = _each_block(grad_u, Bs).flatten(1)[:, :I]
            grad_x = grad_x.add_(branch) if mask is None else grad_x.addcmul_(branch, mask)
        return grad_x.view(x.shape), None, None, None, None, None, grad_B


def _each_block(x: Tensor, M: Tensor) -> Tensor:
    """x_c M_c for every block c of x: (T, I) and (C, N, N) to (T, C, N)."""
    x = blocks(x, M.shape[1])
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out.transpose(0, 1).baddbmm_(x.transpose(0, 1), M, beta=0)
    return out
