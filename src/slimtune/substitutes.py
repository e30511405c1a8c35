"""Layer 3: structures tried in the places of weights, beside the model or in it for a while.

Shapes: O out, I in.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from .factors import Replacement
from .structured import check_holdable, hold, rebind
from .targets import own_modules

__all__ = ["substitute", "substituted"]


def substitute(module: nn.Module, replacement: Replacement) -> nn.Module:
    """A layer of the same kind and bias with a structure in its weight's place; the layer itself stays as it is.

    The structure is cast to the weight's dtype, and is in use by what is returned.

    Example:
        >>> import slimtune as st
        >>> layer = nn.Linear(6, 4)
        >>> other = substitute(layer, Replacement(st.LowRank(4, 6, rank=2)))
        >>> type(other).__name__, type(layer).__name__
        ('StructuredLinear', 'Linear')
    """
    other: Any = copy.copy(module)
    for key in ("_parameters", "_buffers", "_modules"):
        other.__dict__[key] = dict(module.__dict__[key])
    for key, value in module.__dict__.items():
        if key.endswith("_hooks") and isinstance(value, dict):
            other.__dict__[key] = OrderedDict()
    for key in ("forward", "_old_forward", "_hf_hook"):
        other.__dict__.pop(key, None)
    return hold(other, replacement.structure.to(cast(Tensor, module.weight)), replacement.bias)


@contextmanager
def substituted(model: nn.Module, replacements: Mapping[str, Replacement]) -> Iterator[None]:
    """Within: layers with structures in their weights' places; afterwards the parameters are those of before.

    Raises:
        TargetError: a layer that cannot hold a structure. Nothing has been changed.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(6, 4))
        >>> with substituted(model, {"0": Replacement(st.LowRank(4, 6, rank=2))}):
        ...     type(model[0]).__name__
        'StructuredLinear'
        >>> type(model[0]).__name__
        'Linear'
    """
    own = own_modules(model)
    for name in replacements:
        check_holdable(own[name], name)
    before = {name: (type(own[name]), dict(own[name]._parameters)) for name in replacements}
    try:
        for name, (structure, bias) in replacements.items():
            hold(own[name], structure.to(cast(Tensor, own[name].weight)), bias)
        yield
    finally:
        for name, (cls, parameters) in before.items():
            module = own[name]
            module._modules.pop("structure", None)
            module.__class__ = cls
            module._parameters.clear()
            module._parameters.update(parameters)
            rebind(module)
