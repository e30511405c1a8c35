"""Layer 5: PEFT's adapter files, read and written without PEFT.

LoRA, rsLoRA and DoRA on Linear, transformers' Conv1D, Conv1d/2d/3d and Embedding; PEFT 0.21.2 is the reference.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import io
from .compositions import Additive, Magnitude
from .errors import FileFormatError, StructureError
from .layers import Conv1DLayout, ConvLayout, EmbeddingLayout, layout_of, own_class
from .recipe import Recipe
from .structures import LowRank

__all__ = ["decode", "decode_tensors", "encode", "export_peft", "import_peft", "literal_targets"]

PREFIX = "base_model.model."

# slimtune's key, PEFT's key, PEFT's key on an embedding
KEYS = (
    ("structure.A", "lora_A.weight", "lora_embedding_A"),
    ("structure.B", "lora_B.weight", "lora_embedding_B"),
    ("composition.magnitude", "lora_magnitude_vector", "lora_magnitude_vector"),
)

READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "lora_dropout",
}
HARMLESS = {
    # where and how it was trained, or what the tensors themselves tell
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    *("eva_config", "loftq_config", "corda_config", "lora_ga_config", "init_lora_weights", "bias"),
}
EDITS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


# ---------------------------------------------------------------- writing


def encode(
    model: nn.Module, description: io.Description, tensors: Mapping[str, Tensor], base: str | None
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """PEFT's config and tensors for an adapter, None where PEFT has no such adapter."""
    if not all(_has(entry.recipe) for entry in description.layers.values()):
        return None
    modules = {name: model.get_submodule(name) for name in description.layers}
    if any(getattr(m, "groups", 1) > 1 for m in modules.values()):
        return None  # PEFT's grouped LoRA is another matrix
    power = description.recipe.rank_power
    rank_power = 0.5 if power == 0.5 else 1.0
    ranks, alphas = {}, {}
    for name, entry in description.layers.items():
        ranks[name] = entry.recipe.options["rank"]
        alphas[name] = _tidy(entry.scale * ranks[name] ** rank_power)
    rank, alpha = (Counter(t.values()).most_common(1)[0][0] for t in (ranks, alphas))
    stored = {}
    for name, module in modules.items():
        for key, column in _columns(module):
            if (t := tensors.get(f"{name}.{key}")) is not None:
                stored[f"{PREFIX}{name}.{column}"] = _to_peft(t, key, module)
    for key, t in tensors.items():
        for name in description.saved:
            if key.startswith(f"{name}.saved."):
                stored[f"{PREFIX}{name}.{key[len(name) + 7 :]}"] = t
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "bias": "none",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": description.recipe.dropout,
        "use_rslora": rank_power == 0.5,
        "use_dora": description.recipe.composition is Magnitude,
        "fan_in_fan_out": all(_layout(m) is Conv1DLayout for m in modules.values()),
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "target_modules": literal_targets(model, list(modules)),
        "modules_to_save": description.saved or None,
        "init_lora_weights": True,
    }
    return config, stored


def _has(recipe: Recipe) -> bool:
    return recipe.structure is LowRank and recipe.composition in (Additive, Magnitude)


def _tidy(value: float) -> float | int:
    """alpha back from an fp32 scale: the nearby short number if there is one."""
    short = float(f"{value:.6g}")
    value = short if math.isclose(short, value, rel_tol=1e-6) else value
    return int(value) if value == int(value) else value


def _layout(module: nn.Module) -> type:
    return layout_of(own_class(module))  # type: ignore[return-value]


def _columns(module: nn.Module) -> list[tuple[str, str]]:
    embedding = _layout(module) is EmbeddingLayout
    return [(own, second if embedding else first) for own, first, second in KEYS]


def _to_peft(t: Tensor, key: str, module: Any) -> Tensor:
    if _layout(module) is not ConvLayout:
        return t
    kernel = module.weight.shape[1:]
    if key == "structure.A":
        return t.view(-1, *kernel)
    ones = (1,) * (len(kernel) - 1)
    return t.view(*t.shape, *ones) if key == "structure.B" else t.view(1, -1, *ones)


def _suffix_hits(suffix: str, names: list[str]) -> list[str]:
    return [n for n in names if n == suffix or n.endswith(f".{suffix}")]


def literal_targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """Full names; PEFT takes them as suffixes, so a regular expression where a suffix would catch more."""
    everything = [n for n, _ in model.named_modules() if ".adapters" not in n and not n.startswith("adapters")]
    if all(set(_suffix_hits(n, everything)) <= set(names) for n in names):
        return names
    return "|".join(re.escape(n) for n in names)


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Entries that differ from the default; anchored where PEFT would take the name for a suffix of another."""
    pattern = {}
    for name, value in values.items():
        if value != default:
            caught = {values[n] for n in _suffix_hits(name, list(values))}
            pattern[name if caught == {value} else f"^{name}"] = value
    return pattern


# ---------------------------------------------------------------- reading


def decode_tensors(description: io.Description, tensors: Mapping[str, Tensor], path: Path | str) -> dict[str, Tensor]:
    """PEFT's tensors under slimtune's own keys."""
    names = {PREFIX + n: n for n in description.layers}
    saved = {PREFIX + n: n for n in description.saved}
    own: dict[str, Tensor] = {}
    for key, t in tensors.items():
        place = _place(key)
        if place is not None and place[0] in names:
            own_key = f"{names[place[0]]}.{place[1]}"
            if own_key in own:
                raise FileFormatError(f"{path}: {key} gives {own_key} a second time")
            own[own_key] = _from_peft(t, place[1])
            continue
        home = next((s for s in saved if key.startswith(s + ".")), None)
        if home is None:
            raise FileFormatError(f"{path}: unexpected tensor {key}")
        own[f"{saved[home]}.saved.{key[len(home) + 1 :]}"] = t
    return own


def _place(key: str) -> tuple[str, str] | None:
    """(PEFT's module path, slimtune's key) of an adapter tensor, None for any other."""
    for own, first, second in KEYS:
        for column in (first, second, f"{first}.weight"):
            if key.endswith("." + column):
                return key[: -len(column) - 1], own
    return None


def _from_peft(t: Tensor, key: str) -> Tensor:
    if key == "composition.magnitude":
        return t.reshape(-1)
    return t.flatten(1) if t.dim() > 2 else t


def decode(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module | None, folder: Path
) -> tuple[io.Description, dict[str, Tensor]]:
    """What a folder written by PEFT holds: (description, tensors under slimtune's own keys)."""
    where = folder / io.CONFIG
    _check_config(config, where)
    names = []
    for key in tensors:
        place = _place(key)
        if place is not None and place[1] == "structure.A":
            if not place[0].startswith(PREFIX):
                raise FileFormatError(f"{folder / io.TENSORS}: {key} does not start with {PREFIX!r}")
            names.append(place[0][len(PREFIX) :])
    if not names:
        raise FileFormatError(f"{folder / io.TENSORS}: holds no lora_A tensor")
    power = 0.5 if config.get("use_rslora") else 1.0
    layers = {}
    for name in names:
        rank = _lookup(config, "rank_pattern", name, config.get("r", 8), where)
        alpha = _lookup(config, "alpha_pattern", name, config.get("lora_alpha", 8), where)
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise FileFormatError(f"{where}: the rank of {name} must be a whole number, got {rank!r}")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise FileFormatError(f"{where}: the alpha of {name} must be a number, got {alpha!r}")
        try:
            recipe = Recipe(
                LowRank,
                {"rank": rank},
                Magnitude if config.get("use_dora") else Additive,
                alpha=float(alpha),
                rank_power=power,
                dropout=config.get("lora_dropout", 0.0),
                name="dora" if config.get("use_dora") else "rslora" if power == 0.5 else "lora",
            )
        except (StructureError, TypeError) as e:
            raise FileFormatError(f"{where}: {e}") from None
        if rank < 1:
            raise FileFormatError(f"{where}: the rank of {name} must be at least 1, got {rank}")
        layers[name] = io.LayerEntry(recipe, recipe.scale(rank))
    kept = {k: t for k, t in tensors.items() if not _is_base_copy(k, t, model, folder)}
    saved = _saved_names(kept, config, model, folder)
    description = io.Description(next(iter(layers.values())).recipe, layers, saved)
    return description, decode_tensors(description, kept, folder / io.TENSORS)


def _check_config(config: Mapping[str, Any], where: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise FileFormatError(f"{where}: peft_type {config.get('peft_type')!r}, expected 'LORA'")
    for key, value in config.items():
        if key not in READ | HARMLESS and value not in (None, False, [], {}, ""):
            raise FileFormatError(f"{where}: {key} = {value!r} changes the adapter in a way slimtune does not read")
    if config.get("bias", "none") != "none":
        raise FileFormatError(f"{where}: bias = {config['bias']!r}: trained biases are not part of this format here")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(EDITS_BASE):
        raise FileFormatError(
            f"{where}: init_lora_weights = {init!r} edits the base weights, so this file does not fit the original "
            "base; convert it with PEFT (save_pretrained(path_initial_model_for_weight_conversion=...)) first"
        )


def _lookup(config: Mapping[str, Any], table: str, name: str, default: Any, where: Path) -> Any:
    entries = config.get(table) or {}
    if not isinstance(entries, Mapping):
        raise FileFormatError(f"{where}: {table} must be a table, got {type(entries).__name__}")
    for key, value in entries.items():
        if _pattern_fits(key, name, f"{where}: {table}"):
            return value
    return default


# literals, dots, `.*`, `\d+`, `[0-9]+` and one level of alternatives: enough for what PEFT users write, and no
# nested repetition, so matching a name stays cheap
_SAFE = re.compile(r"\^?(?:[\w-]|\\\.|\\d\+|\[0-9\]\+|\.\*|\.|\((?:[\w-]|\\\.)+(?:\|(?:[\w-]|\\\.)+)*\))*\$?", re.ASCII)


def _pattern_fits(key: str, name: str, where: str) -> bool:
    if len(key) > 300 or not _SAFE.fullmatch(key) or key.count(".*") + key.count("+") > 4:
        raise FileFormatError(f"{where}: {key[:80]!r} is not a name or a simple pattern")
    return re.match(rf"(.*\.)?({key})$", name) is not None


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
    rest = [k[len(PREFIX) :] for k in tensors if _place(k) is None]
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


# ---------------------------------------------------------------- public verbs


def import_peft(model: nn.Module, path: str | os.PathLike[str], name: str = "default") -> list[str]:
    """Attach an adapter that PEFT wrote. The same as `load`, which recognises PEFT's folders by itself."""
    return io.load(model, path, name)


def export_peft(
    model: nn.Module, path: str | os.PathLike[str], name: str = "default", *, base: str | None = None
) -> None:
    """Write an adapter as PEFT would: `adapter_model.safetensors`, `adapter_config.json` and the manifest.

    Raises:
        StructureError: PEFT has no such adapter.
    """
    description = io.describe(model, name)
    if encode(model, description, io.own_tensors(model, name), base) is None:
        method = description.recipe.name
        raise StructureError(f"{name!r} ({method}) cannot be written for PEFT: it has no such adapter")
    io.save(model, path, name, base=base)
