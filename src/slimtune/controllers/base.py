"""The noun `Controller`, and how torch's own step hooks call it."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn

from ..errors import SlimtuneError, StructureError
from ..layers import Adapter
from ..recipe import Recipe, subclasses
from ..targets import hosts

__all__ = ["Attached", "Controller", "attach", "controllers_of", "trained_adapters"]


class Controller:
    """Something done around every optimizer step. Subclasses keep plain, JSON-valued state.

    Because torch calls it from the optimizer itself, it counts real steps under any loop: gradient accumulation,
    clipping, mixed precision and the Hugging Face Trainer included. A step that mixed precision skips is not seen. A
    subclass that needs the length of the run takes the keyword `total_steps`.

    Attributes whose name starts with an underscore are not state: what `begin` looks up in the model, and the
    optimizer. Statistics as large as a parameter belong into `optimizer.state[parameter]`, under a key that starts
    with the controller's name: there they are saved, resumed, sharded and resized with Adam's own moments.
    """

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Called when attached, and again when its state was put back: make the model ready for the next step."""

    def before_step(self, model: nn.Module) -> None:
        """Gradients are final; may edit `.grad`."""

    def after_step(self, model: nn.Module) -> None:
        """Parameters are updated; `.grad` is still there."""

    def end(self, model: nn.Module) -> None:
        """Training is over: make the model what is to be kept of it, such as without masked ranks."""

    def release(self) -> None:
        """No longer called: let go of all that listens to the model."""

    def note(self) -> dict[str, Any] | None:
        """What the step just taken adds to a run's log, as plain JSON data; None, mostly, for nothing."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after a restart: all attributes without a leading underscore."""
        return copy.deepcopy({key: value for key, value in vars(self).items() if not key.startswith("_")})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned. Do it before `attach`, or through `Attached.load_state_dict`.

        Raises:
            SlimtuneError: keys other than this controller's own.
        """
        if set(state) != set(self.state_dict()):
            odd = sorted(set(state) ^ set(self.state_dict()))
            raise SlimtuneError(f"{type(self).__name__}: state has other keys than expected: {', '.join(odd)}")
        vars(self).update(copy.deepcopy(state))


def _skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether GradScaler calls a fused optimizer for a step that it will not take: gradients overflowed."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


class Attached:
    """A controller bound to a model and an optimizer; `remove()` unbinds it."""

    def __init__(self, controller: Controller, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.controller, self.model, self.optimizer = controller, model, optimizer
        controller.begin(model, optimizer)
        self._open = False  # within a step, which may hold another: torch hooks the step of a subclass and of its base
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def _after(self, *_: Any) -> None:
        if not self._open:
            return
        self._open = False
        self.controller.after_step(self.model)

    def _before(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._open or _skips(self.optimizer):
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self.controller.before_step(self.model)
            self._open = True
            return None

        def closed() -> Any:  # the gradients come only when the step asks for them
            self._open = False
            loss = closure()
            self.controller.before_step(self.model)
            self._open = True
            return loss

        self._open = True
        return (args[:1], {**kwargs, "closure": closed})

    def state_dict(self) -> dict[str, Any]:
        """The controller's."""
        return self.controller.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the controller's state back and make the model ready for the step after it."""
        self.controller.load_state_dict(state)
        self.controller.begin(self.model, self.optimizer)

    def finish(self) -> None:
        """Training is over: let the controller tidy up the model, and stop calling it."""
        self.controller.end(self.model)
        self.remove()

    def remove(self) -> None:
        """Stop calling the controller."""
        for handle in self._handles:
            handle.remove()
        self.controller.release()


def attach(controller: Controller, model: nn.Module, optimizer: torch.optim.Optimizer) -> Attached:
    """Call `controller` around every step of `optimizer` (an accelerate wrapper is looked through).

    Raises:
        SlimtuneError: not a torch optimizer, or the controller finds nothing in the model to act on.

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
    attached = Attached(controller, model, inner)
    for host in hosts(model).values():
        for adapter in host.adapters.values():
            if isinstance(adapter, Adapter):
                adapter.awaited.discard(type(controller).__name__)
    return attached


def trained_adapters(model: nn.Module, controller: str, name: str | None = None) -> list[tuple[str, str, Adapter]]:
    """(layer, adapter's name, adapter) of those in training called `name`, or by default whose recipe names the
    controller.

    Raises:
        SlimtuneError: there is none.
    """
    found = [
        (layer, key, a)
        for layer, host in hosts(model).items()
        for key, a in host.adapters.items()
        if isinstance(a, Adapter)
        and (controller in a.recipe.controllers if name is None else key == name)
        and any(p.requires_grad for p in a.parameters())
    ]
    if not found:
        what = f"whose recipe names {controller}" if name is None else f"called {name!r}"
        raise SlimtuneError(f"{controller}: the model trains no adapter {what}")
    return found


def controllers_of(recipe: Recipe, total_steps: int) -> list[Controller]:
    """The controllers a recipe names, made for a run of `total_steps` optimizer steps; attach each of them.

    Raises:
        StructureError: a controller that is not defined, or an option it does not have.

    Example:
        >>> import slimtune as st
        >>> [type(c).__name__ for c in st.controllers_of(st.singlora(), total_steps=1000)]
        ['Ramp']
        >>> st.controllers_of(st.lora(), total_steps=1000)
        []
    """
    table = {name: cls for name, cls in subclasses(Controller).items() if not inspect.isabstract(cls)}
    made = []
    for name, options in recipe.controllers.items():
        if name not in table:
            raise StructureError(f"{recipe.name}: unknown controller {name!r}; known: {', '.join(sorted(table))}")
        known = inspect.signature(table[name]).parameters
        for key in options:
            if key not in known:
                raise StructureError(f"{recipe.name}: {name} has no option {key!r}; it has {', '.join(known)}")
        length = {"total_steps": total_steps} if "total_steps" in known else {}
        made.append(table[name](**length, **options))
    return made
