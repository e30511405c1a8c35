"""The trained weights of a run as files: an adapter folder, or the tensors of the modules trained in full."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import slimtune as st
from slimtune.compress import describe_structures, expand, shape_as
from slimtune.errors import FileFormatError

ADAPTER = "adapter"
MODEL = "model.safetensors"
STRUCTURES = "structures.json"


def save_weights(model: nn.Module, folder: Path, adapter: bool, whole: Sequence[str]) -> None:
    """Write what trains: `adapter/`, usable by `st.load` as it is, or the state of the modules `whole`, with the
    structures in weights' places among them."""
    if adapter:
        st.save(model, folder / ADAPTER)
    else:
        tensors = {key: t.detach().cpu().contiguous() for key, t in own_state(model, whole).items()}
        save_file(tensors, str(folder / MODEL), metadata={"format": "pt"})
        if held := _held(model, whole):
            (folder / STRUCTURES).write_text(json.dumps(held, indent=1), encoding="utf-8")


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path, adapter: bool, whole: Sequence[str]) -> None:
    """The inverse of `save_weights`, strict. An adapter is made anew, modules are filled in place, their layers made
    structures, or plain again, as they were.

    Raises:
        FileFormatError: the file does not fit the model, or the base's weights are not those of the checkpoint.
    """
    if adapter:
        st.remove(model, "default")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            try:
                st.load(model, folder / ADAPTER)
            except UserWarning:
                raise FileFormatError(
                    f"{folder / ADAPTER}: the base model's weights have changed since this checkpoint was written"
                ) from None
        return
    _shape(model, folder, whole)
    stored, expected = load_file(str(folder / MODEL)), own_state(model, whole)
    for key in [*expected, *stored]:
        shapes = [tuple(t[key].shape) if key in t else None for t in (stored, expected)]
        if shapes[0] != shapes[1]:
            raise FileFormatError(f"{folder / MODEL}: {key} has shape {shapes[0]}, the model expects {shapes[1]}")
    for key, t in expected.items():
        t.copy_(stored[key])


def _held(model: nn.Module, whole: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {name: entry for name, entry in describe_structures(model).items() if inside(name, whole)}


def _shape(model: nn.Module, folder: Path, whole: Sequence[str]) -> None:
    """Let the layers in `whole` hold what they held when `folder` was written."""
    file, now = folder / STRUCTURES, _held(model, whole)
    try:
        wanted = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise FileFormatError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(wanted, Mapping) or not all(inside(str(name), whole) for name in wanted):
        raise FileFormatError(f"{file}: expected structures of layers that train")
    expand(model, [name for name, entry in now.items() if wanted.get(name) != entry])
    shape_as(model, {name: entry for name, entry in wanted.items() if now.get(name) != entry})


def own_state(model: nn.Module, whole: Sequence[str]) -> dict[str, Tensor]:
    """Parameters and buffers of the modules named in `whole` ("" is the model); a shared tensor only once."""
    kept: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for key, tensor in model.state_dict().items():
        if inside(key, whole) and (tensor.data_ptr(), tensor.shape) not in seen:
            kept[key] = tensor
            seen.add((tensor.data_ptr(), tensor.shape))
    return kept


def inside(key: str, modules: Sequence[str]) -> bool:
    """Whether a parameter or module name lies in one of these modules."""
    return any(not name or key == name or key.startswith(name + ".") for name in modules)
