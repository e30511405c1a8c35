"""The trained weights of a run as files: an adapter folder, or the tensors of the modules trained in full."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import slimtune as st
from slimtune.errors import FileFormatError

ADAPTER = "adapter"
MODEL = "model.safetensors"


def save_weights(model: nn.Module, folder: Path, adapter: bool, whole: Sequence[str]) -> None:
    """Write what trains: `adapter/`, usable by `st.load` as it is, or the state of the modules `whole`."""
    if adapter:
        st.save(model, folder / ADAPTER)
    else:
        tensors = {key: t.detach().cpu().contiguous() for key, t in own_state(model, whole).items()}
        save_file(tensors, str(folder / MODEL), metadata={"format": "pt"})


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path, adapter: bool, whole: Sequence[str]) -> None:
    """The inverse of `save_weights`, strict. An adapter is made anew, modules are filled in place.

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
    stored, expected = load_file(str(folder / MODEL)), own_state(model, whole)
    for key in [*expected, *stored]:
        shapes = [tuple(t[key].shape) if key in t else None for t in (stored, expected)]
        if shapes[0] != shapes[1]:
            raise FileFormatError(f"{folder / MODEL}: {key} has shape {shapes[0]}, the model expects {shapes[1]}")
        expected[key].copy_(stored[key])


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
