"""What all of PEFT's adapter types share: keys, targets, modules saved whole, and the fields of every config."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import io
from ..errors import FileFormatError, StructureError
from ..io import PREFIX, Description
from .adalora import AdaloraCodec
from .c3a import C3ACodec
from .codec import Codec, Fields, Layer, Unfit
from .gralora import GraloraCodec
from .lora import LoraCodec
from .lycoris import LohaCodec, LokrCodec
from .miss import BoneCodec, MissCodec
from .names import literal_targets

__all__ = ["CODECS", "convert", "decode", "decode_tensors", "encode"]

CODECS: tuple[Codec, ...] = (
    LoraCodec(),
    AdaloraCodec(),
    C3ACodec(),
    GraloraCodec(),
    MissCodec(),
    LohaCodec(),
    LokrCodec(),
    BoneCodec(),
)

HARMLESS = frozenset(
    [
        *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type"),
        *("peft_version", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        "modules_to_save",
    ]
)
"""Fields of every config that say where it was trained, or what the tensors themselves tell."""


def _codec(description: Description) -> Codec:
    for codec in CODECS:
        if all(codec.claims(entry.recipe) for entry in description.layers.values()):
            return codec
    raise Unfit("it has no such adapter")


# ---------------------------------------------------------------- writing


def encode(
    model: nn.Module, description: Description, tensors: Mapping[str, Tensor], base: str | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's config and tensors for an adapter, its numbers as they are.

    Raises:
        Unfit: PEFT has no such adapter; the words say why.
    """
    codec = _codec(description)
    layers = {name: Layer(entry, model.get_submodule(name)) for name, entry in description.layers.items()}
    fields = codec.config(layers)
    own = _by_layer(tensors, layers)
    stored = {}
    for name, layer in layers.items():
        for column, t in codec.theirs(own[name], layer).items():
            stored[f"{PREFIX}{name}.{column}"] = t
    for key, t in tensors.items():
        for name in description.saved:
            if key.startswith(f"{name}.saved."):
                stored[f"{PREFIX}{name}.{key[len(name) + 7 :]}"] = t
    config = {
        "peft_type": codec.peft_type,
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": literal_targets(model, list(layers)),
        "modules_to_save": description.saved or None,
    }
    return config | fields, stored


def convert(description: Description, tensors: Mapping[str, Tensor]) -> tuple[Description, dict[str, Tensor]]:
    """The adapter that computes the same in the normalisation of PEFT's type, and without dropout the type lacks.

    Raises:
        Unfit: PEFT has no such adapter.
    """
    codec = _codec(description)
    own = _by_layer(tensors, description.layers)
    layers, converted = {}, dict(tensors)
    for name, entry in description.layers.items():
        layers[name], changed = codec.converted(entry, own[name])
        converted |= {f"{name}.{key}": t for key, t in changed.items()}
    return Description(next(iter(layers.values())).recipe, layers, description.saved), converted


def _by_layer(tensors: Mapping[str, Tensor], names: Container[str]) -> dict[str, dict[str, Tensor]]:
    """{layer: {its key in the layer's adapter: tensor}}."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, t in tensors.items():
        name, rest = io.split_key(key, names)
        if name:
            layers.setdefault(name, {})[rest] = t
    return layers


# ---------------------------------------------------------------- reading


def decode_tensors(description: Description, tensors: Mapping[str, Tensor], path: Path | str) -> dict[str, Tensor]:
    """PEFT's tensors under slimtune's own keys."""
    try:
        codec = _codec(description)
    except Unfit:
        raise FileFormatError(f"{path}: PEFT's keys cannot be those of a {description.recipe.name} adapter") from None
    return _own(codec, description, tensors, path)


def _own(codec: Codec, description: Description, tensors: Mapping[str, Tensor], path: Path | str) -> dict[str, Tensor]:
    layers, rest = _grouped(codec, tensors, {PREFIX + n for n in description.layers})
    saved = {PREFIX + n: n for n in description.saved}
    own: dict[str, Tensor] = {}
    for place, columns in layers.items():
        name = place.removeprefix(PREFIX)
        for key, t in codec.ours(columns, description.layers[name].recipe, f"{path}: {place}").items():
            own[f"{name}.{key}"] = t
    for key, t in rest.items():
        home = next((s for s in saved if key.startswith(s + ".")), None)
        if home is None:
            raise FileFormatError(f"{path}: unexpected tensor {key}")
        own[f"{saved[home]}.saved.{key[len(home) + 1 :]}"] = t
    return own


def _grouped(
    codec: Codec, tensors: Mapping[str, Tensor], places: Container[str] | None = None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """{module path in the file: {column: tensor}} of the adapter's tensors, and all other tensors by key."""
    layers: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, t in tensors.items():
        column = next((c for c in codec.columns if key.endswith("." + c)), None)
        place = key[: -len(column) - 1] if column else ""
        if column and (places is None or place in places):
            layers.setdefault(place, {})[column] = t
        else:
            rest[key] = t
    return layers, rest


def decode(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module | None, folder: Path
) -> tuple[Description, dict[str, Tensor]]:
    """What a folder written by PEFT holds: (description, tensors under slimtune's own keys)."""
    where = folder / io.CONFIG
    codec = _checked(config, where)
    fields = Fields(config, where)
    codec.check(fields)
    found, rest = _grouped(codec, tensors)
    order = {} if model is None else {PREFIX + n: i for i, (n, _) in enumerate(model.named_modules())}
    layers = {}
    for place, columns in sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])):
        if not place.startswith(PREFIX):
            raise FileFormatError(
                f"{folder / io.TENSORS}: {place}.{next(iter(columns))} does not start with {PREFIX!r}"
            )
        name = place[len(PREFIX) :]
        try:
            layers[name] = codec.entry(fields, name, columns)
        except (StructureError, TypeError) as e:
            raise FileFormatError(f"{where}: {e}") from None
    if not layers:
        raise FileFormatError(f"{folder / io.TENSORS}: holds no {codec.columns[0].removesuffix('.weight')} tensor")
    kept = {k: t for k, t in tensors.items() if not _is_base_copy(k, t, model, folder)}
    saved = _saved_names({k: t for k, t in rest.items() if k in kept}, config, model, folder)
    description = Description(next(iter(layers.values())).recipe, layers, saved)
    return description, _own(codec, description, kept, folder / io.TENSORS)


def _checked(config: Mapping[str, Any], where: Path) -> Codec:
    """The codec of a config all of whose fields it knows."""
    named = {codec.peft_type: codec for codec in CODECS}
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in named:
        raise FileFormatError(f"{where}: peft_type {kind!r}, expected one of {', '.join(map(repr, named))}")
    codec = named[kind]
    for key, value in config.items():
        known = key in codec.read or key in codec.harmless or key in HARMLESS
        if not known and value not in (None, False, [], {}, ""):
            raise FileFormatError(f"{where}: {key} = {value!r} changes the adapter in a way slimtune does not read")
    if config.get("bias", "none") != "none":
        raise FileFormatError(f"{where}: bias = {config['bias']!r}: trained biases are not part of this format here")
    return codec


def _is_base_copy(key: str, t: Tensor, model: Any, folder: Path) -> bool:
    """PEFT stores the whole base embedding beside its adapter; it must be the model's own."""
    if not key.endswith(".base_layer.weight"):
        return False
    name = key[len(PREFIX) : -len(".base_layer.weight")]
    try:
        own = model.get_submodule(name).weight if model is not None else None
    except AttributeError:
        own = None
    if own is not None and not own.is_meta and (own.shape != t.shape or not own.detach().cpu().to(t.dtype).equal(t)):
        raise FileFormatError(f"{folder / io.TENSORS}: {key} is another base embedding than the model's")
    return True


def _saved_names(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], model: nn.Module | None, folder: Path
) -> list[str]:
    """Full names of modules saved whole: `modules_to_save` holds suffixes, the tensors say which modules."""
    rest = [k[len(PREFIX) :] for k in tensors]
    suffixes = config.get("modules_to_save") or []
    if not isinstance(suffixes, list) or not all(isinstance(s, str) for s in suffixes):
        raise FileFormatError(f"{folder / io.CONFIG}: modules_to_save must be a list of names, got {suffixes!r}")
    known = [n for n, _ in model.named_modules()] if model is not None else [k.rsplit(".", 1)[0] for k in rest]
    return [
        name
        for name in dict.fromkeys(known)
        if ".adapters" not in name
        and any(name.endswith(s) for s in suffixes)  # as PEFT matches them
        and any(k.startswith(f"{name}.") for k in rest)
    ]
