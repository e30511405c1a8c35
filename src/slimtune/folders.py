"""Layer 5: from one adapter folder to another."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import io
from .compositions import Additive
from .conversion import ConversionReport, to_lora
from .errors import SlimtuneError, StructureError, VerificationError
from .files import CARD, CONFIG, MANIFEST
from .layers import Adapter
from .recipe import Recipe
from .structures import LowRank
from .targets import hosts, trainable_parameters, unwrapped
from .verbs import disabled, remove

__all__ = ["lora_folder"]

NAME = "conversion"  # the adapter's, while it is on the model
TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out")
DEPTH = 64  # modules inside modules
SIDE, AREA = 2**20, 2**32  # no layer is larger; a file that says so is not believed


def lora_folder(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: Callable[[str | None], nn.Module | None],
    *,
    rank: int | None = None,
    tolerance: float = 1e-3,
    multiple: int = 1,
    progress: Callable[[list[str]], Iterable[str]] = lambda layers: layers,
) -> ConversionReport:
    """Write the adapter in a folder to another one as plain LoRA, which every loader of PEFT's format reads right.

    That is: PEFT's LORA, `lora_alpha` = r, the scale baked in, one rank for all layers, no rsLoRA, DoRA or patterns.
    What was written is read back as PEFT reads it, without the manifest, and compared bit for bit with the factors
    whose error was measured. See `to_lora` for what is computed.

    Args:
        base: asked with None for a base model, which it may refuse by None; asked again with the reason if the folder
            alone is not enough. The model is as before afterwards.

    Raises:
        FileFormatError: damaged files, or files that do not fit the base.
        StructureError: a grouped convolution, whose LoRA in PEFT is another matrix.
        VerificationError: an error above the tolerance, or a folder that does not read back. Nothing is written then.
    """
    manifest = io.read_manifest(Path(path))
    given, reason = base(None), None
    model: nn.Module | None = None if given is None else unwrapped(given)
    config = io.parse_json(io.check_files(path)[CONFIG], Path(path) / CONFIG)
    if model is None:
        try:
            model = _stand_in(path, manifest, config)
        except _BaseNeeded as needed:
            reason = str(needed)
            given = base(reason)
            assert given is not None
            model = unwrapped(given)
    if given is None:
        report = _converted(path, out, model, manifest, config, (rank, tolerance, multiple, progress))
    else:
        trained = [p for _, p in trainable_parameters(model)]
        with disabled(model):
            try:
                io.load(model, path, NAME)
                report = _converted(path, out, model, None, config, (rank, tolerance, multiple, progress))
            finally:
                if hosts(model, NAME):
                    remove(model, NAME)
                for p in trained:
                    p.requires_grad_(True)
    report.base = reason or ("it was given" if given is not None else None)
    return report


def _converted(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: nn.Module,
    manifest: Mapping[str, Any] | None,
    source: Mapping[str, Any],
    how: tuple[int | None, float, int, Any],
) -> ConversionReport:
    """Convert the adapter NAME of a model and write it; `manifest` names the base where the model is a stand-in."""
    grouped = [layer for layer, host in hosts(model, NAME).items() if getattr(host, "groups", 1) > 1]
    if grouped:
        raise StructureError(
            f"{path}: {grouped[0]} is a grouped convolution, for which PEFT's LoRA is another matrix; merge the adapter"
        )
    rank, tolerance, multiple, progress = how
    methods = sorted({host.addition(NAME).recipe.name for host in hosts(model, NAME).values()})
    try:
        report = to_lora(model, NAME, rank, tolerance=tolerance, multiple=multiple, progress=progress)
    except VerificationError as error:
        raise VerificationError(f"{path}: {error}") from None
    recorded = source.get("base_model_name_or_path")
    name = ((manifest or {}).get("base") or {}).get("name_or_path") or recorded
    target, parent = Path(out), Path(out).absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        staging = tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=parent)
    except OSError as error:
        raise SlimtuneError(f"{out}: cannot be written: {error.strerror or error}") from None
    with staging as folder:
        io.save(model, folder, NAME, base=name if isinstance(name, str) else None)
        written, contents = io.read_manifest(folder), io.check_files(folder)
        assert written is not None
        config = json.loads(contents[CONFIG])
        if isinstance(task := source.get("task_type"), str):
            config["task_type"] = task
        if not _is_real(model):
            config |= {key: source[key] for key in TARGETS if key in source}
            written["base"] = (manifest or {}).get("base") or {**written["base"], "class": None, "fingerprint": None}
        contents[CONFIG] = json.dumps(config, indent=2, sort_keys=True).encode()
        contents[CARD] += (
            f"\nConverted from {', '.join(methods)} by `slimtune convert`: the change of the weights differs by "
            f"{report.error:.1e} of its norm (worst layer: {report.worst.error:.1e}).\n"
        ).encode()
        (Path(folder) / CONFIG).write_bytes(contents[CONFIG])
        (Path(folder) / MANIFEST).unlink()
        again, tensors, _ = io.read_description(folder, model)
    own = io.own_tensors(model, NAME)
    _compare(out, tensors, own)
    if set(again.layers) != set(hosts(model, NAME)) or any(
        entry.scale != 1 or entry.recipe.composition is not Additive or entry.recipe.options["rank"] != report.rank
        for entry in again.layers.values()
    ):
        raise VerificationError(f"{out}: what was written is read as another adapter")
    if again.saved:
        report.notes.append(
            f"modules_to_save ({', '.join(again.saved)}) are carried over; vLLM and llama.cpp refuse a folder with them"
        )
    del written["files"]
    io.write_files(out, contents, {**written, "converted": {"from": methods, **report.to_dict()}})
    _compare(out, io.read_description(out)[1], own)
    return report


def _compare(out: str | os.PathLike[str], found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise VerificationError unless these are the same tensors, bit for bit."""
    if set(found) != set(expected):
        raise VerificationError(f"{out}: reads back with other tensors than were written")
    for key, t in expected.items():
        if found[key].dtype != t.dtype or not found[key].equal(t):
            raise VerificationError(f"{out}: {key} reads back with other numbers than were written")


# ---------------------------------------------------------------- without the base


class _BaseNeeded(Exception):
    """An adapter's change cannot be told from its folder alone, and why."""


class _Part(nn.Module):
    """A module that only holds others. It has a forward because `extend` takes no container, and is never called."""

    def forward(self, *_: Any) -> Tensor:
        raise RuntimeError("a stand-in holds an adapter's tensors and computes nothing")


def _is_real(model: nn.Module) -> bool:
    return not isinstance(model, _Part)


def _stand_in(path: str | os.PathLike[str], manifest: Mapping[str, Any] | None, config: Mapping[str, Any]) -> nn.Module:
    """A model of the adapted layers alone, their weights zeros that take no memory, carrying the folder's adapter.

    Raises:
        _BaseNeeded: the change depends on the base, or the folder does not tell the sizes of its layers.
    """
    if manifest is None and "slimtune" not in config and config.get("modules_to_save"):
        raise _BaseNeeded("only it tells which tensors belong to modules_to_save")
    targets = config.get("target_modules")
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise _BaseNeeded(f"{CONFIG} does not name its target_modules")
    description, tensors, _ = io.read_description(path)
    flat = manifest is None and "slimtune" not in config and _is_flat(path)
    wide = any(t.dtype == torch.float64 for t in tensors.values())
    model = _Part()
    for name, entry in description.layers.items():
        if entry.recipe.composition is not Additive:
            raise _BaseNeeded(f"{entry.recipe.name} ({entry.recipe.composition.__name__}) acts on its weights")
        A, B = (tensors.get(f"{name}.structure.{key}") for key in "AB")
        if entry.kind and entry.shape:
            kind, shape = entry.kind, entry.shape
        elif flat and entry.recipe.structure is LowRank and A is not None and B is not None and A.dim() == B.dim() == 2:
            kind, shape = "Linear", (B.shape[0], A.shape[1])
        else:
            raise _BaseNeeded("the folder does not tell the sizes of its layers")
        if max(shape) > SIDE or math.prod(shape) > AREA:
            raise _BaseNeeded(f"the folder gives {name[:80]} a shape of {shape}")
        layer = _layer(kind, shape)
        dtype = torch.float64 if wide else torch.float32
        layer.weight = nn.Parameter(torch.zeros((), dtype=dtype).expand(layer.weight.shape), requires_grad=False)
        _place(model, name, layer)
        _check_prepare(entry.recipe, int(shape[0]), layer.weight.numel() // int(shape[0]))
    for name in description.saved:
        prefix, part = f"{name}.saved.", _Part()
        for key, t in tensors.items():
            if key.startswith(prefix):
                _hold(part, key[len(prefix) :], t)
        _place(model, name, part)
    io.install(model, description, tensors, NAME, Path(path))
    return model


def _is_flat(path: str | os.PathLike[str]) -> bool:
    """Whether all of PEFT's own tensors are those of matrices: no kernels, no embeddings."""
    contents = io.check_files(path)
    stored = io.read_tensors(contents[io.TENSORS], Path(path))
    return all(t.dim() == 2 and "lora_embedding" not in key for key, t in stored.items())


def _layer(kind: object, shape: tuple[int, ...]) -> Any:
    """A layer on the meta device, by what `LayerEntry` records of it."""
    with torch.device("meta"):
        if len(shape) == 2 and kind == "Linear":
            return nn.Linear(shape[1], shape[0], bias=False)
        if len(shape) == 2 and kind == "Conv1D":
            from transformers.pytorch_utils import Conv1D

            return Conv1D(*shape)
        if len(shape) == 2 and kind == "Embedding":
            return nn.Embedding(shape[1], shape[0])
        if kind == "Conv" and 3 <= len(shape) <= 5:
            cls: Any = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)]
            return cls(shape[1], shape[0], shape[2:], bias=False)
    raise _BaseNeeded(f"it holds a layer of an unknown kind, {str(kind)[:40]!r}")


def _place(model: nn.Module, name: str, module: nn.Module) -> None:
    parts = name.split(".")
    if len(parts) > DEPTH:
        raise _BaseNeeded(f"{name[:40]!r}... lies too deep")
    parent = model
    for part in parts[:-1]:
        if part not in parent._modules:
            _add(parent, part, _Part())
        parent = parent._modules[part]  # type: ignore[assignment]
    _add(parent, parts[-1], module)


def _add(parent: nn.Module, key: str, module: nn.Module) -> None:
    try:
        if key in parent._modules:
            raise KeyError(f"{key!r} comes twice")
        parent.add_module(key, module)
    except KeyError as error:
        raise _BaseNeeded(f"a stand-in cannot hold a module so called ({error})") from None


def _hold(part: nn.Module, key: str, t: Tensor) -> None:
    """Give a module a tensor under a dotted key."""
    *inside, last = key.split(".")
    if len(inside) > DEPTH:
        raise _BaseNeeded(f"{key[:40]!r}... lies too deep")
    for name in inside:
        if name not in part._modules:
            _add(part, name, _Part())
        part = part._modules[name]  # type: ignore[assignment]
    try:
        if t.is_floating_point():
            part.register_parameter(last, nn.Parameter(t.clone(), requires_grad=False))
        else:
            part.register_buffer(last, t.clone())
    except KeyError as error:
        raise _BaseNeeded(f"a stand-in cannot hold a tensor so called ({error})") from None


def _check_prepare(recipe: Recipe, out_features: int, in_features: int) -> None:
    """Raise _BaseNeeded if the structure reads the weight below."""

    def refuse(dtype: torch.dtype | None) -> Tensor:
        raise _BaseNeeded(f"{recipe.name} ({recipe.structure.__name__}) reads its weights")

    with contextlib.suppress(SlimtuneError):  # `install` says it, and where
        Adapter(recipe, out_features, in_features, device="meta").structure.prepare(refuse)
