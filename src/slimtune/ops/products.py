"""Kronecker, Khatri-Rao and Hadamard products, and products with them that never form the big matrix.

Shapes: O out, I in, T batch dims flattened. w1 (a, b), w2 (c, d), O = a c, I = b d; x (*T, I), y (*T, O).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import base_product, fused, traced

__all__ = ["hadamard_factors", "khatri_rao", "kronecker_linear"]


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Column by column Kronecker products: (n_1, N), (n_2, N), ... to (n_1 n_2 ..., N); the first index is slowest.

    Example:
        >>> khatri_rao([torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0]])]).flatten().tolist()
        [3.0, 5.0, 6.0, 10.0]
    """
    product, *rest = factors
    for factor in rest:
        product = (product[:, None] * factor).flatten(0, 1)
    return product


def hadamard_factors(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> tuple[Tensor, Tensor]:
    """(B, A), (O, R1 R2) and (R1 R2, I), with B A = (B1 A1) * (B2 A2): the Khatri-Rao identity.

    Example:
        >>> B1, A1, B2, A2 = torch.randn(5, 2), torch.randn(2, 4), torch.randn(5, 3), torch.randn(3, 4)
        >>> B, A = hadamard_factors(B1, A1, B2, A2)
        >>> torch.allclose(B @ A, (B1 @ A1) * (B2 @ A2), atol=1e-5)
        True
    """
    return (B1[:, :, None] * B2[:, None, :]).flatten(1), khatri_rao([A1, A2])


def kronecker_work(w1: Sequence[int], w2: Sequence[int]) -> int:
    """Multiply-adds per row of x of a product with the Kronecker product of matrices of these shapes."""
    (a, b), (c, d) = w1, w2
    return min(b * c * (d + a), a * d * (b + c))


def kronecker_linear(
    x: Tensor,  # (*T, I)
    W: Tensor | None,  # (O, I), frozen
    bias: Tensor | None,  # (O,), frozen
    w1: Tensor,  # (a, b)
    w2: Tensor,  # (c, d)
    scale: Tensor | None = None,  # 0-d
) -> Tensor:
    """y = x W^T + s x (w1 (x) w2)^T + bias. Returns (*T, O); W None leaves its product out.

    A row of x read as X (b, d) gives w1 X w2^T, (a, c): two thin products, in the order that costs less, and no (O, I)
    matrix. One autograd function; it keeps x and the factors. With rows enough its backward pass takes the gradient of
    x from W + s w1 (x) w2, a temporary. w1 and w2 may be of higher precision than x.

    Example:
        >>> x, W, s = torch.randn(2, 6), torch.randn(4, 6), torch.tensor(0.5)
        >>> w1, w2 = torch.randn(2, 3), torch.randn(2, 2)
        >>> torch.allclose(kronecker_linear(x, W, None, w1, w2, s), x @ (W + s * torch.kron(w1, w2)).T, atol=1e-5)
        True
    """
    if scale is not None and scale.requires_grad:
        w1, scale = scale * w1, None
    if traced(x):
        return _composed(x, W, bias, w1, w2, scale)
    return fused(lambda x: _KroneckerLinear.apply(x, W, bias, w1, w2, scale), x, W, bias)


def _composed(x, W, bias, w1, w2, scale):
    """The definition in autograd's own operations."""
    t = x.dtype
    w1_, w2_ = _scaled(w1, scale, t), w2.to(t)
    X = x.unflatten(-1, (w1.shape[1], w2.shape[1]))
    change = ((w1_ @ X) @ w2_.t() if _left_first(w1, w2) else w1_ @ (X @ w2_.t())).flatten(-2)
    return change if W is None else F.linear(x, W.to(t), None if bias is None else bias.to(t)) + change


def _scaled(w1: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (w1 if scale is None else w1 * scale).to(dtype)


def _left_first(w1: Tensor, w2: Tensor) -> bool:
    (a, b), (c, d) = w1.shape, w2.shape
    return a * d * (b + c) < b * c * (d + a)


def _slow_first(t: Tensor) -> Tensor:
    """(T, m, n) to (m, T n), contiguous: a product over m is then one GEMM."""
    return t.transpose(0, 1).reshape(t.shape[1], -1)


class _KroneckerLinear(torch.autograd.Function):
    """Every product is a plain GEMM over all rows, or one small one per row that adds to what is there."""

    @staticmethod
    def forward(ctx, x, W, bias, w1, w2, scale):
        t, (a, b), (c, d) = x.dtype, w1.shape, w2.shape
        w1_, w2_ = _scaled(w1, scale, t), w2.to(t)
        x2 = x.reshape(-1, b * d)
        T = len(x2)
        if W is None:
            y = x.new_empty(*x.shape[:-1], a * c)
            y2 = y.view(-1, a * c)
        else:
            y, y2 = base_product(x, W, bias)
        beta = 0 if W is None else 1
        if _left_first(w1, w2):
            u = torch.bmm(w1_.expand(T, a, b), x2.reshape(T, b, d))
            y2.view(T * a, c).addmm_(u.view(T * a, d), w2_.t(), beta=beta)
        else:
            v = x2.reshape(T * b, d) @ w2_.t()
            y2.view(T, a, c).baddbmm_(w1_.expand(T, a, b), v.view(T, b, c), beta=beta)
        ctx.save_for_backward(x, W, bias, w1, w2, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, W, bias, w1, w2, scale = ctx.saved_tensors
        need_x, _, _, need_1, need_2, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a second derivative: differentiate the definition
            wanted = [v for v, need in ((x, need_x), (w1, need_1), (w2, need_2)) if need]
            found = iter(torch.autograd.grad(_composed(x, W, bias, w1, w2, scale), wanted, grad, create_graph=True))
            every = [next(found) if need else None for need in (need_x, need_1, need_2)]
            return every[0], None, None, every[1], every[2], None
        t, (a, b), (c, d) = x.dtype, w1.shape, w2.shape
        w1_, w2_ = _scaled(w1, scale, t), w2.to(t)
        x2, g = x.reshape(-1, b * d), grad.reshape(-1, a * c)
        T = len(x2)
        grad_x: Any = None
        grad_1: Any = None
        grad_2: Any = None
        beta = 0 if W is None else 1
        left_first = _left_first(w1, w2)
        # not in half precision, where a small change would be rounded away and little would be gained
        summed = W is not None and t.itemsize > 2 and T * (a * b * d if left_first else b * c * d) > 16 * W.numel()
        if need_x and summed:
            w1w2 = (w1_.view(a, 1, b, 1), w2_.view(1, c, 1, d))
            grad_x = g @ torch.addcmul(W.to(t).reshape(a, c, b, d), *w1w2).view(W.shape)
        elif need_x:
            grad_x = torch.empty_like(x2, memory_format=torch.contiguous_format) if W is None else g @ W.to(t)
        if left_first:
            g2, x_slow = g.reshape(T * a, c), _slow_first(x2.reshape(T, b, d))
            q = (g2 @ w2_).view(T, a, d)
            if need_1:
                grad_1 = _slow_first(q) @ x_slow.t()
            if need_2:
                u = (w1_ @ x_slow).view(a, T, d).transpose(0, 1).reshape(T * a, d)
                grad_2 = g2.t() @ u
            if need_x and not summed:
                grad_x.view(T, b, d).baddbmm_(w1_.t().expand(T, b, a), q, beta=beta)
        else:
            x_fast, g3 = x2.reshape(T * b, d), g.reshape(T, a, c)
            p = torch.bmm(w1_.t().expand(T, b, a), g3).view(T * b, c)
            if need_2:
                grad_2 = p.t() @ x_fast
            if need_1:
                v = (x_fast @ w2_.t()).view(T, b, c)
                grad_1 = _slow_first(g3) @ _slow_first(v).t()
            if need_x and not summed:
                grad_x.view(T * b, d).addmm_(p, w2_, beta=beta)
        if need_1:
            grad_1 = _scaled(grad_1.to(w1.dtype), scale, w1.dtype)
        if need_2:
            grad_2 = grad_2.to(w2.dtype)
        return None if grad_x is None else grad_x.view(x.shape), None, None, grad_1, grad_2, None


def factor_pair(n: int, factor: int = -1) -> tuple[int, int]:
    """(m, n / m): m = `factor` if that divides n, else the largest divisor of n up to sqrt(n) (and up to `factor` > 0).

    Example:
        >>> factor_pair(128), factor_pair(128, 4), factor_pair(127)
        ((8, 16), (4, 32), (1, 127))
    """
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    top = math.isqrt(n) if factor <= 0 else min(math.isqrt(n), factor)
    m = next(m for m in range(top, 0, -1) if n % m == 0)
    return m, n // m


def balanced_sizes(n: int, count: int) -> list[int]:
    """`count` whole numbers, close to each other, whose product is the smallest that is at least n and has such.

    Close: their sum is at most 1.25 times that of equal ones.

    Example:
        >>> balanced_sizes(512, 2), balanced_sizes(512, 3), balanced_sizes(7, 2)
        ([16, 32], [8, 8, 8], [2, 4])
    """
    while True:
        sizes, rest = [], n
        for left in range(count, 1, -1):
            root = round(rest ** (1 / left))
            size = max((m for m in range(1, root + 1) if rest % m == 0), default=1)
            sizes.append(size)
            rest //= size
        sizes.append(rest)
        if sum(sizes) <= 1.25 * count * n ** (1 / count):
            return sizes
        n += 1
