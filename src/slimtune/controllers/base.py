"""The noun `Controller`, and how torch's own step hooks call it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import SlimtuneError

__all__ = ["Attached", "Controller", "attach"]


class Controller:
    """Something done around every optimizer step. Subclasses keep plain, JSON- or tensor-valued state.

    Because torch calls it from the optimizer itself, it counts real steps under any loop: gradient accumulation,
    clipping, mixed precision and the Hugging Face Trainer included.
    """

    def before_step(self, model: nn.Module) -> None:
        """Gradients are final; may edit `.grad`."""

    def after_step(self, model: nn.Module) -> None:
        """Parameters are updated; `.grad` is still there."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after a restart: by default, all attributes."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned.

        Raises:
            SlimtuneError: keys other than this controller's own.
        """
        if set(state) != set(self.state_dict()):
            odd = sorted(set(state) ^ set(self.state_dict()))
            raise SlimtuneError(f"{type(self).__name__}: state has other keys than expected: {', '.join(odd)}")
        vars(self).update(state)


class Attached:
    """A controller bound to a model and an optimizer; `remove()` unbinds it."""

    def __init__(self, controller: Controller, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.controller = controller
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: controller.before_step(model)),
            optimizer.register_step_post_hook(lambda *_: controller.after_step(model)),
        ]

    def remove(self) -> None:
        """Stop calling the controller."""
        for handle in self._handles:
            handle.remove()


def attach(controller: Controller, model: nn.Module, optimizer: torch.optim.Optimizer) -> Attached:
    """Call `controller` around every step of `optimizer` (an accelerate wrapper is looked through).

    Example:
        >>> class Count(Controller):
        ...     def __init__(self): self.steps = 0
        ...     def after_step(self, model): self.steps += 1
        >>> model = nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> count = Count(); handle = attach(count, model, optimizer)
        >>> optimizer.step(); optimizer.step(); count.steps
        2
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise SlimtuneError(f"attach: expected a torch optimizer, got {type(optimizer).__name__}")
    return Attached(controller, model, inner)
