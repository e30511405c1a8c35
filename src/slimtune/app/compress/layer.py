"""A finished layer in the state of a compression."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from slimtune.app.compress.plan import Layer, hash_of
from slimtune.app.compress.state import State
from slimtune.errors import ConfigError, StructureError
from slimtune.layouts import layout_of
from slimtune.recipe import subclasses
from slimtune.structures import Structure

if TYPE_CHECKING:
    from torch import nn

Made = tuple[Structure, Tensor | None, float, float | None]


def write_layer(state: State, layer: Layer, module: nn.Module, structure: Structure, bias: Tensor | None) -> Made:
    """Round what replaces a weight to its dtype and keep it; with |W' - W| / |W| of what was kept.

    Raises:
        StructureError: a number that is not finite. SlimtuneError: it cannot be written.
    """
    weight: Any = module.weight
    structure = structure.to(weight)
    bias = None if bias is None else bias.detach().to(weight)
    for tensor in (*structure.state_dict().values(), *(() if bias is None else (bias,))):
        if not tensor.isfinite().all():
            raise StructureError(f"what takes the place of {layer.name!r} is not finite in {weight.dtype}")
    W = layout_of(type(module))(module)._oriented(weight.detach()).flatten(1).float()  # type: ignore[misc]
    error = float((structure.dense().float() - W).norm() / W.norm().clamp_min(1e-30))
    tensors = {f"structure.{key}": t for key, t in structure.state_dict().items()}
    if bias is not None:
        tensors["bias"] = bias
    note = {
        "structure": type(structure).__name__,
        "options": structure.options(),
        "rank": layer.rank,
        "error": error,
        "predicted": layer.predicted,
        "weight": hash_of(weight),
    }
    state.keep(f"layer/{layer.name}", tensors, note)
    return structure, bias, error, layer.predicted


def read_layer(state: State, layer: Layer, module: nn.Module) -> Made | None:
    """What `write_layer` kept, None if there is nothing undamaged.

    Raises:
        ConfigError: the weight is another one by now.
    """
    note = state.note(f"layer/{layer.name}")
    if note is None or note["rank"] != layer.rank:
        return None
    weight: Any = module.weight
    if note["weight"] != hash_of(weight):
        raise ConfigError(
            f"cannot continue in {state.run}: the weights of the model have changed ({layer.name}); resume=false "
            "starts afresh"
        )
    tensors = state.tensors(f"layer/{layer.name}")
    if tensors is None:
        return None
    structure: Structure = subclasses(Structure)[note["structure"]](
        *layer.shape, **note["options"], device=weight.device, dtype=weight.dtype
    )
    structure.load_state_dict({k.removeprefix("structure."): t for k, t in tensors.items() if k != "bias"})
    bias = tensors.get("bias")
    return structure.requires_grad_(False), None if bias is None else bias.to(weight), note["error"], note["predicted"]
