"""Models from compressed folders."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..compress import shape_as
from ..errors import FileFormatError, SlimtuneError
from ..files import MANIFEST, parse_json, read_bytes
from ..layouts import layout_of
from ..recipe import subclasses
from ..structures import Structure
from ..targets import adapter_names, own_modules, unwrapped
from .folders import CompressedFolder, read_compressed
from .writing import transformers_class

__all__ = ["load_compressed", "load_with_head"]


def load_compressed(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Load a compressed model, in eval mode.

    Without `model`, the class that the folder names is made from its config.json (no weights are drawn, and tensors
    are read one at a time: about one copy of them is in memory); it must be one of transformers' own. Everything is
    checked before a tensor is read into the model: hashes, sizes, names, shapes and finiteness.

    Args:
        path: a folder that `save_compressed` wrote.
        model: a module of the kind that was saved, with weights of any kind; it is shaped and filled in place and is
            unchanged if the folder does not fit it.
        dtype: of all floating-point tensors; as they were saved by default.
        device: where to put the tensors; by default the CPU, or where those of `model` are.

    Raises:
        FileFormatError: naming the file, the key, what was expected and what was found.
        SlimtuneError: `model` carries adapters.

    Example: see `save_compressed`.
    """
    folder = read_compressed(path)
    if model is None:
        cls = _saved_class(folder)
        return _made(folder, cls, _config(folder, cls, {}), dtype, device, strict=True)[0]
    inner = unwrapped(model)
    if names := adapter_names(inner):
        raise SlimtuneError(f"{path}: not loaded: the model carries the adapter {names[0]!r}; merge or remove it first")
    expected = _expected(inner, folder.structures, folder.path)
    _check_keys(folder, expected)
    _check_files(folder)
    shape_as(inner, folder.structures)
    _fill(inner, folder, {key: key for key in folder.tensors}, folder.tied, dtype, device)
    return model.eval()


def load_with_head(
    path: str | os.PathLike[str], cls: Any, *, dtype: torch.dtype | None = None, seed: int = 0, **config: Any
) -> tuple[nn.Module, set[str]]:
    """A compressed model of transformers under another class of its architecture, such as with a classifier.

    The body is loaded strictly; a head that the folder lacks, or has in another size, is drawn anew from `seed`.

    Returns:
        The model in eval mode, and the names of the tensors that were drawn.

    Raises:
        FileFormatError: as `load_compressed`, also for a class of another architecture.
    """
    folder = read_compressed(path)
    return _made(folder, cls, _config(folder, cls, config), dtype, None, strict=False, seed=seed)


def _saved_class(folder: CompressedFolder) -> Any:
    name = folder.manifest["model"].get("class")
    if name is None:
        told = str(folder.manifest["model"].get("type"))[:80]
        raise FileFormatError(f"{folder.path}: a {told}, which is no class of transformers; give the module: model=...")
    if (cls := transformers_class(name)) is None:
        raise FileFormatError(f"{folder.path / MANIFEST}: {str(name)[:80]!r} is no model class of transformers")
    return cls


def config_of(folder: CompressedFolder) -> dict[str, Any]:
    """config.json, held against its hash.

    Raises:
        FileFormatError: there is none, or it is damaged, or tells of code or quantisation.
    """
    file = folder.path / "config.json"
    entry = folder.manifest["files"].get("config.json")
    if entry is None:
        raise FileFormatError(f"{file}: {MANIFEST} does not list it")
    data = read_bytes(file)
    if (found := hashlib.sha256(data).hexdigest()) != entry["sha256"]:
        raise FileFormatError(f"{file}: damaged: SHA-256 {found[:16]}..., expected {entry['sha256'][:16]}...")
    config = parse_json(data, file)
    for key in ("auto_map", "quantization_config", "attn_implementation", "_attn_implementation"):
        if config.get(key):
            raise FileFormatError(f"{file}: {key} is not read from a compressed model")
    return config


def _config(folder: CompressedFolder, cls: Any, fields: Mapping[str, Any]) -> Any:
    data, file = config_of(folder), folder.path / "config.json"
    if data.get("model_type") != cls.config_class.model_type:
        raise FileFormatError(
            f"{file}: model_type {str(data.get('model_type'))[:40]!r}, expected {cls.config_class.model_type!r} for a "
            f"{cls.__name__}"
        )
    try:
        config = cls.config_class.from_dict(data, **fields)
        config._name_or_path = str(folder.path)
        return config
    except Exception as error:
        raise FileFormatError(f"{file}: not a configuration of {cls.__name__} ({error})") from None


class _Unallocated(TorchFunctionMode):
    """Within: `torch.empty`, by which layers make their weights, takes no memory; other tensors are real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _built(folder: CompressedFolder, cls: Any, config: Any, mode: Any) -> Any:
    try:
        with torch.random.fork_rng(devices=[]), mode:
            return cls._from_config(copy.deepcopy(config))
    except Exception as error:
        text = next(iter(str(error).splitlines()), type(error).__name__)
        raise FileFormatError(f"{folder.path / 'config.json'}: no {cls.__name__} can be made of it ({text})") from None


def _made(
    folder: CompressedFolder,
    cls: Any,
    config: Any,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    *,
    strict: bool,
    seed: int = 0,
) -> tuple[nn.Module, set[str]]:
    """(a model of a class of transformers, names of the tensors that the folder does not have)."""
    if dtype is not None:
        config.dtype = dtype
    ghost = _built(folder, cls, config, torch.device("meta"))  # sizes that no memory holds cost nothing
    renamed, structures, tied, fresh = _match(folder, ghost, strict)
    _check_files(folder)
    for mode in (_Unallocated(), contextlib.nullcontext()):
        model = _built(folder, cls, config, mode)
        shape_as(model, structures)
        _fill(model, folder, renamed, tied, dtype, device)
        if fresh:
            _draw(model, fresh, seed)
        if not any(t.is_meta for t in (*model.parameters(), *model.buffers())):
            break
    if device is not None:
        model.to(device)
    if "generation_config.json" in folder.manifest["files"] and model.can_generate():
        from transformers import GenerationConfig

        with contextlib.suppress(OSError, ValueError, TypeError):
            model.generation_config = GenerationConfig.from_pretrained(str(folder.path))
    return model.eval(), fresh


def _match(
    folder: CompressedFolder, ghost: Any, strict: bool
) -> tuple[dict[str, str], dict[str, Any], dict[str, str], set[str]]:
    """({key in the folder: key in the model}, structures and ties by the model's names, keys to be drawn)."""
    if strict:
        _check_keys(folder, _expected(ghost, folder.structures, folder.path))
        return {key: key for key in folder.tensors}, folder.structures, folder.tied, set()
    prefix = f"{ghost.base_model_prefix}."
    inside = hasattr(ghost, ghost.base_model_prefix)
    saved_inside = any(key.startswith(prefix) for key in folder.tensors)

    def name(key: str) -> str | None:
        """The model's name of what the folder calls `key`; None for another head's."""
        if inside == saved_inside:
            return key
        return prefix + key if inside else key.removeprefix(prefix) if key.startswith(prefix) else None

    def body(key: str) -> bool:
        return not inside or key.startswith(prefix)

    renamed = {key: new for key in folder.tensors if (new := name(key)) is not None}
    shapes = {new: folder.shapes[key] for key, new in renamed.items()}
    structures = {new: entry for layer, entry in folder.structures.items() if (new := name(layer)) is not None}
    own = {n: tuple(t.shape) for n, t in ghost.state_dict().items()}
    modules = own_modules(ghost)
    for layer in [n for n in structures if not body(f"{n}.")]:
        fits = layer in modules and all(
            shapes.get(key) == shape
            for key, shape in _layer(modules[layer], layer, structures[layer], folder.path).items()
        )
        if not fits:
            del structures[layer]
    expected = _expected(ghost, structures, folder.path)
    tied: dict[str, str] = {}
    for key, kept in folder.tied.items():
        a, b = name(key), name(kept)
        if a is not None and b is not None and a in own and b in own:
            tied[a] = b
    fresh = set()
    for key, shape in expected.items():
        if shapes.get(key) == shape or key in tied:
            continue
        if key in shapes and body(key):
            raise FileFormatError(f"{folder.path}: {key} has shape {shapes[key]}, expected {shape}")
        if body(key) and "pooler" not in key:
            raise FileFormatError(f"{folder.path}: the weights lack {key} of the model's body")
        fresh.add(key)
    for key in shapes:
        if key not in expected and body(key) and "pooler" not in key:
            raise FileFormatError(f"{folder.path}: {key} is no tensor of a {type(ghost).__name__}")
    renamed = {k: new for k, new in renamed.items() if new in expected and new not in fresh}
    filled = set(renamed.values())
    return renamed, structures, {a: b for a, b in tied.items() if b in filled}, fresh


def _expected(model: nn.Module, structures: Mapping[str, Any], path: Path) -> dict[str, tuple[int, ...]]:
    """{key: shape} of a model's state once layers hold these structures; nothing of its size is allocated."""
    expected = {key: tuple(t.shape) for key, t in model.state_dict().items() if isinstance(t, Tensor)}
    modules = own_modules(model)
    for name, entry in structures.items():
        if name not in modules:
            raise FileFormatError(f"{path / MANIFEST}: the model has no layer {name[:80]!r}")
        expected.pop(f"{name}.weight", None)
        expected |= _layer(modules[name], name, entry, path)
    return expected


def _layer(module: nn.Module, name: str, entry: Mapping[str, Any], path: Path) -> dict[str, tuple[int, ...]]:
    """{key: shape} of a layer that holds the structure described by `entry`."""
    known, layout = subclasses(Structure), layout_of(type(module))
    kind, options, bias = entry.get("structure"), entry.get("options"), entry.get("bias")
    where = f"{path / MANIFEST}: structure of layer {name[:80]!r}"
    if not isinstance(kind, str) or kind not in known:
        raise FileFormatError(f"{where}: no structure is called {str(kind)[:40]!r}; known: {', '.join(sorted(known))}")
    if layout is None or not isinstance(options, dict) or not isinstance(bias, bool):
        raise FileFormatError(f"{where}: a {type(module).__name__} cannot hold it")
    try:
        O, I = layout.sizes(module)
        structure = known[kind](O, I, **options, device="meta")
    except (SlimtuneError, TypeError, ValueError, OverflowError, RuntimeError, AttributeError, IndexError) as error:
        raise FileFormatError(f"{where}: {next(iter(str(error).splitlines()), '')}") from None
    found = {f"{name}.structure.{key}": tuple(t.shape) for key, t in structure.state_dict().items()}
    return found | ({f"{name}.bias": (O,)} if bias else {})


def _check_keys(folder: CompressedFolder, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise FileFormatError unless a folder has exactly these tensors, or says with which they are shared."""
    tied, found = folder.tied, folder.shapes
    for key, kept in tied.items():
        if key in found or kept not in found or key not in expected or found[kept] != expected[key]:
            raise FileFormatError(f"{folder.path / MANIFEST}: 'tied': {key[:80]!r} cannot share {kept[:80]!r}")
    missing = sorted(set(expected) - set(found) - set(tied))
    extra = sorted(set(found) - set(expected))
    if missing or extra:
        parts = [f"{len(k)} {w} (first: {k[0][:80]})" for k, w in ((missing, "missing"), (extra, "unexpected")) if k]
        raise FileFormatError(f"{folder.path}: tensors do not fit the model: {', '.join(parts)}")
    for key, shape in found.items():
        if shape != expected[key]:
            file = folder.tensors[key]
            raise FileFormatError(f"{file}: {key} has shape {shape}, expected {expected[key]}")


def _check_files(folder: CompressedFolder) -> None:
    if problems := folder.problems():
        raise FileFormatError(f"{folder.path}/{problems[0]}")


@torch.no_grad()
def _fill(
    model: nn.Module,
    folder: CompressedFolder,
    renamed: Mapping[str, str],
    tied: Mapping[str, str],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> None:
    """Put a folder's tensors into a model that has been shaped, one at a time, and share those that were shared."""
    for key, t in folder.each(renamed):
        module, leaf, before = _place(model, renamed[key])
        target = device if device is not None else "cpu" if before.is_meta else before.device
        t = t.to(target, dtype if t.is_floating_point() else None, copy=True)  # the file may change under a mapping
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(t, before.requires_grad and t.is_floating_point())
        else:
            module._buffers[leaf] = t
    for key, kept in tied.items():
        (module, leaf, _), (source, name, t) = _place(model, key), _place(model, kept)
        if leaf in module._parameters and name in source._parameters:
            module._parameters[leaf] = source._parameters[name]
        elif leaf in module._buffers:
            module._buffers[leaf] = t


def _place(model: nn.Module, key: str) -> tuple[nn.Module, str, Tensor]:
    path, _, leaf = key.rpartition(".")
    module = model.get_submodule(path)
    own: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
    return module, leaf, own[leaf]


@torch.no_grad()
def _draw(model: Any, fresh: Collection[str], seed: int) -> None:
    """Give tensors that the folder lacks their starting values, by the model's own rule."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = {key.rpartition(".")[0]: None for key in model.state_dict() if key in fresh}
        for name in modules:
            module = model.get_submodule(name)
            for own in (module._parameters, module._buffers):
                for leaf, t in own.items():
                    if t is not None and t.is_meta:
                        made = torch.zeros(t.shape, dtype=t.dtype)
                        own[leaf] = nn.Parameter(made) if isinstance(t, nn.Parameter) else made  # type: ignore[assignment]
            model._init_weights(module)
