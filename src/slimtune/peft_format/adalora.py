"""AdaLoRA on Linear, transformers' Conv1D and Conv2d."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..compositions import Additive
from ..errors import FileFormatError
from ..io import LayerEntry
from ..layouts import Conv1DLayout, ConvLayout, LinearLayout
from ..recipe import Recipe
from ..recipes import adalora
from ..structures import LowRank
from .codec import Codec, Fields, Layer, Unfit, layout, same, tidy

__all__ = ["AdaloraCodec"]

EPS = 1e-5
"""PEFT's scale is lora_alpha / (init_r + EPS), whatever ranks are left."""

NEVER = 10**9
"""total_step of what is written: PEFT goes on without pruning."""

KEYS = {"lora_A": "structure.A", "lora_B": "structure.B", "lora_E": "structure.core"}


class AdaloraCodec(Codec):
    """`AdaLoraConfig`: dW = B diag(E) A; one lora_alpha and one init_r for all layers, and a rank_pattern that says
    which of the init_r ranks each layer still has.

    Written, the pruning is over: PEFT's schedule is one that never prunes. Read, ranks stay as they are, and a layer
    that PEFT left without any gets one of zeros. Grouped and otherwise padded convolutions are refused: PEFT cannot
    compute the former and pads the latter with zeros.
    """

    peft_type = "ADALORA"
    columns = tuple(KEYS)
    read = frozenset(("init_r", "lora_alpha", "lora_dropout", "rank_pattern", "bias"))
    harmless = frozenset(
        [
            *("target_r", "tinit", "tfinal", "deltaT", "total_step", "beta1", "beta2", "orth_reg_weight"),
            # LoRA's, which AdaLoRA's layers do not look at
            *("r", "use_rslora", "alpha_pattern", "init_lora_weights", "fan_in_fan_out", "megatron_core"),
            *("qalora_group_size", "runtime_config", "ensure_weight_tying"),
            *("eva_config", "loftq_config", "corda_config", "lora_ga_config"),
        ]
    )

    def claims(self, recipe: Recipe) -> bool:
        return recipe.structure is LowRank and bool(recipe.options.get("core")) and recipe.composition is Additive

    def config(self, layers: Mapping[str, Layer]) -> dict[str, Any]:
        for name, layer in layers.items():
            _check(name, layer.module)
        recipe = next(iter(layers.values())).entry.recipe
        scale = same({name: layer.entry.scale for name, layer in layers.items()}, "scale")
        if scale <= 0:
            raise Unfit(f"its scale is positive, not {scale:g}; export_peft converts it")
        ranks = {name: layer.entry.recipe.options["rank"] for name, layer in layers.items()}
        start = _start(recipe, scale, max(ranks.values()))
        pattern = {f"{name}.lora_E": [j < rank for j in range(start)] for name, rank in ranks.items()}
        uneven = any(rank != start for rank in ranks.values())
        if uneven and (odd := [name for name in layers if "default" in name]):
            raise Unfit(f"its rank_pattern takes 'default' in {odd[0]!r} for the adapter's name")
        return {
            "init_r": start,
            "target_r": max(1, round(sum(ranks.values()) / len(ranks))),
            "lora_alpha": _alpha(scale, start),
            "lora_dropout": recipe.dropout,
            "rank_pattern": pattern if uneven else None,
            "tinit": NEVER - 1,
            "tfinal": 0,
            "deltaT": 1,
            "total_step": NEVER,
            "orth_reg_weight": recipe.controllers.get("Orthogonality", {}).get("coefficient", 0.0),
            "fan_in_fan_out": all(layout(layer.module) is Conv1DLayout for layer in layers.values()),
            "init_lora_weights": True,
            "bias": "none",
        }

    def theirs(self, own: Mapping[str, Tensor], layer: Layer) -> dict[str, Tensor]:
        return {column: own[key].unsqueeze(1) if key == "structure.core" else own[key] for column, key in KEYS.items()}

    def ours(self, columns: Mapping[str, Tensor], recipe: Recipe, where: str) -> dict[str, Tensor]:
        own = {}
        for column, t in columns.items():
            if column == "lora_E" and t.dim() == 2 and t.shape[1] == 1:
                t = t[:, 0]
            if not t.numel():
                t = t.new_zeros([n or 1 for n in t.shape])
            own[KEYS[column]] = t
        return own

    def entry(self, fields: Fields, layer: str, columns: Mapping[str, Tensor]) -> LayerEntry:
        start = fields.whole("init_r", 12, "init_r", layer)
        A = columns.get("lora_A")
        if A is None or A.dim() != 2:
            raise FileFormatError(f"{fields.where}: {layer} must come with a lora_A of 2 dimensions")
        rank, listed = A.shape[0], _listed(fields, layer, start)
        if rank != (start if listed is None else listed):
            told = f"init_r = {start}" if listed is None else f"rank_pattern leaves it {listed}"
            raise FileFormatError(f"{fields.where}: {layer} comes with {rank} ranks, but {told}")
        alpha = fields.number("lora_alpha", 8, "alpha", layer)
        if alpha <= 0:
            alpha = float(start if listed is None else rank)
        recipe = adalora(1, start, alpha or 1.0, fields.get("lora_dropout", 0.0))
        recipe = replace(recipe, options={"rank": max(rank, 1), "core": True}, controllers={})
        return LayerEntry(recipe, alpha / (start + EPS))

    def converted(self, entry: LayerEntry, own: dict[str, Tensor]) -> tuple[LayerEntry, dict[str, Tensor]]:
        """The scale in the core, so that all layers share one."""
        return replace(entry, scale=1.0), own | {"structure.core": entry.scale * own["structure.core"]}


def _start(recipe: Recipe, scale: float, most: int) -> int:
    """The rank at the start, from which the scale comes, if no layer has more by now."""
    start = round(min(recipe.alpha / scale, 2.0**31)) if recipe.rank_power == 1 else 0
    return max(start, most) if abs(start * scale - recipe.alpha) < 1e-4 * abs(recipe.alpha) else most


def _alpha(scale: float, start: int) -> float | int:
    """lora_alpha, the short number where it gives the scale to the last bit."""
    alpha = scale * (start + EPS)
    short = tidy(alpha)
    return short if torch.tensor(short / (start + EPS)).item() == scale else alpha


def _listed(fields: Fields, layer: str, start: int) -> int | None:
    """How many ranks rank_pattern leaves a layer; None if it does not say."""
    pattern = fields.get("rank_pattern", {})
    if not isinstance(pattern, Mapping):
        raise FileFormatError(f"{fields.where}: rank_pattern must be a table, got {type(pattern).__name__}")
    kept = pattern.get(f"{layer}.lora_E")
    if kept is None:
        return None
    if not isinstance(kept, list) or len(kept) != start or not all(isinstance(k, bool) for k in kept):
        raise FileFormatError(f"{fields.where}: rank_pattern of {layer} must be {start} times true or false")
    return sum(kept)


def _check(name: str, module: Any) -> None:
    kind = layout(module)
    if kind in (LinearLayout, Conv1DLayout):
        return
    if kind is not ConvLayout or module.weight.dim() != 4:
        raise Unfit(f"it has Linear, Conv1D and Conv2d only, {name} is a {type(module).__name__}")
    if module.groups > 1:
        raise Unfit(f"it cannot compute a grouped convolution ({name})")
    if module.padding_mode != "zeros":
        raise Unfit(f"it pads with zeros, {name} with padding_mode={module.padding_mode!r}")
