"""A function of x and parameters that keeps its arguments alone for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .fused import traced

__all__ = ["recomputed"]


def recomputed(function: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
    """function(x, *parameters), evaluated again in the backward pass instead of keeping what is between.

    `function` draws no random numbers. Under torch.compile, which decides by itself what to keep, and without
    gradients it is called as it is.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> recomputed(lambda x, v: (x * v).exp(), x, torch.zeros(2)).sum().backward()
        >>> x.grad.tolist()
        [0.0, 0.0]
    """
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, *parameters)) or traced(x):
        return function(x, *parameters)
    return _Recomputed.apply(function, x, *parameters)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *tensors):
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx, grad):
        again = torch.is_grad_enabled()  # a second derivative
        needed = ctx.needs_input_grad[1:]
        tensors = [t if again else t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            y = ctx.function(*tensors)
        wanted = [t for t, n in zip(tensors, needed, strict=True) if n]
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=again))
        return None, *(next(found) if n else None for n in needed)
