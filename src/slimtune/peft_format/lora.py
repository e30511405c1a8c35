"""LoRA, rsLoRA and DoRA on Linear, transformers' Conv1D, Conv1d/2d/3d and Embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..compositions import Additive, Magnitude
from ..errors import FileFormatError
from ..io import LayerEntry
from ..layouts import Conv1DLayout, ConvLayout, EmbeddingLayout
from ..recipe import Recipe
from ..recipes import dora, lora, rslora
from ..structures import LowRank
from .codec import Codec, Fields, Layer, Unfit, common, layout, tidy
from .names import pattern_table

__all__ = ["LoraCodec"]

EDITS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# slimtune's key, PEFT's, PEFT's on an embedding
KEYS = (
    ("structure.A", "lora_A.weight", "lora_embedding_A"),
    ("structure.B", "lora_B.weight", "lora_embedding_B"),
    ("composition.magnitude", "lora_magnitude_vector", "lora_magnitude_vector"),
)
OWN = {column: own for own, *columns in KEYS for column in columns} | {
    "lora_magnitude_vector.weight": "composition.magnitude"
}


class LoraCodec(Codec):
    """`LoraConfig`. Grouped, dilated and padded-around convolutions are refused: PEFT makes another matrix of a group,
    and its factors know neither dilation nor padding mode. A conversion of PiSSA and its like edits the base and is
    refused when read."""

    peft_type = "LORA"
    columns = tuple(OWN)
    read = frozenset(
        ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_dropout", "bias")
    )
    harmless = frozenset(
        [
            *("fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
            *("eva_config", "loftq_config", "corda_config", "lora_ga_config", "init_lora_weights"),
        ]
    )

    def claims(self, recipe: Recipe) -> bool:
        plain = recipe.structure is LowRank and not recipe.options.get("core")
        return plain and recipe.composition in (Additive, Magnitude)

    def config(self, layers: Mapping[str, Layer]) -> dict[str, Any]:
        for name, layer in layers.items():
            _check_convolution(name, layer.module)
        recipe = next(iter(layers.values())).entry.recipe
        power = 0.5 if recipe.rank_power == 0.5 else 1.0
        ranks = {name: layer.entry.recipe.options["rank"] for name, layer in layers.items()}
        alphas = {name: tidy(layer.entry.scale * ranks[name] ** power) for name, layer in layers.items()}
        rank, alpha = common(ranks.values()), common(alphas.values())
        return {
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": recipe.dropout,
            "use_rslora": power == 0.5,
            "use_dora": recipe.composition is Magnitude,
            "fan_in_fan_out": all(layout(layer.module) is Conv1DLayout for layer in layers.values()),
            "rank_pattern": pattern_table(ranks, rank),
            "alpha_pattern": pattern_table(alphas, alpha),
            "init_lora_weights": True,
            "bias": "none",
        }

    def theirs(self, own: Mapping[str, Tensor], layer: Layer) -> dict[str, Tensor]:
        second = layout(layer.module) is EmbeddingLayout
        return {
            (embedding if second else column): _shaped(own[key], key, layer.module)
            for key, column, embedding in KEYS
            if key in own
        }

    def ours(self, columns: Mapping[str, Tensor], recipe: Recipe, where: str) -> dict[str, Tensor]:
        own: dict[str, Tensor] = {}
        for column, t in columns.items():
            if (key := OWN[column]) in own:
                raise FileFormatError(f"{where}.{column} gives {key} a second time")
            own[key] = t.reshape(-1) if key == "composition.magnitude" else t.flatten(1) if t.dim() > 2 else t
        return own

    def check(self, fields: Fields) -> None:
        init = fields.get("init_lora_weights", True)
        if isinstance(init, str) and init.lower().startswith(EDITS_BASE):
            raise FileFormatError(
                f"{fields.where}: init_lora_weights = {init!r} edits the base weights, so this file does not fit the "
                "original base; convert it with PEFT (save_pretrained(path_initial_model_for_weight_conversion=...)) "
                "first"
            )

    def entry(self, fields: Fields, layer: str, columns: Mapping[str, Tensor]) -> LayerEntry:
        rank = fields.whole("r", 8, "rank", layer, "rank_pattern")
        alpha = fields.number("lora_alpha", 8, "alpha", layer, "alpha_pattern")
        power = 0.5 if fields.get("use_rslora") else 1.0
        make = dora if fields.get("use_dora") else rslora if power == 0.5 else lora
        recipe = replace(make(rank, alpha, fields.get("lora_dropout", 0.0)), rank_power=power)
        return LayerEntry(recipe, recipe.scale(rank))


def _check_convolution(name: str, module: Any) -> None:
    if layout(module) is not ConvLayout:
        return
    if module.groups > 1:
        raise Unfit(f"its factors of a grouped convolution ({name}) make another matrix")
    if any(d != 1 for d in module.dilation):
        raise Unfit(f"it does not dilate ({name})")
    if module.padding_mode != "zeros":
        raise Unfit(f"it pads with zeros, {name} with padding_mode={module.padding_mode!r}")


def _shaped(t: Tensor, key: str, module: Any) -> Tensor:
    if layout(module) is not ConvLayout:
        return t
    kernel = module.weight.shape[1:]
    if key == "structure.A":
        return t.view(-1, *kernel)
    ones = (1,) * (len(kernel) - 1)
    return t.view(*t.shape, *ones) if key == "structure.B" else t.view(1, -1, *ones)
