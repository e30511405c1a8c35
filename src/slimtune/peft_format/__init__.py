"""Layer 5: PEFT's adapter files, read and written without PEFT; PEFT 0.21.2 is the reference.

One file per family of PEFT's types says how its tensors and config fields map to a recipe (a `Codec`); `frame` holds
what all types share. A type is added by a codec and its entry in `frame.CODECS`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .. import io
from ..errors import StructureError
from . import frame
from .codec import Unfit
from .frame import decode, decode_tensors
from .names import literal_targets

__all__ = ["decode", "decode_tensors", "encode", "export_peft", "import_peft", "literal_targets"]


def encode(
    model: nn.Module, description: io.Description, tensors: Mapping[str, Tensor], base: str | None
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """PEFT's config and tensors for an adapter, None where PEFT has no such adapter."""
    try:
        return frame.encode(model, description, tensors, base)
    except Unfit:
        return None


def import_peft(model: nn.Module, path: str | os.PathLike[str], name: str = "default") -> list[str]:
    """Attach an adapter that PEFT wrote. The same as `load`, which recognises PEFT's folders by itself.

    Read are LoRA (rsLoRA, DoRA), AdaLoRA, C3A, GraLoRA, MiSS (its default form, "mini" and "bat"), LoHa, LoKr, and
    Bone, which PEFT itself has dropped. The adapter
    computes what PEFT's does, but for two mistakes of PEFT: C3A's gradient in the layer's input, and several active
    C3A adapters, which it chains.

    Raises:
        FileFormatError: another type, or a config field or tensor that slimtune has no counterpart for.
    """
    return io.load(model, path, name)


def export_peft(
    model: nn.Module, path: str | os.PathLike[str], name: str = "default", *, base: str | None = None
) -> None:
    """Write an adapter as PEFT would: `adapter_model.safetensors`, `adapter_config.json` and the manifest.

    `save` does so too where PEFT's type holds the adapter as it is. This verb also rescales parameters to the
    normalisation of PEFT's type and leaves out dropout that the type does not have: the written adapter computes the
    same.

    Raises:
        StructureError: PEFT has no such adapter; the words say why.
    """

    def for_peft(description: io.Description, tensors: dict[str, Tensor]) -> tuple[io.Description, dict[str, Tensor]]:
        if encode(io.unwrapped(model), description, tensors, base) is not None:
            return description, tensors
        try:
            changed = frame.convert(description, tensors)
            frame.encode(io.unwrapped(model), *changed, base)
        except Unfit as e:
            method = description.recipe.name
            raise StructureError(
                f"{name!r} ({method}) cannot be written for PEFT: {e}; st.save keeps it as it is, for "
                "slimtune.hf too, and st.convert writes it as plain LoRA"
            ) from None
        return changed

    io.save_as(model, path, name, base, for_peft)
