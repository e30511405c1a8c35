"""Layer 5: adapters on disk, strict and atomic.

A folder holds `adapter_model.safetensors`, `adapter_config.json`, `README.md` and `slimtune.json`, the manifest:
SHA-256 and size of every file, what each layer carries, and a fingerprint of the base. Methods that PEFT has are
written with PEFT's names and keys; PEFT ignores the manifest.

Files are replaced as a set. New contents are written beside the old as `.NAME.new` and synced; then the new
manifest, `.slimtune.json.new`, which is the commit; then all are renamed into place. A reader that finds a complete
commit uses it, so a save that dies at any point leaves the old set or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .errors import AdapterNameError, FileFormatError, SlimtuneError, StructureError, TargetError
from .layers import Adapter
from .recipe import Recipe
from .verbs import adapter_names as names_of
from .verbs import attach_adapters, build_adapter, check_name, hosts, require_adapter, saved_modules

__all__ = [
    "Description",
    "LayerEntry",
    "check_files",
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

MANIFEST, CONFIG, TENSORS, CARD = (
    "slimtune.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
)
FORMAT = 1
MAX_JSON_BYTES = 16 * 2**20


# ---------------------------------------------------------------- bytes


def read_bytes(path: Path) -> bytes:
    """The contents of a regular file; FileFormatError for anything else."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FileFormatError(f"{path}: not a regular file")
        return path.read_bytes()
    except FileNotFoundError:
        raise FileFormatError(f"{path}: no such file") from None
    except (OSError, ValueError) as e:
        raise FileFormatError(f"{path}: cannot be read ({e})") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [k for k, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} comes twice")
    return table


def parse_json(data: bytes, path: Path | str) -> dict[str, Any]:
    """A JSON object: at most 16 MB, no duplicate keys, no NaN."""
    if len(data) > MAX_JSON_BYTES:
        raise FileFormatError(f"{path}: {len(data)} bytes, expected at most {MAX_JSON_BYTES}")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(data.decode(), object_pairs_hook=_no_duplicates, parse_constant=refuse)
    except (ValueError, RecursionError) as e:
        raise FileFormatError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(value, dict):
        raise FileFormatError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """`parse_json` of a file."""
    try:
        if os.stat(path).st_size > MAX_JSON_BYTES:
            raise FileFormatError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
    except OSError:
        pass
    return parse_json(read_bytes(path), path)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _new(folder: Path, name: str) -> Path:
    return folder / f".{name}.new"


def write_files(folder: str | os.PathLike[str], files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> None:
    """Replace a set of files and their manifest as one; other files of the folder are left alone.

    Raises:
        SlimtuneError: the folder cannot be written (full disk, read-only, not a folder); the old set is intact.
    """
    folder = Path(folder)
    record = {name: {"sha256": _sha256(data), "bytes": len(data)} for name, data in files.items()}
    journal = json.dumps({**manifest, "files": record}, indent=1).encode()
    state = "what was there before is intact"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _settle(folder)
        for name, data in files.items():
            _write(_new(folder, name), data)
        _write(_new(folder, MANIFEST), journal)
        _sync_folder(folder)
        state = "the new files lie complete beside the old ones and will be read in their place"
        for name in (*files, MANIFEST):
            os.replace(_new(folder, name), folder / name)
        _sync_folder(folder)
    except OSError as e:
        if state.endswith("intact"):
            with contextlib.suppress(OSError):
                _discard(folder)
        what = "the disk is full" if e.errno == errno.ENOSPC else (e.strerror or str(e))
        raise SlimtuneError(f"{folder}: cannot be written: {what}; {state}") from None


def _committed(folder: Path) -> dict[str, Path] | None:
    """Where each file of a finished but not yet renamed set lies, None if there is no such set."""
    try:
        record = parse_json(_new(folder, MANIFEST).read_bytes(), MANIFEST)["files"]
        where = {MANIFEST: _new(folder, MANIFEST)}
        for name, entry in record.items():
            for path in (_new(folder, name), folder / name):
                if path.is_file() and _sha256(path.read_bytes()) == entry["sha256"]:
                    where[name] = path
                    break
            else:
                return None
        return where
    except (OSError, KeyError, TypeError, AttributeError, FileFormatError):
        return None


def _discard(folder: Path) -> None:
    for name in (MANIFEST, CONFIG, TENSORS, CARD):
        _new(folder, name).unlink(missing_ok=True)


def _settle(folder: Path) -> None:
    """Finish or drop what an interrupted save left."""
    for name, path in (_committed(folder) or {}).items():
        if path.name != name:
            os.replace(path, folder / name)
    _discard(folder)


def _locate(folder: Path) -> dict[str, Path]:
    known = (MANIFEST, CONFIG, TENSORS, CARD)
    return _committed(folder) or {n: folder / n for n in known if (folder / n).exists()}


# ---------------------------------------------------------------- manifest


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest of an adapter folder, None if it has none (PEFT's own folders do not).

    Raises:
        FileFormatError: a manifest that is damaged or of a newer format.
    """
    folder = Path(path)
    where = _locate(folder)
    if MANIFEST not in where:
        return None
    manifest = read_json(where[MANIFEST])
    if manifest.get("format") != FORMAT:
        raise FileFormatError(f"{folder / MANIFEST}: format {manifest.get('format')!r}, expected {FORMAT}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(e, dict) and isinstance(e.get("sha256"), str) and os.path.basename(n) == n for n, e in files.items()
    ):
        raise FileFormatError(f"{folder / MANIFEST}: 'files' is not a table of plain file names and hashes")
    return manifest


def check_files(path: str | os.PathLike[str]) -> dict[str, bytes]:
    """Read an adapter folder, every file held against the manifest's hash if there is a manifest.

    Returns:
        The contents by file name.

    Raises:
        FileFormatError: no such folder, a file that is missing, or one whose hash is another.
    """
    folder = Path(path)
    if "\0" in str(folder) or not folder.is_dir():
        raise FileFormatError(f"{folder}: no such folder")
    manifest, where = read_manifest(folder), _locate(folder)
    contents: dict[str, bytes] = {}
    for name in (CONFIG, TENSORS):
        if name not in where:
            raise FileFormatError(f"{folder / name}: no such file")
    for name, entry in (manifest["files"] if manifest else {}).items():
        if name not in where:
            raise FileFormatError(f"{folder / name}: missing, though {MANIFEST} lists it")
        data = read_bytes(where[name])
        if (found := _sha256(data)) != entry["sha256"]:
            raise FileFormatError(
                f"{folder / name}: damaged: SHA-256 {found[:16]}... ({len(data)} bytes), "
                f"expected {entry['sha256'][:16]}... ({entry.get('bytes')} bytes)"
            )
        contents[name] = data
    for name in (CONFIG, TENSORS):
        if name not in contents:
            contents[name] = read_bytes(where[name])
    return contents


# ---------------------------------------------------------------- tensors


def read_tensors(data: bytes, path: Path | str) -> dict[str, Tensor]:
    """Tensors of a safetensors file, all finite.

    Raises:
        FileFormatError: not a safetensors file, or a tensor with NaN or infinity.
    """
    try:
        tensors = safetensors.torch.load(data)
    except Exception as e:  # safetensors raises several kinds for a hostile header
        raise FileFormatError(f"{path}: not a valid safetensors file ({e})") from None
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise FileFormatError(f"{path}: {key} holds {bad} values that are not finite")
    return tensors


def _check_keys(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], path: Path | str) -> None:
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
        return {"recipe": self.recipe.to_dict(), "layers": entries, "modules_to_save": self.saved}

    @classmethod
    def from_dict(cls, data: Any, where: Path | str) -> Description:
        """The inverse of `to_dict`; FileFormatError naming what is wrong."""
        try:
            recipe = Recipe.from_dict(data["recipe"])
            layers = {}
            for name, entry in data["layers"].items():
                scale = entry["scale"]
                if isinstance(scale, bool) or not isinstance(scale, (int, float)):
                    raise FileFormatError(f"{where}: {name}: scale must be a number, got {scale!r}")
                own = recipe.to_dict() | {
                    "alpha": entry["alpha"],
                    "options": entry["options"],
                    "overrides": {},
                }
                layers[name] = LayerEntry(Recipe.from_dict(own), float(scale))
            saved = data["modules_to_save"]
            if not isinstance(saved, list) or not all(isinstance(n, str) for n in saved):
                raise FileFormatError(f"{where}: modules_to_save must be a list of names, got {saved!r}")
        except (KeyError, TypeError, AttributeError) as e:
            raise FileFormatError(f"{where}: the adapter's description lacks or misplaces {e}") from None
        except StructureError as e:
            raise FileFormatError(f"{where}: {e}") from None
        return cls(recipe, layers, saved)


def describe(model: nn.Module, name: str = "default") -> Description:
    """The description of an attached adapter, sizes as they stand now."""
    require_adapter(model, name)
    layers, recipes = {}, []
    for layer, host in hosts(model, name).items():
        adapter: Adapter = host.adapter(name)
        if adapter.scale.is_meta:
            raise SlimtuneError(f"{layer}: adapter {name!r} is still on the meta device; load weights, then initialize")
        recipe = adapter.recipe
        data = recipe.to_dict() | {"options": adapter.structure.options()}
        layers[layer] = LayerEntry(Recipe.from_dict(data), float(adapter.scale))
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
        weight = getattr(model.get_submodule(name), "weight", None)
        if weight is None or weight.is_meta or weight.dtype not in (torch.float32, torch.bfloat16, torch.float64):
            return None
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].to(torch.bfloat16).float().cpu()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(repr(sample.tolist()).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- model <-> tensors


def own_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's tensors under slimtune's own keys.

    They are `<layer>.structure.<p>`, `<layer>.composition.<p>` and `<module>.saved.<p>`.
    """
    tensors = {}
    for layer, host in hosts(model, name).items():
        for key, p in host.adapters[name].named_parameters():
            tensors[f"{layer}.{key}"] = p
    for layer, module in saved_modules(model, name).items():
        for key, t in module.adapters[name].state_dict().items():
            tensors[f"{layer}.saved.{key}"] = t
    return {k: t.detach().cpu().contiguous() for k, t in tensors.items()}


def install(
    model: nn.Module, description: Description, tensors: Mapping[str, Tensor], name: str, path: Path | str
) -> list[str]:
    """Attach a described adapter with its tensors (slimtune's own keys), after everything has been checked.

    Raises:
        FileFormatError: a layer the model lacks or that cannot carry it, a tensor missing, extra or misshapen; the
            model is unchanged.
        AdapterNameError: the name is taken.
    """
    check_name(name)
    if name in names_of(model):
        raise AdapterNameError(f"adapter name {name!r} is taken; attached: {', '.join(names_of(model))}")
    built: dict[str, Adapter] = {}
    expected: dict[str, tuple[int, ...]] = {}
    modules = dict(model.named_modules())
    for layer, entry in description.layers.items():
        if layer not in modules:
            raise FileFormatError(f"{path}: the model has no layer {layer!r}")
        try:
            built[layer] = build_adapter(modules[layer], layer, entry.recipe, device="meta")
        except (TargetError, StructureError) as e:
            raise FileFormatError(f"{path}: {e}") from None
        for key, p in built[layer].named_parameters():
            expected[f"{layer}.{key}"] = tuple(p.shape)
    for layer in description.saved:
        if layer not in modules:
            raise FileFormatError(f"{path}: the model has no module {layer!r} (modules_to_save)")
        state = modules[layer].base_state() if hasattr(modules[layer], "base_state") else modules[layer].state_dict()
        for key, t in state.items():
            expected[f"{layer}.saved.{key}"] = tuple(t.shape)
    _check_keys(expected, tensors, path)
    for layer, adapter in built.items():
        weight = modules[layer].weight
        adapter.to_empty(device=weight.device)
        adapter.scale.fill_(description.layers[layer].scale)
        with torch.no_grad():
            for key, p in adapter.named_parameters():
                p.copy_(tensors[f"{layer}.{key}"])
    attach_adapters(model, built, name, description.saved)
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
    if peft:
        body += '\nPEFT reads this folder as well: `peft.PeftModel.from_pretrained(model, "path/to/this/folder")`.\n'
    return ("\n".join(head) + "\n" + body).encode()


def save(model: nn.Module, path: str | os.PathLike[str], name: str = "default", *, base: str | None = None) -> None:
    """Write an adapter to a folder: all of it or, should anything interrupt, nothing.

    Methods that PEFT has are written in PEFT's format, which PEFT 0.17 or later reads; a manifest with hashes lies
    beside. Other files in the folder are left alone. Never touches the network.

    Args:
        path: the folder, made if need be. An adapter in it is replaced.
        name: which attached adapter.
        base: name or path of the base model, recorded for people and tools; the model's own by default.

    Raises:
        AdapterNameError: no such adapter.
        SlimtuneError: tensors on meta or not finite, or a folder that cannot be written.
    """
    from . import peft_format

    description = describe(model, name)
    tensors = own_tensors(model, name)
    for key, t in tensors.items():
        if t.is_floating_point() and not t.isfinite().all():
            raise SlimtuneError(f"{path}: not saved: {key} is not finite")
    base = base or _base_name(model)
    peft = peft_format.encode(model, description, tensors, base)
    config, stored = peft or (
        {"peft_type": "SLIMTUNE", "base_model_name_or_path": base, "slimtune": description.to_dict()},
        tensors,
    )
    manifest = {
        "format": FORMAT,
        "keys": "peft" if peft else "slimtune",
        "adapter": description.to_dict(),
        "base": {
            "name_or_path": base,
            "class": getattr(type(model), "base_class", type(model)).__name__,
            "fingerprint": fingerprint(model, list(description.layers)),
        },
    }
    write_files(
        path,
        {
            TENSORS: safetensors.torch.save(dict(stored), metadata={"format": "pt"}),
            CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
            CARD: _card(description, base, peft is not None),
        },
        manifest,
    )


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
