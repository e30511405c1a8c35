"""Triangular factors with rows chosen in advance, and products with W + s L diag(c) U.

Shapes: O out, I in, R rank, T batch dims flattened. W (O, I), L (O, R), c (R,), U (R, I), x (*T, I), y (*T, O).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout import draw_seed, dropped, keep_probability, kept
from .fused import base_product, fused, traced
from .lowrank import lowrank_linear

__all__ = ["diagonal_linear", "ldu", "pivot_rows"]


def pivot_rows(panel: Tensor) -> Tensor:
    """The rows that partial pivoting picks, one per column, for an (O, R) panel with R <= O. Returns (R,)."""
    swaps = torch.linalg.lu_factor_ex(panel).pivots.tolist()
    order = list(range(panel.shape[0]))
    for i, j in enumerate(swaps):
        order[i], order[j - 1] = order[j - 1], order[i]
    return torch.tensor(order[: len(swaps)], dtype=torch.int64)


def ldu(
    panel: Tensor,  # (O, R), the first R columns of W
    heads: Tensor,  # (R, I), the pivot rows of W
    rows: Tensor,  # (R,), their indices
    block: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first R steps of W = P L diag(D) U by Gaussian elimination with given pivot rows and no further choice.

    Returns P L (O, R), in W's order of rows, unit lower trapezoidal once the pivot rows are put first; D (R,); and U
    (R, I), unit upper. R <= min(O, I); R (O + I) numbers and O R^2 + R^2 I multiply-adds: the rest of W is not
    looked at. Where a pivot is 0, D is set to 1 and the row of U left as it is, so that P L diag(D) U stays W (there U
    is not unit); nothing is divided by it.

    Example:
        >>> W = torch.randn(5, 4, dtype=torch.float64)
        >>> rows = pivot_rows(W)
        >>> L, D, U = ldu(W, W[rows], rows)
        >>> torch.allclose(L @ D.diag() @ U, W)
        True
    """
    (O, R), t = panel.shape, panel.dtype
    chosen = torch.zeros(O, dtype=torch.bool)
    chosen[rows] = True
    order = torch.cat([rows, (~chosen).nonzero()[:, 0]])
    X = panel[order]
    largest = max(panel.abs().max().item(), heads.abs().max().item())
    tiny = torch.finfo(t).eps * max(O, heads.shape[1]) * largest
    D = torch.ones(R, dtype=t)
    for start in range(0, R, block):
        end = min(start + block, R)
        for j in range(start, end):
            if X[j, j].abs() > tiny:
                D[j] = X[j, j]
                X[j + 1 :, j] /= X[j, j]
                X[j + 1 :, j + 1 : end].addr_(X[j + 1 :, j], X[j, j + 1 : end], alpha=-1)
            else:
                X[j:, j] = 0
        corner = X[start:end, start:end]
        X[start:end, end:] = torch.linalg.solve_triangular(corner, X[start:end, end:], upper=False, unitriangular=True)
        X[end:, end:].addmm_(X[end:, start:end], X[start:end, end:], alpha=-1)
    L = X.tril(-1)
    L.diagonal().fill_(1)
    U = torch.linalg.solve_triangular(L[:R], heads, upper=False, unitriangular=True).triu_()
    U[:, :R].diagonal().copy_(X.diagonal())
    U[U.abs().amax(1) <= tiny] = 0  # rounding is not a direction
    whole = torch.empty_like(L)
    whole[order] = L
    return whole, D, U / D[:, None]


def diagonal_linear(
    x: Tensor,  # (*T, I)
    W: Tensor,  # (O, I), frozen
    bias: Tensor | None,  # (O,), frozen
    L: Tensor,  # (O, R), frozen
    c: Tensor,  # (R,)
    U: Tensor,  # (R, I), frozen
    scale: Tensor,  # 0-d
    dropout: float = 0.0,
) -> Tensor:
    """y = x W^T + s ((drop(x) U^T) * c) L^T + bias. Returns (*T, O).

    Four thin products for a step instead of the six of two trained factors: the gradient of c is one (T, R) product
    summed over T. Keeps x and the (T, R) product x U^T.

    Example:
        >>> x, W, L, c, U = (torch.randn(*s) for s in ((2, 3), (4, 3), (4, 2), (2,), (2, 3)))
        >>> y = diagonal_linear(x, W, None, L, c, U, torch.tensor(0.5))
        >>> torch.allclose(y, x @ (W + 0.5 * L @ c.diag() @ U).T, atol=1e-5)
        True
    """
    wanted = torch.is_grad_enabled() and (c.requires_grad or x.requires_grad)
    if not wanted or scale.requires_grad or traced(x):
        return lowrank_linear(x, W, bias, L, c[:, None] * U, scale, None, dropout)
    seed = draw_seed() if dropout else 0
    return fused(lambda x: _DiagonalLinear.apply(x, W, bias, L, c, U, scale, dropout, seed), x, W, bias)


class _DiagonalLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, bias, L, c, U, scale, dropout, seed):
        t = x.dtype
        x2 = x.reshape(-1, x.shape[-1])  # (T, I)
        z = dropped(x2, dropout, seed) if dropout else x2
        h = z @ U.to(t).t()  # (T, R)
        y, y2 = base_product(x, W, bias)
        y2.addmm_(h * _factor(c, scale, dropout).to(t), L.to(t).t())
        ctx.dropout, ctx.seed = dropout, seed
        ctx.save_for_backward(x, W, L, c, U, scale, h)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, W, L, c, U, scale, h = ctx.saved_tensors
        need_x, need_c = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        t = x.dtype
        g, x2 = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])  # (T, O), (T, I)
        U_ = U.to(t)
        second = torch.is_grad_enabled()  # a second derivative: kept products are constants to autograd
        mask = kept(x2, ctx.dropout, ctx.seed) if ctx.dropout and (need_x or second) else None
        if second:
            h = (x2 if mask is None else x2 * mask) @ U_.t()
        q = g @ L.to(t)  # (T, R)
        grad_c = grad_x = None
        if need_c:
            grad_c = (q * h).sum(0, dtype=c.dtype) * _factor(torch.ones_like(c), scale, ctx.dropout)
        if need_x:
            q = q * _factor(c, scale, ctx.dropout).to(t)
            grad_x = g @ W.to(t)
            if mask is None:
                grad_x.addmm_(q, U_)
            else:
                grad_x.addcmul_(q @ U_, mask)
            grad_x = grad_x.view(x.shape)
        return grad_x, None, None, None, grad_c, None, None, None, None


def _factor(c: Tensor, scale: Tensor, dropout: float) -> Tensor:
    s = scale.to(c.dtype)
    return c * (s / keep_probability(dropout) if dropout else s)
