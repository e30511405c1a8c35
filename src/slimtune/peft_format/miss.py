"""MiSS on Linear: the default form, "mini" and "bat"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..compositions import Additive, BlockAffine
from ..errors import FileFormatError
from ..io import LayerEntry
from ..recipe import Recipe
from ..recipes import bone
from ..structures import BlockTiled, Tiled
from .codec import Codec, Fields, Layer, Unfit, same

__all__ = ["BoneCodec", "MissCodec"]


class MissCodec(Codec):
    """`MissConfig`: one rank and one form for all layers, no scale.

    PEFT ignores dropout in the form "bat", where slimtune drops inputs of the change; read from PEFT's file it is 0.
    """

    peft_type = "MISS"
    columns = ("miss_block",)
    read = frozenset(("r", "mini_r", "init_weights", "miss_dropout", "bias"))

    def claims(self, recipe: Recipe) -> bool:
        return (recipe.structure, recipe.composition) in ((Tiled, Additive), (BlockTiled, BlockAffine))

    def config(self, layers: Mapping[str, Layer]) -> dict[str, Any]:
        for name, layer in layers.items():
            _check(name, layer)
        recipes = {name: layer.entry.recipe for name, layer in layers.items()}
        first = next(iter(recipes.values()))
        bat = first.structure is BlockTiled
        period = None if bat else same({n: r.options.get("period") for n, r in recipes.items()}, "mini_r")
        return {
            "r": same({n: r.options["block" if bat else "rank"] for n, r in recipes.items()}, "rank"),
            "mini_r": period or 1,
            "init_weights": "bat" if bat else "mini" if period else True,
            "miss_dropout": first.dropout,
            "bias": "none",
        }

    def theirs(self, own: Mapping[str, Tensor], layer: Layer) -> dict[str, Tensor]:
        (tensor,) = own.values()
        return {"miss_block": tensor}

    def ours(self, columns: Mapping[str, Tensor], recipe: Recipe, where: str) -> dict[str, Tensor]:
        key = "B" if recipe.structure is BlockTiled else "M" if "period" in recipe.options else "D"
        return {f"structure.{key}": t for t in columns.values()}

    def entry(self, fields: Fields, layer: str, columns: Mapping[str, Tensor]) -> LayerEntry:
        rank = fields.whole("r", 64, "rank", layer)
        form = fields.get("init_weights", True)
        if form not in (True, False, "bat", "mini"):
            raise FileFormatError(f"{fields.where}: init_weights = {form!r} is no form of MiSS that slimtune knows")
        if form == "bat":
            return LayerEntry(bone(rank, "bat"), 1.0)
        dropout = fields.get("miss_dropout", 0.0)
        if form == "mini":
            return LayerEntry(bone(rank, "mini", fields.whole("mini_r", 1, "mini_r", layer), dropout), 1.0)
        return LayerEntry(bone(rank, dropout=dropout), 1.0)

    def converted(self, entry: LayerEntry, own: dict[str, Tensor]) -> tuple[LayerEntry, dict[str, Tensor]]:
        recipe = replace(entry.recipe, alpha=1.0, rank_power=0.0)
        if recipe.structure is BlockTiled:
            recipe = replace(recipe, dropout=0.0)
        return replace(entry, recipe=recipe, scale=1.0), {key: entry.scale * t for key, t in own.items()}


class BoneCodec(MissCodec):
    """`BoneConfig`, which PEFT had until 0.18 and no longer reads: MiSS and bat under another name. Read only."""

    peft_type = "BONE"
    columns = ("bone_block",)
    read = frozenset(("r", "init_weights", "bias"))

    def claims(self, recipe: Recipe) -> bool:
        return False

    def entry(self, fields: Fields, layer: str, columns: Mapping[str, Tensor]) -> LayerEntry:
        if fields.get("init_weights") == "mini":
            raise FileFormatError(f"{fields.where}: init_weights = 'mini' is no form of Bone")
        return super().entry(fields, layer, columns)


def _check(name: str, layer: Layer) -> None:
    module, (recipe, scale) = layer.module, (layer.entry.recipe, layer.entry.scale)
    if not isinstance(module, nn.Linear):
        raise Unfit(f"it has Linear only, {name} is a {type(module).__name__}")
    if scale != 1:
        raise Unfit(f"it has no scale, that of {name} is {scale:g}")
    O, I = module.out_features, module.in_features
    if recipe.structure is BlockTiled:
        block, side = recipe.options["block"], recipe.options["side"]
        if side != "col" or recipe.composition_options.get("left"):
            raise Unfit("its transformation is the published col form only")
        if recipe.composition_options.get("block", 64) != block:
            raise Unfit(f"the blocks of structure and composition differ in {name}")
        if O % block or I % block:
            raise Unfit(f"blocks of {block} do not divide {O} x {I} ({name})")
        if recipe.dropout:
            raise Unfit("its bat form ignores dropout")
        return
    rank, period = recipe.options["rank"], recipe.options.get("period")
    if rank > I:
        raise Unfit(f"rank {rank} exceeds the {I} inputs of {name}")
    if period and O % period:
        raise Unfit(f"period {period} does not divide the {O} outputs of {name}")
