"""Dropout whose mask is drawn again in the backward pass instead of being kept.

An adapter that drops its input would otherwise keep a mask and a second copy of x for every layer. Here
only a seed is kept; `replayed_dropout` also makes whatever consumes the dropped tensor keep x itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .fused import traced

__all__ = ["draw_seed", "dropped", "keep_probability", "replayed_dropout", "seeded_dropout"]

LEVELS = 256


def keep_probability(p: float) -> float:
    """The probability of keeping an entry when asked to drop with probability p: p is rounded to 1/256.

    Masks are compared bytewise, eight entries to a random word; the scale 1/keep uses the rounded value, so
    the expectation stays exact. Any 0 < p < 1 drops at least 1/256 and keeps at least 1/256.
    """
    return 1.0 - _threshold(p) / LEVELS


def _threshold(p: float) -> int:
    return min(max(round(p * LEVELS), 1), LEVELS - 1) if p > 0 else 0


def draw_seed() -> int:
    """A seed from torch's global CPU generator: reproducible, restored by checkpoints, no device sync."""
    return int(torch.randint(0, 2**62, (), dtype=torch.int64))


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """x with each entry zeroed with probability p (rounded to 1/256), *not* rescaled. Same seed, same mask."""
    return kept(x, p, seed).mul_(x)


def kept(x: Tensor, p: float, seed: int) -> Tensor:
    """1 where an entry of x is kept and 0 where it is dropped, in x's shape and dtype."""
    generator = torch.Generator(device=x.device)
    generator.manual_seed(seed)
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
    words.random_(-(2**63), None, generator=generator)
    random = words.view(torch.uint8)[: x.numel()].view(x.shape)
    # comparing straight into x's dtype is several times faster than multiplying by a bool
    return torch.ge(random, _threshold(p), out=torch.empty(x.shape, dtype=x.dtype, device=x.device))


def seeded_dropout(x: Tensor, p: float) -> Tensor:
    """Dropout by the mask that the functions with a backward pass of their own draw from the same state of torch's
    generator: a reentrant checkpoint runs the forward without gradients and then again with them.

    Example:
        >>> _ = torch.manual_seed(0); a = seeded_dropout(torch.ones(9), 0.5)
        >>> _ = torch.manual_seed(0); b = dropped(torch.ones(9), 0.5, draw_seed())
        >>> torch.equal(a > 0, b > 0)
        True
    """
    if traced(x):
        return torch.nn.functional.dropout(x, p)
    return _Drop.apply(x, p, draw_seed())


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, seed):
        ctx.p, ctx.seed = p, seed
        return dropped(x, p, seed).mul_(1 / keep_probability(p))

    @staticmethod
    def backward(ctx, grad):
        return dropped(grad, ctx.p, ctx.seed).mul_(1 / keep_probability(ctx.p)), None, None


def replayed_dropout(function: Callable[[Tensor], Tensor], x: Tensor, p: float) -> Tensor:
    """function(dropout(x, p)), keeping x for the backward pass wherever `function` would keep the dropped x.

    Under torch.compile, where the compiler recomputes masks by itself, and under torch.func this is ordinary dropout.
    """
    if traced(x):
        return function(torch.nn.functional.dropout(x, p, training=True))
    seed = draw_seed()
    d = _Drop.apply(x, p, seed)
    if not torch.is_grad_enabled():
        return function(d)
    whole, version, storage = x.detach(), x._version, d.untyped_storage().data_ptr()

    def pack(t: Tensor) -> Any:
        if t.dtype == d.dtype and t.untyped_storage().data_ptr() == storage:
            return (t.size(), t.stride(), t.storage_offset())
        return t

    def unpack(saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if whole._version != version:
            raise RuntimeError("the input of a layer with adapter dropout was modified by an inplace operation")
        again = dropped(whole, p, seed).mul_(1 / keep_probability(p))
        return again.contiguous().as_strided(*saved)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return function(d)
