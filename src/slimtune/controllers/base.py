"""The noun `Controller`, and how torch's own step hooks call it."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import SlimtuneError
from ..layers import Adapter
from ..recipe import Recipe, check_part, subclasses
from ..targets import hosts

__all__ = [
    "Attached",
    "Controller",
    "adapters",
    "attach",
    "controllers_of",
    "make_controllers",
    "require_rates",
    "trained_adapters",
]


class Controller:
    """Something done around every optimizer step. Subclasses keep plain, JSON-valued state.

    Because torch calls it from the optimizer itself, it counts real steps under any loop: gradient accumulation,
    clipping, mixed precision and the Hugging Face Trainer included. A step that mixed precision skips is not seen. A
    subclass that needs the length of the run takes the keyword `total_steps`.

    Attributes whose name starts with an underscore are not state: what `begin` looks up in the model, and the
    optimizer. Statistics as large as a parameter belong into `optimizer.state[parameter]`, under a key that starts
    with the controller's name: there they are saved, resumed, sharded and resized with Adam's own moments.
    """

    replaces = False
    """Whether other parameters take the place of the model's own while it trains, which the buckets of
    DistributedDataParallel and compiled graphs cannot follow."""

    _seen = False
    """Whether it was called after a step, in this run or in the one that its state is of."""

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Called when attached, and again when its state was put back: make the model ready for the next step."""

    def before_step(self, model: nn.Module) -> None:
        """Gradients are final; may edit `.grad`."""

    def after_step(self, model: nn.Module) -> None:
        """Parameters are updated; `.grad` is still there."""

    def end(self, model: nn.Module) -> None:
        """Training is over: make the model what is to be kept of it, such as without masked ranks."""

    def missing(self) -> str | None:
        """What the run would still have needed for `end` to leave what was asked for, in words; None for nothing."""
        return None

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

        Warns:
            UserWarning: options, such as total_steps, that were others in the run the state is of; those hold.
        """
        if set(state) != set(self.state_dict()):
            odd = sorted(set(state) ^ set(self.state_dict()))
            raise SlimtuneError(f"{type(self).__name__}: state has other keys than expected: {', '.join(odd)}")
        if not self._seen:
            self._tell_changed(state)
        vars(self).update(copy.deepcopy(state), _seen=True)

    _adjusts: frozenset[str] = frozenset()
    """Options that it changes by itself while it runs."""

    def _tell_changed(self, state: dict[str, Any]) -> None:
        options = inspect.signature(type(self)).parameters.keys() & state.keys() - self._adjusts
        changed = [key for key in sorted(options) if state[key] != getattr(self, key)]
        if changed:
            told = ", ".join(f"{key} = {state[key]!r} (now given: {getattr(self, key)!r})" for key in changed)
            warnings.warn(
                f"{type(self).__name__}: goes on with what it was begun with: {told}", UserWarning, stacklevel=3
            )


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
        _attached(optimizer).append(self)

    def _after(self, *_: Any) -> None:
        if not self._open:
            return
        self._open = False
        self.controller._seen = True
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
        """Training is over: let the controller tidy up the model, and stop calling it.

        Warns:
            UserWarning: the optimizer took no step, or the run was shorter or longer than the controller was made for.
        """
        kind = type(self.controller).__name__
        missing = self.controller.missing()
        if not self.controller._seen:
            missing = (
                "the optimizer it is attached to has taken no step, so it has done nothing; attach it to the one that "
                "trains the adapter"
            )
        if missing and self in _attached(self.optimizer):
            warnings.warn(f"{kind}: {missing}", UserWarning, stacklevel=2)
        self.controller.end(self.model)
        self.remove()

    def remove(self) -> None:
        """Stop calling the controller."""
        for handle in self._handles:
            handle.remove()
        if self in (among := _attached(self.optimizer)):
            among.remove(self)
        self.controller.release()


def _attached(optimizer: torch.optim.Optimizer) -> list[Attached]:
    """Those that the optimizer calls; not part of its state."""
    return vars(optimizer).setdefault("_slimtune_attached", [])


def attach(controller: Controller, model: nn.Module, optimizer: torch.optim.Optimizer) -> Attached:
    """Call `controller` around every step of `optimizer` (an accelerate wrapper is looked through).

    Raises:
        SlimtuneError: not a controller or not a torch optimizer, the controller finds nothing in the model to
            act on, or one like it, for the same adapter, is attached already.

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
    if not isinstance(controller, Controller):
        raise SlimtuneError(f"attach: expected one controller, got {type(controller).__name__}; attach them one by one")
    for other in _attached(inner):
        if other.controller is controller or (other.model is model and _alike(other.controller, controller)):
            raise SlimtuneError(
                f"attach: {type(controller).__name__} is attached to this optimizer already and would act twice in "
                "every step; remove() the first one before"
            )
    attached = Attached(controller, model, inner)
    for _, _, adapter in adapters(model):
        adapter.awaited.discard(type(controller).__name__)
    return attached


def _alike(a: Controller, b: Controller) -> bool:
    """Whether both would do the same to the same adapter."""
    return type(a) is type(b) and hasattr(a, "adapter") and a.adapter == getattr(b, "adapter", None)


def require_rates(groups: Iterable[Mapping[str, Any]], controller: str) -> None:
    """Raise SlimtuneError for a parameter group without a learning rate, as Adafactor's is that finds its own."""
    if any(group["lr"] is None for group in groups):
        raise SlimtuneError(f"{controller}: it needs the optimizer's learning rate, and lr is None; give it a number")


def adapters(model: nn.Module) -> list[tuple[str, str, Adapter]]:
    """(layer, adapter's name, adapter) of all that a model carries, in its order."""
    return [
        (layer, name, a)
        for layer, host in hosts(model).items()
        for name, a in host.adapters.items()
        if isinstance(a, Adapter)
    ]


def trained_adapters(
    model: nn.Module, controller: str, name: str | None = None, others: bool = False
) -> list[tuple[str, str, Adapter]]:
    """(layer, adapter's name, adapter) of those in training called `name`, or by default whose recipe names the
    controller; if none does, and with `others`, of all.

    Raises:
        SlimtuneError: there is none.
    """
    trained = [(n, key, a) for n, key, a in adapters(model) if any(p.requires_grad for p in a.parameters())]
    if name is not None:
        found = [row for row in trained if row[1] == name]
    else:
        found = [row for row in trained if controller in row[2].recipe.controllers] or (trained if others else [])
    if not found:
        what = f"called {name!r}" if name is not None else "" if others else f"whose recipe names {controller}"
        raise SlimtuneError(f"{controller}: the model trains no adapter {what}".rstrip())
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
    return make_controllers(recipe.controllers, total_steps, recipe.name)


def make_controllers(parts: Mapping[str, Mapping[str, Any]], total_steps: int, where: str) -> list[Controller]:
    """The controllers of {class name: its options}, likewise; `where` is the method that names them."""
    table = {name: cls for name, cls in subclasses(Controller).items() if not inspect.isabstract(cls)}
    made = []
    for name, options in parts.items():
        check_part("controller", name, options, table, where)
        known = inspect.signature(table[name]).parameters
        length = {"total_steps": total_steps} if "total_steps" in known else {}
        made.append(table[name](**length, **options))
    return made
