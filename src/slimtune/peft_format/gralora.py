"""GraLoRA and Hybrid GraLoRA on Linear and transformers' Conv1D."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..compositions import Additive
from ..errors import FileFormatError
from ..io import LayerEntry
from ..layouts import Conv1DLayout, LinearLayout
from ..recipe import Recipe
from ..recipes import gralora
from ..structures import BlockLowRank, LowRank, Sum
from .codec import Codec, Fields, Layer, Unfit, layout, same, tidy

__all__ = ["GraloraCodec"]

PLAIN = {"gralora_A": "structure.A", "gralora_B": "structure.B"}
HYBRID = {
    "gralora_A": "structure.parts.0.A",
    "gralora_B": "structure.parts.0.B",
    "gralora_A_general.weight": "structure.parts.1.A",
    "gralora_B_general.weight": "structure.parts.1.B",
}


class GraloraCodec(Codec):
    """`GraloraConfig`: one rank, one number of blocks and one alpha for all layers.

    The hybrid form is a `Sum` of `BlockLowRank` and `LowRank`. PEFT drops inputs of the two parts independently,
    slimtune once for both.
    """

    peft_type = "GRALORA"
    columns = tuple(HYBRID)
    read = frozenset(("r", "gralora_k", "hybrid_r", "alpha", "gralora_dropout", "bias"))
    harmless = frozenset(("fan_in_fan_out", "init_weights"))

    def claims(self, recipe: Recipe) -> bool:
        return recipe.composition is Additive and recipe.structure in (BlockLowRank, Sum)

    def config(self, layers: Mapping[str, Layer]) -> dict[str, Any]:
        sizes = {}
        for name, layer in layers.items():
            if layout(layer.module) not in (LinearLayout, Conv1DLayout):
                raise Unfit(f"it has Linear and Conv1D only, {name} is a {type(layer.module).__name__}")
            sizes[name] = _sizes(name, layer.entry.recipe)
        rank = same({n: s[0] for n, s in sizes.items()}, "rank")
        blocks = same({n: s[1] for n, s in sizes.items()}, "number of blocks")
        hybrid = same({n: s[2] for n, s in sizes.items()}, "hybrid rank")
        alpha = same({n: tidy(layer.entry.scale * (rank + hybrid)) for n, layer in layers.items()}, "alpha")
        return {
            "r": rank,
            "gralora_k": blocks,
            "hybrid_r": hybrid,
            "alpha": alpha,
            "gralora_dropout": next(iter(layers.values())).entry.recipe.dropout,
            "fan_in_fan_out": all(layout(layer.module) is Conv1DLayout for layer in layers.values()),
            "init_weights": True,
            "bias": "none",
        }

    def theirs(self, own: Mapping[str, Tensor], layer: Layer) -> dict[str, Tensor]:
        keys = HYBRID if layer.entry.recipe.structure is Sum else PLAIN
        return {column: own[key] for column, key in keys.items()}

    def ours(self, columns: Mapping[str, Tensor], recipe: Recipe, where: str) -> dict[str, Tensor]:
        keys = HYBRID if recipe.structure is Sum else PLAIN
        try:
            return {keys[column]: t for column, t in columns.items()}
        except KeyError as e:
            raise FileFormatError(f"{where}.{e.args[0]} belongs to a hybrid part that this adapter lacks") from None

    def entry(self, fields: Fields, layer: str, columns: Mapping[str, Tensor]) -> LayerEntry:
        rank = fields.whole("r", 32, "rank", layer)
        blocks = fields.whole("gralora_k", 2, "gralora_k", layer)
        hybrid = fields.whole("hybrid_r", 0, "hybrid_r", layer) if fields.get("hybrid_r", 0) else 0
        if bool(hybrid) != any(c not in PLAIN for c in columns):
            part = "without" if hybrid else "with"
            raise FileFormatError(f"{fields.where}: hybrid_r = {hybrid}, but {layer} comes {part} gralora_A_general")
        alpha = fields.number("alpha", 64, "alpha", layer)
        recipe = gralora(rank, alpha, blocks, hybrid, fields.get("gralora_dropout", 0.0))
        return LayerEntry(recipe, recipe.scale(rank + hybrid))


def _sizes(name: str, recipe: Recipe) -> tuple[int, int, int]:
    """(rank, blocks, hybrid rank)."""
    if recipe.structure is BlockLowRank:
        return recipe.options["rank"], recipe.options["blocks"], 0
    parts = recipe.options["parts"]
    if [part["structure"] for part in parts] != [BlockLowRank.__name__, LowRank.__name__]:
        raise Unfit(f"it sums a BlockLowRank and a LowRank only, {name} is another sum")
    return parts[0]["rank"], parts[0]["blocks"], parts[1]["rank"]
