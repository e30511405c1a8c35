"""Where the first number that is not finite comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def culprit(model: nn.Module, inputs: dict[str, Any], forward: Callable[[dict[str, Any]], None]) -> str:
    """Run `forward(inputs)` once more without gradients and name the first thing that is not finite.

    Looked at in this order: the inputs, the weights, the outputs of modules as they finish (so the innermost is
    named), else the loss itself.
    """
    for name, value in inputs.items():
        if not all(map(_finite, _tensors(value))):
            return f"the input '{name}'"
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"the weight '{name}'"
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if not found and not all(map(_finite, _tensors(output))):
                found.append(f"the output of '{name}'")

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            forward(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss itself"


def first_bad_gradient(model: nn.Module) -> str:
    """The parameter nearest to the loss whose gradient is not finite: backward meets it first."""
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    if not bad:
        return "the norm of the gradient overflows, though every entry is finite"
    more = f" (and {len(bad) - 1} before it)" if len(bad) > 1 else ""
    return f"the loss is finite, the gradient of '{bad[-1]}' is not{more}"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
