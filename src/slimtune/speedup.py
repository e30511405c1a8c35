"""Layer 3: what a layer costs dense and with thin factors, measured on its own.

Shapes: R rank.
"""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .compress import part_of
from .factors.base import matrices, thin
from .structured import check_holdable, hold

__all__ = ["Call", "Times", "measure"]


class Call(NamedTuple):
    """How a layer was called: enough to call it so again."""

    shape: tuple[int, ...]
    """Of its input."""
    dtype: torch.dtype
    device: torch.device
    autocast: torch.dtype | None = None

    @classmethod
    def of(cls, x: Tensor) -> Call:
        """That of an input, under the autocast that is in force."""
        kind = x.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return cls(tuple(x.shape), x.dtype, x.device, cast)


class Times(NamedTuple):
    """Seconds for one pass forward and one backward."""

    dense: float
    thin: float

    @property
    def speedup(self) -> float:
        """How many times faster the factors are."""
        return self.dense / self.thin


def measure(module: nn.Module, name: str, call: Call, rank: int, form: str = "channel", repeats: int = 5) -> Times:
    """Time a layer and one like it with random factors of a rank, forward and backward, on random numbers.

    Copies are timed: the layer, its hooks, gradients and the random state are left alone. Both take turns `repeats`
    times after one pass that does not count; the medians are told.

    Raises:
        TargetError: a layer that cannot be factorised.

    Example:
        >>> call = Call((256, 64), torch.float32, torch.device("cpu"))
        >>> times = measure(nn.Linear(64, 64), "layer", call, rank=8)
        >>> times.speedup == times.dense / times.thin
        True
    """
    check_holdable(module, name)
    part = part_of(module, name)
    M = matrices(part, form)
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(M.device)

    G, rows, columns = M.shape
    weight: Any = module.weight
    structure = thin(part, noise(G, rows, rank) / rows**0.5, noise(G, rank, columns) / columns**0.5, form).to(weight)
    x = noise(*call.shape).to(call.device, call.dtype)
    passes = [_pass(_copied(module), x, call), _pass(hold(_copied(module), structure), x, call)]
    seconds: list[list[float]] = [[], []]
    for turn in range(repeats + 1):
        for run, taken in zip(passes, seconds, strict=True):
            _wait(call.device)
            start = time.perf_counter()
            run()
            _wait(call.device)
            if turn:
                taken.append(time.perf_counter() - start)
    return Times(*map(median, seconds))


def _copied(module: nn.Module) -> nn.Module:
    """The layer with parameters of its own, and nothing that listens to it."""
    twin = copy.copy(module)
    twin.__dict__ = dict(module.__dict__)
    own = {k: None if p is None else nn.Parameter(p.detach().clone()) for k, p in module._parameters.items()}
    twin._parameters, twin._modules = own, dict(module._modules)
    for key, value in twin.__dict__.items():
        if key.endswith("_hooks") and isinstance(value, OrderedDict):
            twin.__dict__[key] = OrderedDict()
    return twin


def _pass(module: nn.Module, x: Tensor, call: Call) -> Callable[[], object]:
    x = x.detach().requires_grad_(x.is_floating_point())
    inputs = [x, *module.parameters()]

    def run() -> object:
        with (
            torch.enable_grad(),
            nullcontext() if call.autocast is None else torch.autocast(call.device.type, call.autocast),
        ):
            y = module(x)
        return torch.autograd.grad(y, inputs, torch.ones_like(y), allow_unused=True)

    return run


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
