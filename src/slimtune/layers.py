"""Layer 2: where adapters live. A layer is extended in place by a subclass of its own class.

Weights keep their names, a quantised layer's own forward comes along, and `torch.compile` sees one class per
kind of layer. `layouts` says what each kind is as a linear map.

Shapes: O out, I in (a convolution's I is its input channels per group times its kernel), R rank, *T batch dims.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from .compositions import LinearMap
from .compositions.base import version
from .errors import StructureError, TargetError, UninitializedError
from .initialisers import Stats, apply, check
from .layouts import Conv1DLayout, EmbeddingLayout, LinearLayout, layout_of
from .recipe import Recipe
from .structured import Structured, rebind, structured_class
from .structures import Structure

__all__ = [
    "Adapted",
    "Adapter",
    "Extended",
    "Host",
    "SavedModule",
    "check_host",
    "extend",
    "give_weight",
    "own_class",
    "restore",
]


class Adapter(nn.Module):
    """One adapter of one layer: a structure, the composition that applies it, and its scale.

    Parameters are `structure.*` and `composition.*`; `scale` is a 0-d buffer, so that changing it neither
    recompiles nor needs a new optimizer.
    """

    scale: Tensor

    def __init__(self, recipe: Recipe, out_features: int, in_features: int, **kwargs: Any) -> None:
        super().__init__()
        check(recipe.init, recipe.name)
        self.recipe = recipe
        self.structure: Structure = recipe.structure(out_features, in_features, **recipe.options, **kwargs)
        self.composition = recipe.composition(**recipe.composition_options)
        self.composition.build(out_features, in_features, **kwargs)
        self.dropout = recipe.dropout
        self.awaited: set[str] = set()  # controllers of the recipe that nobody has attached yet
        full = recipe.scale(self.structure.rank)
        scale = recipe.start_scale * full
        if not max(abs(full), abs(scale)) <= torch.finfo(torch.float32).max:
            raise StructureError(f"{recipe.name}: a scale of {full:g} (start {scale:g}) is more than fp32 holds")
        self.register_buffer("scale", torch.tensor(scale, dtype=kwargs.get("dtype"), device=kwargs.get("device")))

    @torch.no_grad()
    def initialize(self, below: LinearMap, stats: Stats | None = None) -> None:
        """Draw the structure's starting values and read the composition's from the map below.

        Raises:
            StructureError: the recipe starts from statistics of the data, and they are not given.
        """
        full = self.recipe.scale(self.structure.rank)
        self.scale.fill_(self.recipe.start_scale * full)
        self.structure.reset_parameters()
        apply(self.recipe.init, self.structure, below.weight, stats, full)
        self.structure.prepare(below.weight)
        self.composition.init_from(below)

    def saved_tensors(self) -> dict[str, Tensor]:
        """What a file holds of this adapter: its parameters and the structure's persistent buffers."""
        return {key: t for key, t in self.state_dict(keep_vars=True).items() if key != "scale"}

    def dense(self) -> Tensor:
        """s dW, (O, I)."""
        return self.scale * self.structure.dense()

    def extra_repr(self) -> str:
        return f"{self.recipe.name}, scale {'meta' if self.scale.is_meta else round(self.scale.item(), 6)}"


def _tell(adapter: Adapter) -> None:
    _warn_unattended(adapter.recipe.name, ", ".join(sorted(adapter.awaited)))
    if not torch.compiler.is_compiling():
        adapter.awaited.clear()  # shared by all layers: told once


@torch.compiler.assume_constant_result  # speaks while the compiler traces, and breaks no graph
def _warn_unattended(method: str, controllers: str) -> None:
    warnings.warn(
        f"{method} is trained without {controllers}, which it needs. Connect it to the optimizer: for c in "
        "st.controllers_of(recipe, total_steps): st.attach(c, model, optimizer); under transformers' Trainer or TRL: "
        "callbacks=[slimtune.hf.ControllerCallback()]",
        UserWarning,
        stacklevel=2,
    )


class Adapted(LinearMap):
    """The map that an adapter makes of the map below it."""

    __slots__ = ("adapter", "below", "is_matrix", "training")

    def __init__(self, adapter: Adapter, below: LinearMap, training: bool) -> None:
        self.adapter, self.below, self.training = adapter, below, training
        self.is_matrix = below.is_matrix

    def __call__(self, x: Any) -> Tensor:
        scale: Tensor = self.adapter._buffers["scale"]  # type: ignore[assignment]
        if scale.is_meta and not x.is_meta:
            raise UninitializedError("an adapter is still on the meta device; load weights, then call initialize")
        if self.adapter.awaited and self.training and torch.is_grad_enabled():
            _tell(self.adapter)
        modules = self.adapter._modules
        dropout = self.adapter.dropout if self.training else 0.0
        return modules["composition"].forward(  # type: ignore[union-attr]
            x, self.below, modules["structure"], scale, dropout
        )

    def _parts(self) -> tuple[LinearMap, Structure, Tensor]:
        return self.below, self.adapter.structure, self.adapter.scale

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.adapter.composition.effective(*self._parts(), dtype)

    def matmul(self, V: Tensor) -> Tensor:
        return self.adapter.composition.matmul(V, *self._parts())

    def row_square(self) -> Tensor:
        return self.adapter.composition.row_square(*self._parts())

    def key(self) -> tuple[Any, ...] | None:
        below, own = self.below.key(), version(self.adapter.scale, *self.adapter.parameters())
        return None if below is None or own is None else (below, own)

    @property
    def bias(self) -> Tensor | None:
        return self.below.bias

    def plain(self) -> Tensor | None:
        return None

    def change(self, x: Any, delta: Structure, dropout: float = 0.0) -> Tensor:
        return self.below.change(x, delta, dropout)

    def plus(
        self,
        x: Any,
        delta: Structure,
        scale: Tensor,
        dropout: float = 0.0,
        columns: Tensor | None = None,
        of: LinearMap | None = None,
    ) -> Tensor:
        if columns is not None:  # only the layer itself knows what its columns meet
            return self.below.plus(x, delta, scale, dropout, columns, of or self)
        y = (of or self)(x)
        return y + scale.to(y.dtype) * self.change(x, delta, dropout)

    def with_weight(self, x: Any, W: Tensor, bias: Tensor | None) -> Tensor:
        return self.below.with_weight(x, W, bias)

    def rows(self, v: Tensor) -> Tensor:
        return self.below.rows(v)


_PLAIN = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


class Extended(nn.Module):
    """What `extend` mixes into a module's own class: a stack of named additions, and the way back."""

    base_class: type[nn.Module]
    adapters: nn.ModuleDict
    active_adapters: tuple[str, ...]

    def addition(self, name: str) -> Any:
        """The addition called `name`: an Adapter, or a module's trainable copy."""
        return self.adapters[name]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made at run time, so pickle and deepcopy go through the class it extends
        base = self.base_class
        if issubclass(base, Structured):  # a class made at run time too
            return _rebuild, (base.dense_class, None, True), self.__dict__
        return _rebuild, (base, getattr(self, "layout", None)), self.__dict__

    def base_state(self) -> dict[str, Tensor]:
        """The module's own parameters and buffers, without its adapters."""
        return {k: v for k, v in self.state_dict(keep_vars=True).items() if not k.startswith("adapters.")}


class Host(Extended):
    """A layer with adapters: base, then each active adapter on top of the one before."""

    layout: type[LinearLayout]
    is_plain: bool
    weight: Tensor

    def forward(self, input: Tensor) -> Tensor:  # torch's own name: callers may pass it by keyword
        return self.map()(input)

    def map(self, below: str | None = None) -> LinearMap:
        """The linear map of the active adapters; with `below`, of those under that adapter."""
        map: LinearMap = self.layout(self)
        adapters = self._modules["adapters"]._modules  # type: ignore[union-attr]
        for name in self.active_adapters:
            if name == below:
                break
            map = Adapted(adapters[name], map, self.training)  # type: ignore[arg-type]
        return map


class SavedModule(Extended):
    """Any module with private trainable copies of itself, one per adapter; the last active copy answers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.active_adapters:
            return self.adapters[self.active_adapters[-1]](*args, **kwargs)
        bare = object.__new__(self.base_class)  # a container would iterate over `adapters` too
        own = {k: m for k, m in self._modules.items() if k != "adapters"}
        bare.__dict__.update(self.__dict__, _modules=own)
        return self.base_class.forward(bare, *args, **kwargs)


def own_class(module: nn.Module) -> type[nn.Module]:
    """A module's class without what `extend` made of it."""
    return module.base_class if isinstance(module, Extended) else type(module)


def check_host(module: nn.Module, name: str) -> None:
    """Raise TargetError, naming the layer and why, if an adapter would not fit it or would be bypassed."""
    cls = own_class(module)
    where = f"{name!r} ({cls.__name__}) cannot be adapted"
    if isinstance(module, SavedModule):
        raise TargetError(f"{where}: it is trained in full as one of modules_to_save")
    if issubclass(cls, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TargetError(f"{where}: nn.MultiheadAttention reads its weight without calling it")
    layout = layout_of(cls)
    if layout is None:
        raise TargetError(f"{where}: adapters fit Linear, transformers' Conv1D, Conv1d, Conv2d, Conv3d, Embedding")
    weight: Any = module.weight
    if weight.is_complex():
        raise TargetError(f"{where}: its weight is complex, adapters are real")
    if layout is EmbeddingLayout:
        if module.max_norm is not None:
            raise TargetError(f"{where}: max_norm rewrites its weight in every forward")
        if cls.forward is not nn.Embedding.forward and not hasattr(module, "embed_scale"):
            raise TargetError(f"{where}: its forward is not a plain look-up")
    check_extendable(module, name)


def check_extendable(module: nn.Module, name: str) -> None:
    """Raise TargetError if calls of a module would not reach its extended class's forward."""
    if isinstance(module, Extended):
        return
    where = f"{name!r} ({type(module).__name__}) cannot be extended"
    if hasattr(module, "adapters"):
        raise TargetError(f"{where}: it already has an attribute named 'adapters'")
    if type(module).forward is nn.Module.forward:
        raise TargetError(f"{where}: it is a container without a forward of its own; name what it holds")
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TargetError(f"{where}: nn.MultiheadAttention reads its weight without calling it")
    if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
        raise TargetError(f"{where}: its forward was replaced on the object itself")


@functools.cache
def _extended_class(base: Any, layout: type[LinearLayout] | None) -> type[Extended]:
    fields: dict[str, Any] = {"base_class": base, "__module__": __name__, "__doc__": base.__doc__}
    if layout is None:
        return type(f"Saved{base.__name__}", (SavedModule, base), fields)
    fields["layout"] = layout
    fields["is_plain"] = base.forward in _PLAIN or (layout is Conv1DLayout and base.__name__ == "Conv1D")
    return type(f"Adapted{base.__name__}", (Host, base), fields)


def _rebuild(base: type[nn.Module], layout: type[LinearLayout] | None, held: bool = False) -> Extended:
    if held:
        base = structured_class(cast(Any, base))
        layout = layout_of(base)
    cls: Any = _extended_class(base, layout)  # type: ignore[arg-type]
    return cls.__new__(cls)


def extend(module: nn.Module, layout: type[LinearLayout] | None) -> Extended:
    """Give a module its extended class, in place and once. `layout` None makes a SavedModule."""
    if isinstance(module, Extended):
        return module
    extended: Any = module
    extended.__class__ = _extended_class(type(module), layout)  # type: ignore[arg-type]
    rebind(extended)
    extended.adapters = nn.ModuleDict()
    extended.active_adapters = ()
    return extended


def give_weight(host: Host, weight: nn.Parameter) -> None:
    """Let a host whose weight a structure computes hold this one instead, as a layer of its dense class."""
    dense = cast(Any, host.base_class).dense_class
    del host._modules["structure"]
    host.__class__ = _extended_class(dense, layout_of(dense))  # type: ignore[assignment,arg-type]
    host.weight = weight
    rebind(host)


def restore(module: Extended) -> None:
    """Give a module with no adapters left its own class back."""
    del module._modules["adapters"], module.__dict__["active_adapters"]
    module.__class__ = module.base_class  # type: ignore[assignment]
    rebind(module)
