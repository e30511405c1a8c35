"""When a hand-written autograd function stands for the operations it is made of, and in which dtype it runs.

Shapes: O out, I in, T batch dims flattened. W (O, I), x (*T, I), y (*T, O).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["as_dtype", "base_product", "fused", "traced"]


def traced(x: Tensor) -> bool:
    """Whether something else than autograd follows the operations: a compiler, torch.func, the meta device."""
    return torch.compiler.is_compiling() or x.is_meta or torch._C._are_functorch_transforms_active()


def fused(apply: Callable[[Tensor], Tensor], x: Tensor, W: Tensor | None, bias: Tensor | None) -> Tensor:
    """apply(x), a hand-written function of x W^T + bias and more, in the dtype that autocast asks for.

    Without autocast x must have W's dtype, as for the bare layer: torch's own error otherwise.
    """
    if not torch.is_autocast_enabled(x.device.type):
        if W is not None and x.dtype != W.dtype:
            return F.linear(x, W, bias)
        return apply(x)
    if x.dtype != torch.float64:  # which autocast leaves alone
        x = x.to(torch.get_autocast_dtype(x.device.type))
    with torch.autocast(x.device.type, enabled=False):
        return apply(x)


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), without the call where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def base_product(x: Tensor, W: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """x W^T + bias in x's dtype as (*T, O), and the same memory as (T, O), to add to."""
    t = x.dtype
    # a view would forbid in-place operations on the output (nn.ReLU(inplace=True))
    y = x.new_empty(*x.shape[:-1], W.shape[0])
    y2, x2, W_ = y.view(-1, W.shape[0]), x.reshape(-1, x.shape[-1]), as_dtype(W, t).t()
    torch.mm(x2, W_, out=y2) if bias is None else torch.addmm(as_dtype(bias, t), x2, W_, out=y2)
    return y, y2
