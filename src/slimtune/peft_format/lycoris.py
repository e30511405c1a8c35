"""LoHa and LoKr on Linear, Conv1d and Conv2d."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from ..compositions import Additive
from ..errors import FileFormatError
from ..io import LayerEntry
from ..ops.products import factor_pair
from ..recipe import Recipe
from ..recipes import loha, lokr
from ..structures import Hadamard, Kronecker, Structure
from .codec import Codec, Fields, Layer, Unfit, common, tidy
from .names import pattern_table

__all__ = ["LohaCodec", "LokrCodec"]


class LycorisCodec(Codec):
    """What both share. They drop rows of dW (`rank_dropout`) or the whole change (`module_dropout`) while training,
    which slimtune does not: read, such an adapter is trained on without, and a warning says so. Inputs they do not
    drop.
    """

    structure: ClassVar[type[Structure]]
    prefix: ClassVar[str]
    read = frozenset(("r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout"))
    harmless = frozenset(("init_weights", "use_effective_conv2d"))

    def claims(self, recipe: Recipe) -> bool:
        return recipe.structure is self.structure and recipe.composition is Additive

    def config(self, layers: Mapping[str, Layer]) -> dict[str, Any]:
        for name, layer in layers.items():
            _check(name, layer)
        ranks = {name: layer.entry.recipe.options["rank"] for name, layer in layers.items()}
        alphas = {name: tidy(layer.entry.scale * ranks[name]) for name, layer in layers.items()}
        rank, alpha = common(ranks.values()), common(alphas.values())
        return {
            "r": rank,
            "alpha": alpha,
            "rank_pattern": pattern_table(ranks, rank),
            "alpha_pattern": pattern_table(alphas, alpha),
            "init_weights": True,
        }

    def theirs(self, own: Mapping[str, Tensor], layer: Layer) -> dict[str, Tensor]:
        return {key.replace("structure.", self.prefix): t for key, t in own.items()}

    def ours(self, columns: Mapping[str, Tensor], recipe: Recipe, where: str) -> dict[str, Tensor]:
        for column, t in columns.items():
            if column in (f"{self.prefix}t1", f"{self.prefix}t2"):
                raise FileFormatError(f"{where}.{column}: slimtune has no such product over a convolution's kernel")
            if t.dim() == 3:
                raise FileFormatError(f"{where}.{column}: PEFT takes no Kronecker product of this Conv1d's kernel")
        return {
            column.replace(self.prefix, "structure."): t.flatten(1) if t.dim() > 2 else t
            for column, t in columns.items()
        }

    def check(self, fields: Fields) -> None:
        for key in ("rank_dropout", "module_dropout"):
            if fields.get(key):
                warnings.warn(f"{fields.where}: {key} = {fields.get(key)}: slimtune trains on without it", stacklevel=2)

    def converted(self, entry: LayerEntry, own: dict[str, Tensor]) -> tuple[LayerEntry, dict[str, Tensor]]:
        return replace(entry, recipe=replace(entry.recipe, dropout=0.0)), own

    def _numbers(self, fields: Fields, layer: str) -> tuple[int, float]:
        rank = fields.whole("r", 8, "rank", layer, "rank_pattern")
        return rank, fields.number("alpha", 8, "alpha", layer, "alpha_pattern")


class LohaCodec(LycorisCodec):
    """`LoHaConfig`, both products of one rank. Its t1 and t2 (`use_effective_conv2d`) are refused."""

    peft_type = "LOHA"
    structure = Hadamard
    prefix = "hada_"
    columns = tuple(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))

    def config(self, layers: Mapping[str, Layer]) -> dict[str, Any]:
        for name, layer in layers.items():
            options = layer.entry.recipe.options
            if options.get("second_rank", options["rank"]) != options["rank"]:
                raise Unfit(f"both products have one rank, in {name} they have two")
        return super().config(layers)

    def entry(self, fields: Fields, layer: str, columns: Mapping[str, Tensor]) -> LayerEntry:
        rank, alpha = self._numbers(fields, layer)
        return LayerEntry(loha(rank, alpha), alpha / rank)


class LokrCodec(LycorisCodec):
    """`LoKrConfig`: sizes that its factor (-1 or a number, one for all layers) gives, of a convolution's channels.

    The product of w1 and a whole w2 of a Conv1d is refused: PEFT pads w1's shape on the wrong side there.
    """

    peft_type = "LOKR"
    structure = Kronecker
    prefix = "lokr_"
    columns = tuple(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))
    harmless = LycorisCodec.harmless | {"decompose_both", "decompose_factor", "rank_dropout_scale"}

    def config(self, layers: Mapping[str, Layer]) -> dict[str, Any]:
        fields = super().config(layers)
        shapes = [_Shape(name, layer) for name, layer in layers.items()]
        both = [flag for flag in (False, True) if all(shape.splits(flag) for shape in shapes)]
        factors = sorted({-1, *(n for shape in shapes for n in shape.left)})
        fitting = [f for f in factors if all(shape.factored(f) for shape in shapes)]
        if not both or not fitting:
            raise Unfit("it chooses the shapes of w1 and w2 for itself, and they are not these")
        return fields | {"decompose_both": both[0], "decompose_factor": fitting[0]}

    def theirs(self, own: Mapping[str, Tensor], layer: Layer) -> dict[str, Tensor]:
        found = super().theirs(own, layer)
        if "lokr_w2" in found and isinstance(layer.module, nn.Conv2d):
            kernel = layer.module.kernel_size
            found["lokr_w2"] = found["lokr_w2"].unflatten(1, (-1, *kernel))
        return found

    def entry(self, fields: Fields, layer: str, columns: Mapping[str, Tensor]) -> LayerEntry:
        rank, alpha = self._numbers(fields, layer)
        left = [_size(columns, "lokr_w1", side, f"{fields.where}: {layer}") for side in (0, 1)]
        split = [name for name, half in (("left", "lokr_w1_a"), ("right", "lokr_w2_a")) if half in columns]
        options = {"rank": rank, "left": left, "split": "both" if len(split) == 2 else "".join(split) or "none"}
        return LayerEntry(replace(lokr(rank, alpha), options=options), alpha / rank)


class _Shape:
    """The sizes of one layer's factors, and PEFT's rules for them."""

    def __init__(self, name: str, layer: Layer) -> None:
        module, options = layer.module, layer.entry.recipe.options
        kernel = 1
        if isinstance(module, nn.Linear):
            self.O, self.I = module.out_features, module.in_features
        else:
            self.O, self.I = module.out_channels, module.in_channels // module.groups
            kernel = module.weight[0, 0].numel()
        self.rank, self.split, self.left = options["rank"], options["split"], tuple(options["left"])
        if kernel > 1 and self.I % self.left[1]:
            raise Unfit(f"it splits the channels of {name}, this product the flattened kernel")
        if isinstance(module, nn.Conv1d) and self.split in ("none", "left"):
            raise Unfit(f"its Kronecker product of a Conv1d's kernel ({name}) is another matrix")

    def factored(self, factor: int) -> bool:
        return self.left == (factor_pair(self.O, factor)[0], factor_pair(self.I, factor)[0])

    def splits(self, both: bool) -> bool:
        (a, b), right = self.left, (self.O // self.left[0], self.I // self.left[1])
        left_split = both and self.rank < max(a, b) / 2
        return (left_split, self.rank < max(right) / 2) == (
            self.split in ("left", "both"),
            self.split in ("right", "both"),
        )


def _check(name: str, layer: Layer) -> None:
    module = layer.module
    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        raise Unfit(f"it has Linear, Conv1d and Conv2d only, {name} is a {type(module).__name__}")
    if not isinstance(module, nn.Linear) and module.padding_mode != "zeros":
        raise Unfit(f"it pads with zeros, {name} with padding_mode={module.padding_mode!r}")
    if layer.entry.recipe.dropout:
        raise Unfit("it has no dropout of the input")
    if layer.entry.recipe.options["rank"] is None:
        raise Unfit(f"the product of {name} has no rank")


def _size(columns: Mapping[str, Tensor], name: str, side: int, where: str) -> int:
    """A size of a factor that is whole or a product of two."""
    t = columns.get(name, columns.get(f"{name}_{'ab'[side]}"))
    if t is None or t.dim() < 2:
        raise FileFormatError(f"{where}: {name} or its two halves must be matrices")
    return t.shape[side]
