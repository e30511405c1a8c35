"""Layer 5: adapters on disk, strict and atomic.

A folder holds `adapter_model.safetensors`, `adapter_config.json`, `README.md` and `slimtune.json`, the manifest:
SHA-256 and size of every file, what each layer carries, and a fingerprint of the base. Methods that PEFT has are
written with PEFT's names and keys; PEFT ignores the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .errors import AdapterNameError, FileFormatError, SlimtuneError, StructureError, TargetError, UninitializedError
from .files import (
    CARD,
    CONFIG,
    FORMAT,
    MANIFEST,
    TENSORS,
    check_files,
    parse_json,
    read_json,
    read_manifest,
    read_tensors,
    write_files,
)
from .layers import Adapter, Extended, Host, own_class
from .recipe import Recipe
from .structured import Structured
from .targets import check_free, hosts, own_modules, require_adapter, saved_modules, unwrapped
from .verbs import attach_adapters, build_adapter, prepare

__all__ = [
    "MARK",
    "PREFIX",
    "Description",
    "LayerEntry",
    "check_files",
    "check_tensors",
    "describe",
    "fingerprint",
    "install",
    "load",
    "read_description",
    "read_json",
    "read_manifest",
    "read_tensors",
    "save",
    "write_files",
]


PREFIX, MARK = "base_model.model.", "adapters"
"""A tensor of a layer's adapter is called `base_model.model.<layer>.adapters.<its name in the adapter>` in a file."""


def check_tensors(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], path: Path | str) -> None:
    """Raise FileFormatError unless tensors have exactly the expected keys and shapes."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        parts = [f"{len(k)} {w} (first: {k[0]})" for k, w in ((missing, "missing"), (extra, "unexpected")) if k]
        raise FileFormatError(f"{path}: tensors do not fit the model: {', '.join(parts)}")
    for key, shape in expected.items():
        if tuple(found[key].shape) != shape:
            raise FileFormatError(f"{path}: {key} has shape {tuple(found[key].shape)}, expected {shape}")


# ---------------------------------------------------------------- descriptions


@dataclass(frozen=True)
class LayerEntry:
    """What one layer carries: its own recipe (no overrides) and the scale it had when saved."""

    recipe: Recipe
    scale: float
    kind: str | None = None
    """What the layer is ("Linear", transformers' "Conv1D", "Conv", "Embedding"), if that and its shape say it all."""
    shape: tuple[int, ...] | None = None
    """(O, I), or the shape of a convolution's kernel."""


@dataclass
class Description:
    """An adapter without its tensors: a recipe per layer, and the modules saved whole."""

    recipe: Recipe
    layers: dict[str, LayerEntry]
    saved: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        entries = {}
        for name, entry in self.layers.items():
            entries[name] = {
                "scale": entry.scale,
                "alpha": entry.recipe.alpha,
                "options": dict(entry.recipe.options),
            }
            if entry.kind and entry.shape:
                entries[name] |= {"kind": entry.kind, "shape": list(entry.shape)}
        return {"recipe": self.recipe.to_dict(), "layers": entries, "modules_to_save": self.saved}

    @classmethod
    def from_dict(cls, data: Any, where: Path | str) -> Description:
        """The inverse of `to_dict`; FileFormatError naming what is wrong."""
        try:
            recipe = Recipe.from_dict(data["recipe"])
            layers = {}
            for name, entry in data["layers"].items():
                scale = entry["scale"]
                if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) < 1e30:
                    raise FileFormatError(f"{where}: {name}: scale must be a number, got {scale!r}")
                own = recipe.to_dict() | {
                    "alpha": entry["alpha"],
                    "options": entry["options"],
                    "overrides": {},
                }
                kind, shape = entry.get("kind"), entry.get("shape")
                if shape is not None and not _is_shape(shape):
                    raise FileFormatError(f"{where}: {name}: shape must be a list of sizes, got {str(shape)[:80]}")
                layers[name] = LayerEntry(Recipe.from_dict(own), float(scale), kind, shape and tuple(shape))
            saved = data["modules_to_save"]
            if not isinstance(saved, list) or not all(isinstance(n, str) for n in saved):
                raise FileFormatError(f"{where}: modules_to_save must be a list of names, got {saved!r}")
        except (KeyError, TypeError, AttributeError) as e:
            raise FileFormatError(f"{where}: the adapter's description lacks or misplaces {e}") from None
        except StructureError as e:
            raise FileFormatError(f"{where}: {e}") from None
        return cls(recipe, layers, saved)


def _is_shape(shape: object) -> bool:
    whole = isinstance(shape, list) and 2 <= len(shape) <= 5
    return whole and all(type(n) is int and 0 < n < 2**31 for n in shape)  # type: ignore[attr-defined]


def _kind(host: Host) -> tuple[str | None, tuple[int, ...] | None]:
    if getattr(host, "groups", 1) != 1:
        return None, None
    shape = host.layout.sizes(host) if host.weight.dim() == 2 else tuple(host.weight.shape)
    return host.layout.__name__.removesuffix("Layout").removeprefix("Structured"), shape


def describe(model: nn.Module, name: str = "default") -> Description:
    """The description of an attached adapter, sizes as they stand now."""
    require_adapter(model, name)
    layers, recipes = {}, []
    for layer, host in hosts(model, name).items():
        adapter: Adapter = host.addition(name)
        if adapter.scale.is_meta:
            raise UninitializedError(
                f"{layer}: adapter {name!r} is still on the meta device; load weights, then initialize"
            )
        recipe = adapter.recipe
        data = recipe.to_dict() | {"options": adapter.structure.options()}
        layers[layer] = LayerEntry(Recipe.from_dict(data), float(adapter.scale), *_kind(host))
        recipes.append(layers[layer].recipe)
    if not recipes:
        raise AdapterNameError(f"adapter {name!r} changes no layer")
    return Description(recipes[0], layers, list(saved_modules(model, name)))


def fingerprint(model: nn.Module, layers: list[str]) -> str | None:
    """A hash of sampled base weights of some layers, the same for fp32 and bf16 copies of one model.

    None where weights are packed, on meta, or in another dtype.
    """
    digest = hashlib.sha256()
    for name in sorted(layers):
        module = model.get_submodule(name)
        if isinstance(module, Structured):  # dW itself is rounded otherwise in bf16
            tensors: dict[str, Any] = {f"{name}.{k}": p for k, p in module.structure.named_parameters("structure")}
        else:
            tensors = {name: getattr(module, "weight", None)}
        for key, weight in tensors.items():
            readable = (torch.float32, torch.bfloat16, torch.float64)
            if weight is None or weight.is_meta or type(weight.data) is not Tensor or weight.dtype not in readable:
                return None
            flat = weight.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 64)][:64].to(torch.bfloat16).float().cpu()
            digest.update(f"{key}{tuple(weight.shape)}".encode())
            digest.update(repr(sample.tolist()).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- model <-> tensors


def own_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's tensors under slimtune's own keys.

    They are `<layer>.structure.<p>`, `<layer>.composition.<p>` and `<module>.saved.<p>`.
    """
    tensors = {}
    for layer, host in hosts(model, name).items():
        for key, t in host.addition(name).saved_tensors().items():
            tensors[f"{layer}.{key}"] = t
    for layer, module in saved_modules(model, name).items():
        for key, t in module.adapters[name].state_dict().items():
            tensors[f"{layer}.saved.{key}"] = t
    # a sharded tensor (FSDP2) is gathered, on every process
    whole: dict[str, Any] = tensors
    tensors = {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in whole.items()}
    # clones, because safetensors refuses tensors that share memory (a bias under two names)
    return {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}


def split_key(key: str, names: Container[str]) -> tuple[str, str]:
    """(the module of `names` that a key belongs to, the rest of the key); ("", key) if there is none."""
    end = key.find(".")
    while end > 0 and key[:end] not in names:
        end = key.find(".", end + 1)
    return (key[:end], key[end + 1 :]) if end > 0 else ("", key)


def to_file(description: Description, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under slimtune's own keys as a file holds them: as PEFT writes them for `slimtune.hf.SlimtuneConfig`."""
    stored = {}
    for key, t in tensors.items():
        layer, rest = split_key(key, description.layers)
        if layer:
            stored[f"{PREFIX}{layer}.{MARK}.{rest}"] = t
            if t.is_floating_point():
                stored[f"{PREFIX}{layer}.{MARK}.scale"] = torch.tensor(description.layers[layer].scale, dtype=t.dtype)
        else:
            module, rest = split_key(key, description.saved)
            stored[f"{PREFIX}{module}.{rest.removeprefix('saved.')}"] = t
    return stored


def from_file(
    description: Description, stored: Mapping[str, Tensor], path: Path | str
) -> tuple[Description, dict[str, Tensor]]:
    """The inverse of `to_file`; the scales in the file replace those of the description."""
    layers, tensors = dict(description.layers), {}
    for key, t in stored.items():
        own = key  # what is not known here is unexpected later
        layer, rest = split_key(key.removeprefix(PREFIX), layers)
        if layer and rest.startswith(f"{MARK}."):
            own = f"{layer}.{rest.removeprefix(MARK + '.')}"
        elif not layer:
            module, rest = split_key(key.removeprefix(PREFIX), description.saved)
            own = f"{module}.saved.{rest}" if module else key
        if own in tensors:
            raise FileFormatError(f"{path}: {key} gives {own} a second time")
        if own == f"{layer}.scale":
            if t.numel() != 1:
                raise FileFormatError(f"{path}: {key} has shape {tuple(t.shape)}, expected ()")
            layers[layer] = replace(layers[layer], scale=float(t))
        else:
            tensors[own] = t
    return Description(description.recipe, layers, description.saved), tensors


def install(
    model: nn.Module, description: Description, tensors: Mapping[str, Tensor], name: str, path: Path | str
) -> list[str]:
    """Attach a described adapter with its tensors (slimtune's own keys), after everything has been checked.

    Raises:
        FileFormatError: a layer the model lacks or that cannot carry it, a tensor missing, extra or misshapen; the
            model is unchanged.
        AdapterNameError: the name is taken.
    """
    check_free(model, name)
    built: dict[str, Adapter] = {}
    expected: dict[str, tuple[int, ...]] = {}
    modules = own_modules(model)
    for layer, entry in description.layers.items():
        if layer not in modules:
            raise FileFormatError(f"{path}: the model has no layer {layer!r}")
        weight = getattr(modules[layer], "weight", None)
        if weight is not None and weight.is_meta:
            raise UninitializedError(f"{layer}: the model is on the meta device; load its weights before the adapter")
        try:
            built[layer] = build_adapter(modules[layer], layer, entry.recipe, device="meta")
        except (TargetError, StructureError) as e:
            raise FileFormatError(f"{path}: {e}") from None
        for key, t in built[layer].saved_tensors().items():
            expected[f"{layer}.{key}"] = tuple(t.shape)
    for layer in description.saved:
        if layer not in modules:
            raise FileFormatError(f"{path}: the model has no module {layer!r} (modules_to_save)")
        if clash := [n for n in built if n == layer or n.startswith(f"{layer}.")]:
            raise FileFormatError(f"{path}: {clash[0]!r} is both adapted and inside modules_to_save {layer!r}")
        module = modules[layer]
        state = module.base_state() if isinstance(module, Extended) else module.state_dict()
        for key, t in state.items():
            expected[f"{layer}.saved.{key}"] = tuple(t.shape)
    check_tensors(expected, tensors, path)
    for layer, adapter in built.items():
        host: Any = modules[layer]
        adapter.to_empty(device=host.weight.device)
        adapter.scale.fill_(description.layers[layer].scale)
        with torch.no_grad():
            for key, t in adapter.saved_tensors().items():
                t.copy_(tensors[f"{layer}.{key}"])
    attach_adapters(model, built, name, description.saved)
    prepare(model, name)
    for layer, module in saved_modules(model, name).items():
        prefix = f"{layer}.saved."
        module.adapters[name].load_state_dict({k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)})
    return list(built)


# ---------------------------------------------------------------- save and load


def _base_name(model: nn.Module) -> str | None:
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or getattr(model, "name_or_path", None)
    return name if isinstance(name, str) and name else None


def _card(description: Description, base: str | None, peft: bool) -> bytes:
    parameters = len(description.layers)
    head = ["---"]
    if base and not os.path.isabs(base):
        head.append(f"base_model: {json.dumps(base)}")
    head += [
        f"library_name: {'peft' if peft else 'slimtune'}",
        "tags:",
        "- slimtune",
        f"- {description.recipe.name}",
        "---",
    ]
    body = f"""
# Adapter: {description.recipe.name}

A `{description.recipe.name}` adapter on {parameters} layers{f" of `{base}`" if base else ""}.

```python
import slimtune as st

st.load(model, "path/to/this/folder")  # `model` is the base model
```
"""
    body += '\nPEFT reads this folder as well: `peft.PeftModel.from_pretrained(model, "path/to/this/folder")`'
    body += ".\n" if peft else ",\nafter `from slimtune.hf import SlimtuneConfig`.\n"
    return ("\n".join(head) + "\n" + body).encode()


def save(model: nn.Module, path: str | os.PathLike[str], name: str = "default", *, base: str | None = None) -> None:
    """Write an adapter to a folder: all of it or, should anything interrupt, nothing.

    Where a type of PEFT's holds the adapter as it is, it is written in PEFT's format, which PEFT 0.17 or later reads;
    `export_peft` also converts. A manifest with hashes lies beside. Other files in the folder are left alone. Never
    touches the network. Of several processes that share the folder, one should call it; but every one where the
    adapter is sharded (FSDP2), and the first writes.

    Args:
        path: the folder, made if need be. An adapter in it is replaced.
        name: which attached adapter.
        base: name or path of the base model, recorded for people and tools; the model's own by default.

    Raises:
        AdapterNameError: no such adapter.
        UninitializedError: tensors on the meta device.
        SlimtuneError: tensors that are not finite, or a folder that cannot be written.
    """
    save_as(model, path, name, base, lambda description, tensors: (description, tensors))


def save_as(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str,
    base: str | None,
    change: Callable[[Description, dict[str, Tensor]], tuple[Description, dict[str, Tensor]]],
) -> None:
    """`save` what `change` makes of the adapter's description and tensors."""
    from . import peft_format

    model = unwrapped(model)
    if getattr((getattr(model, "peft_config", None) or {}).get(name), "modules_to_save", None):
        raise SlimtuneError(f"{path}: not saved: PEFT holds modules_to_save; use its save_pretrained, which load reads")
    description, tensors = change(describe(model, name), own_tensors(model, name))
    parts = [m.addition(name) for m in (*hosts(model, name).values(), *saved_modules(model, name).values())]
    together = any(hasattr(t, "full_tensor") for part in parts for t in part.state_dict().values())
    for key, t in tensors.items():
        if t.is_floating_point() and not t.isfinite().all():
            raise SlimtuneError(f"{path}: not saved: {key} is not finite")
    base = base or _base_name(model)
    peft = peft_format.encode(model, description, tensors, base)
    config, stored = peft or (
        {
            "peft_type": "SLIMTUNE",
            "task_type": None,
            "base_model_name_or_path": base,
            "inference_mode": True,
            "target_modules": peft_format.literal_targets(model, list(description.layers)),
            "modules_to_save": description.saved or None,
            "slimtune": description.to_dict(),
        },
        to_file(description, tensors),
    )
    manifest = {
        "format": FORMAT,
        "keys": "peft" if peft else "slimtune",
        "adapter": description.to_dict(),
        "base": {
            "name_or_path": base,
            "class": own_class(model).__name__,
            "fingerprint": fingerprint(model, list(description.layers)),
        },
    }
    files = {
        TENSORS: safetensors.torch.save(dict(stored), metadata={"format": "pt"}),
        CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
        CARD: _card(description, base, peft is not None),
    }
    if not together:
        write_files(path, files, manifest)
        return
    try:
        if torch.distributed.get_rank() == 0:
            write_files(path, files, manifest)
    finally:
        torch.distributed.barrier()  # the folder is there once any process goes on


def read_description(
    path: str | os.PathLike[str], model: nn.Module | None = None
) -> tuple[Description, dict[str, Tensor], dict[str, Any] | None]:
    """An adapter folder's description, its tensors under slimtune's own keys, and its manifest.

    A folder without manifest is read as PEFT's, which takes `model` to tell which tensors belong to modules
    saved whole and how convolutions are laid out.
    """
    from . import peft_format

    folder = Path(path)
    contents = check_files(folder)
    manifest = read_manifest(folder)
    tensors = read_tensors(contents[TENSORS], folder / TENSORS)
    config = parse_json(contents[CONFIG], folder / CONFIG)
    own = config.get("slimtune") if manifest is None else manifest.get("adapter")
    if own is None:
        return *peft_format.decode(config, tensors, model, folder), manifest
    description = Description.from_dict(own, folder / (CONFIG if manifest is None else MANIFEST))
    if manifest is not None and manifest.get("keys") == "peft":
        tensors = peft_format.decode_tensors(description, tensors, folder / TENSORS)
    else:
        description, tensors = from_file(description, tensors, folder / TENSORS)
    return description, tensors, manifest


def load(model: nn.Module, path: str | os.PathLike[str], name: str = "default") -> list[str]:
    """Attach the adapter in a folder to a base model, on top of the active ones; it is trainable, the rest frozen.

    Strict: hashes, keys, shapes and finiteness are checked before the model is touched. A folder that PEFT wrote
    (no manifest) is read too.

    Returns:
        The names of the adapted layers.

    Raises:
        FileFormatError: naming file, key, what was expected and what was found.
        AdapterNameError: the name is taken.

    Warns:
        UserWarning: the base's weights are not those the adapter was saved on.
    """
    model = unwrapped(model)
    description, tensors, manifest = read_description(path, model)
    layers = install(model, description, tensors, name, Path(path))
    recorded = (manifest or {}).get("base", {}).get("fingerprint") if manifest else None
    found = fingerprint(model, layers) if recorded else None
    if recorded and found and recorded != found:
        warnings.warn(
            f"{path}: this adapter was saved on other base weights than the model's; outputs will differ",
            stacklevel=2,
        )
    return layers
