"""Weighted sums of squares down the columns of a matrix, and of W + s B A, without a second (O, I) matrix.

Shapes: O out, I in, R rank. W (O, I), B (O, R), A (R, I), v (O,).
"""

import torch
from torch import Tensor

from .fused import traced

__all__ = ["column_square_after_update", "square_rmatmul"]


def square_rmatmul(W: Tensor, v: Tensor) -> Tensor:
    """(W * W)^T v, (I,), in at least fp32, some rows at a time; v = 1 gives |W|_column^2.

    Differentiable in v, keeping W alone; in W too where it wants a gradient.

    Example:
        >>> square_rmatmul(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2))
        tensor([10., 20.])
    """
    t = torch.promote_types(W.dtype, torch.float32)
    v = v.to(t)
    if traced(W):
        return v @ W.to(t).square()  # a compiler fuses this; a loop would only be unrolled
    if torch.is_grad_enabled() and (W.requires_grad or v.requires_grad):
        return v @ W.to(t).square() if W.requires_grad else _SquareProduct.apply(W, v, True)
    return _product(W, v, True)


def _product(W: Tensor, v: Tensor, transposed: bool) -> Tensor:
    """(W * W)^T v or (W * W) v."""
    # on a CPU a piece stays in the cache
    step = max(1, (1 << (18 if W.device.type == "cpu" else 24)) // max(1, W.shape[1]))
    pieces = (rows.square() if rows.dtype == v.dtype else rows.to(v.dtype).square_() for rows in W.split(step))
    if not transposed:
        return torch.cat([rows @ v for rows in pieces])
    total = v.new_zeros(W.shape[1])
    for rows, share in zip(pieces, v.split(step), strict=True):
        total += share @ rows
    return total


class _SquareProduct(torch.autograd.Function):
    """Linear in v, so the gradient is the other product."""

    @staticmethod
    def forward(ctx, W, v, transposed):
        ctx.save_for_backward(W)
        ctx.transposed = transposed
        return _product(W, v, transposed)

    @staticmethod
    def backward(ctx, grad):
        (W,) = ctx.saved_tensors
        return None, _SquareProduct.apply(W, grad, not ctx.transposed), None


def column_square_after_update(
    square: Tensor,  # (I,)  (W * W)^T v
    WvB: Tensor,  # (I, R)  W^T (v * B)
    B: Tensor,  # (O, R)
    A: Tensor,  # (R, I)
    v: Tensor,  # (O,)
    scale: Tensor,  # 0-d
) -> Tensor:
    """(V * V)^T v for V = W + s B A, (I,): with C = v * B, a row of B each,

        (W * W)^T v + 2 s rowsum(A^T * (W^T C)) + s^2 rowsum(A^T * (A^T (B^T C)))

    At least fp32; clamped at 0, below which only rounding can bring it (v >= 0).
    """
    t = torch.promote_types(square.dtype, torch.float32)
    A, C = A.to(t), scale.to(t) * B.to(t)
    core = C.t() @ (v.to(t)[:, None] * C)  # (R, R)
    twice = torch.addmm(scale.to(t) * WvB.to(t).t(), core, A, beta=2)
    return (square.to(t) + (twice * A).sum(0)).clamp_min(0)
