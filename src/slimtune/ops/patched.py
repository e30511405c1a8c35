"""Products with W + s dW in one GEMM, for a dW that is cheap to build and dear to apply.

Shapes: O out, I in, T batch dims flattened. W and dW (O, I), x (*T, I), y (*T, O).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import base_product, fused, traced

__all__ = ["patched_linear"]

Dense = Callable[[Sequence[Tensor]], Tensor]
Gradients = Callable[[Sequence[Tensor], Tensor, Tensor], "tuple[Tensor, ...] | None"]


def patched_linear(
    x: Tensor,  # (*T, I)
    W: Tensor,  # (O, I), frozen
    bias: Tensor | None,  # (O,), frozen
    scale: Tensor,  # 0-d
    parameters: Sequence[Tensor],
    dense: Dense,
    gradients: Gradients,
) -> Tensor:
    """y = x (W + s dW)^T + bias with dW = dense(parameters). Returns (*T, O).

    dW is a temporary in both directions: it is built again in the backward pass, so that only x is kept.
    `gradients(parameters, x, g)` gives the gradients of sum(g * x dW^T) in the parameters, for x (T, I) and
    g (T, O), without an (O, I) gradient; where it returns None they come from g^T x through `dense`.

    Example:
        >>> x, W, v, s = torch.randn(2, 3), torch.randn(4, 3), torch.randn(3), torch.tensor(0.5)
        >>> y = patched_linear(x, W, None, s, [v], lambda p: p[0].expand(4, 3), lambda p, x, g: None)
        >>> torch.allclose(y, x @ (W + 0.5 * v).T, atol=1e-5)
        True
    """
    wanted = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters))
    if not wanted or scale.requires_grad or traced(x):
        return _composed(x, W, bias, scale, dense(parameters))
    return fused(lambda x: _PatchedLinear.apply(x, W, bias, scale, dense, gradients, *parameters), x, W, bias)


def _composed(x: Tensor, W: Tensor, bias: Tensor | None, scale: Tensor, dW: Tensor) -> Tensor:
    return F.linear(x, _patched(W, scale, dW, W.dtype), bias)


def _patched(W: Tensor, scale: Tensor, dW: Tensor, dtype: torch.dtype) -> Tensor:
    # added in the wider type and cast once: a small change must not be rounded away twice
    if W.dtype != dW.dtype and not torch.is_grad_enabled():
        return W.to(dW.dtype).addcmul_(dW, scale.to(dW.dtype)).to(dtype)
    return torch.addcmul(W.to(dW.dtype), dW, scale.to(dW.dtype)).to(dtype)


class _PatchedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, bias, scale, dense, gradients, *parameters):
        t = x.dtype
        y, _ = base_product(x, _patched(W, scale, dense(parameters), t), bias)
        ctx.dense, ctx.gradients = dense, gradients
        ctx.save_for_backward(x, W, bias, scale, *parameters)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, W, bias, scale, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad[6:]
        t = x.dtype
        if torch.is_grad_enabled():  # a second derivative: differentiate the definition
            y = F.linear(x, _patched(W, scale, ctx.dense(parameters), t), None if bias is None else bias.to(t))
            wanted = [v for v, need in zip((x, *parameters), (ctx.needs_input_grad[0], *needed), strict=True) if need]
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            every = [next(found) if need else None for need in (ctx.needs_input_grad[0], *needed)]
            return every[0], None, None, None, None, None, *every[1:]
        g, x2 = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])  # (T, O), (T, I)
        own: list[Tensor | None] = [None] * len(parameters)
        dW = None
        if any(needed):
            direct = ctx.gradients(parameters, x2, g)
            if direct is not None:
                own = [v * scale.to(v.dtype) if need else None for v, need in zip(direct, needed, strict=True)]
            else:
                leaves = [p.detach().requires_grad_(need) for p, need in zip(parameters, needed, strict=True)]
                with torch.enable_grad():
                    live = ctx.dense(leaves)
                dW = live.detach()
                pulled = (g.t() @ x2).to(dW.dtype).mul_(scale.to(dW.dtype))
                pulls = iter(torch.autograd.grad(live, [p for p in leaves if p.requires_grad], pulled))
                own = [next(pulls) if need else None for need in needed]
        grad_x = None
        if ctx.needs_input_grad[0]:
            dW = ctx.dense(parameters) if dW is None else dW
            grad_x = (g @ _patched(W, scale, dW, t)).view(x.shape)
        return grad_x, None, None, None, None, None, *own
