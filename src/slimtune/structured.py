"""Layer 2: layers whose weight is a structure: y = dW x + bias, with nothing below dW.

A layer is changed in place, by a subclass of its own class, as adapters do it: names, references, hooks and the
numbers that describe the layer stay. Its tensors are then `structure.*` and `bias`; `weight` is computed from them.

Shapes: O out, I in (a convolution's I is its input channels per group times its kernel), R rank, *T batch dims.
"""

from __future__ import annotations

import functools
import types
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compositions.base import version
from .errors import StructureError, TargetError
from .layouts import Conv1DLayout, ConvLayout, EmbeddingLayout, LinearLayout, is_packed, layout_of
from .structures import Factored, Structure

__all__ = ["Structured", "check_holdable", "densify", "hold", "rebind", "structured_class"]


class _Held(LinearLayout):
    """What a layer with a structure in its weight's place is as a linear map."""

    __slots__ = ()

    def held(self, x: Tensor) -> Tensor:
        """dW x + bias."""
        structure, bias = self.layer.structure, self.bias
        if isinstance(structure, Factored):
            B, A = structure.factors()
            return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype), bias)
        if structure.work >= structure.out_features * structure.in_features:
            return F.linear(x, structure.matrix().to(x.dtype), bias)
        y = structure(x)
        return y if bias is None else y + bias

    def plain(self) -> Tensor | None:
        return None

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        W = self.layer.structure.matrix()
        return W if dtype is None else W.to(dtype)

    def matmul(self, V: Tensor) -> Tensor:
        return self.layer.structure.matmul(V)

    def key(self) -> tuple[Any, ...] | None:
        return version(*self.layer.structure.parameters(), *self.layer.structure.buffers())

    def is_affine(self) -> bool:
        return True

    @staticmethod
    def sizes(layer: Any) -> tuple[int, int]:
        return layer.structure.out_features, layer.structure.in_features


class StructuredLinearLayout(_Held, LinearLayout):
    """torch.nn.Linear with a structure in its weight's place."""

    __slots__ = ()


class StructuredConv1DLayout(_Held, Conv1DLayout):
    """transformers' Conv1D likewise."""

    __slots__ = ()


class StructuredConvLayout(_Held, ConvLayout):
    """torch.nn.Conv1d, Conv2d, Conv3d likewise."""

    __slots__ = ()

    def held(self, x: Tensor) -> Tensor:
        return self._change(x, self.layer.structure, 0.0, None, self.bias)


LAYOUTS: dict[type[LinearLayout], type[_Held]] = {
    LinearLayout: StructuredLinearLayout,
    Conv1DLayout: StructuredConv1DLayout,
    ConvLayout: StructuredConvLayout,
}


class Structured(nn.Module):
    """What `hold` mixes into a layer's own class."""

    dense_class: type[nn.Module]
    """The layer's class with a weight of its own."""
    own_layout: type[_Held]
    structure: Structure

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # who makes a new layer of a layer's class, as PEFT does, means one with a weight
        return cls.dense_class(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def forward(self, input: Tensor) -> Tensor:
        return self.own_layout(self).held(input)

    @property
    def weight(self) -> Tensor:
        """dW as the layer would store it, computed anew each time."""
        layout = self.own_layout(self)
        return layout.shaped(layout.weight())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.dense_class,), self.__dict__


def _rebuild(dense: type[nn.Module]) -> Structured:
    cls: Any = structured_class(cast(Any, dense))
    return cls.__new__(cls)


@functools.cache
def structured_class(dense: Any) -> type[Structured]:
    """The class that a layer of class `dense` gets.

    Raises:
        TargetError: a class that is no linear map, or an embedding.
    """
    layout = layout_of(dense)
    if layout not in LAYOUTS:
        raise TargetError(f"{dense.__name__}: only Linear, transformers' Conv1D and convolutions can hold a structure")
    fields = {"dense_class": dense, "own_layout": LAYOUTS[layout], "__module__": __name__, "__doc__": dense.__doc__}
    return type(f"Structured{dense.__name__}", (Structured, dense), fields)


def check_holdable(module: nn.Module, name: str) -> None:
    """Raise TargetError, naming the layer and why, unless a structure can take its weight's place."""
    where = f"{name!r} ({type(module).__name__}) cannot be factorised"
    if isinstance(module, Structured):
        raise TargetError(f"{where}: it is already; st.expand first")
    if hasattr(module, "active_adapters"):
        raise TargetError(f"{where}: it carries adapters; merge or remove them first")
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TargetError(f"{where}: nn.MultiheadAttention reads its weight without calling it")
    layout = layout_of(type(module))
    if layout is None or layout is EmbeddingLayout:
        raise TargetError(f"{where}: only Linear, transformers' Conv1D and convolutions can be")
    weight = module._parameters.get("weight")
    if weight is None:
        raise TargetError(f"{where}: its weight is computed from other parameters (parametrized)")
    if is_packed(weight) or weight.is_complex() or hasattr(weight, "full_tensor"):
        raise TargetError(f"{where}: its weight is packed, complex or sharded ({weight.dtype})")
    if "structure" in module._modules or hasattr(module, "structure"):
        raise TargetError(f"{where}: it has an attribute named 'structure'")
    if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
        raise TargetError(f"{where}: its forward was replaced on the object itself")
    if not weight.is_meta and not type(module).__module__.startswith("torch.nn."):
        view: Any = _Sight(module)
        if not layout(view).is_affine():
            raise TargetError(f"{where}: its forward is not W x + b")


class _Sight:
    """A layer as a layout sees a host: with the class whose forward is its own."""

    def __init__(self, module: nn.Module) -> None:
        self.__dict__.update(module.__dict__, _module=module, base_class=_Forward(type(module)))

    def __getattr__(self, key: str) -> Any:
        return getattr(self.__dict__["_module"], key)


class _Forward:
    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls, self.__module__ = cls, cls.__module__

    def forward(self, sight: Any, x: Tensor) -> Tensor:
        return self.cls.forward(sight._module, x)


def hold(module: nn.Module, structure: Structure, bias: Tensor | None = None) -> Structured:
    """Put a structure, (O, I), in the place of a layer's weight, and a bias (O,) in its bias's if one is given.

    What was trainable stays so. The caller has asked `check_holdable`.

    Raises:
        StructureError: a structure of another size. The layer is as before.
    """
    layout = layout_of(type(module))
    assert layout is not None
    sizes = layout.sizes(module)
    if sizes != (structure.out_features, structure.in_features):
        raise StructureError(
            f"{type(module).__name__}: a structure of {structure.out_features} x {structure.in_features} in the place "
            f"of a weight of {sizes[0]} x {sizes[1]}"
        )
    held: Any = module
    weight = module._parameters.pop("weight")
    assert weight is not None
    structure.requires_grad_(weight.requires_grad)
    structure.train(module.training)
    held.structure = structure
    if bias is not None:
        like = module._parameters.get("bias")
        held.bias = nn.Parameter(bias.detach().to(weight), weight.requires_grad if like is None else like.requires_grad)
    held.__class__ = structured_class(cast(Any, type(module)))
    rebind(held)
    return held


@torch.no_grad()
def densify(module: Structured) -> nn.Module:
    """Give a layer its own class back, with dW for a weight of its own; a bias stays."""
    dense: Any = module
    weight = module.weight.detach().contiguous()
    trained = any(p.requires_grad for p in module.structure.parameters())
    del module._modules["structure"]
    dense.__class__ = module.dense_class
    others = dict(dense._parameters)  # the weight comes first again, as an optimizer's state counts parameters
    dense._parameters.clear()
    dense.weight = nn.Parameter(weight, trained)
    dense._parameters.update(others)
    rebind(dense)
    return dense


def rebind(module: Any) -> None:
    """accelerate's hooks (device_map, offload) call the forward they found; hand them the class's present one."""
    if "_old_forward" in module.__dict__:
        module._old_forward = types.MethodType(type(module).forward, module)
