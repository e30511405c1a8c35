"""C3A on Linear."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..compositions import Additive
from ..errors import FileFormatError
from ..io import LayerEntry
from ..recipe import Recipe
from ..recipes import c3a
from ..structures import BlockCirculant
from .codec import Codec, Fields, Layer, Unfit

__all__ = ["C3ACodec"]


class C3ACodec(Codec):
    """`C3AConfig`: the kernel divided by the number of inputs (normalization "published"), blocks that divide both
    sides, no alpha, no dropout.

    Parameters and outputs are PEFT's. Two things differ, for they are PEFT's mistakes: the gradient in the layer's
    input, which PEFT reflects, and several active adapters, of which PEFT feeds the second the first one's output.
    """

    peft_type = "C3A"
    columns = ("c3a_kernel",)
    read = frozenset(("block_size", "block_size_pattern", "bias"))
    harmless = frozenset(("init_weights",))

    def claims(self, recipe: Recipe) -> bool:
        return recipe.structure is BlockCirculant and recipe.composition is Additive

    def config(self, layers: Mapping[str, Layer]) -> dict[str, Any]:
        for name, layer in layers.items():
            _check(name, layer)
        blocks = {name: layer.entry.recipe.options["block"] for name, layer in layers.items()}
        for default, _ in Counter(blocks.values()).most_common():
            # the file's keys are sorted
            pattern = {name: block for name, block in sorted(blocks.items()) if block != default}
            if all(map(_is_plain, pattern)) and all(_looked_up(pattern, n, default) == b for n, b in blocks.items()):
                return {"block_size": default, "block_size_pattern": pattern, "init_weights": True, "bias": "none"}
        raise Unfit("its block_size_pattern takes names for suffixes and cannot tell these layers apart")

    def theirs(self, own: Mapping[str, Tensor], layer: Layer) -> dict[str, Tensor]:
        return {"c3a_kernel": own["structure.kernel"]}

    def ours(self, columns: Mapping[str, Tensor], recipe: Recipe, where: str) -> dict[str, Tensor]:
        return {"structure.kernel": columns["c3a_kernel"]}

    def entry(self, fields: Fields, layer: str, columns: Mapping[str, Tensor]) -> LayerEntry:
        # not by block_size_pattern: any regular expression may stand there
        kernel = columns["c3a_kernel"]
        if kernel.dim() != 3:
            raise FileFormatError(
                f"{fields.where}: c3a_kernel of {layer} must have 3 dimensions, got {tuple(kernel.shape)}"
            )
        return LayerEntry(c3a(kernel.shape[2], "published"), 1.0)

    def converted(self, entry: LayerEntry, own: dict[str, Tensor]) -> tuple[LayerEntry, dict[str, Tensor]]:
        kernel, recipe = own["structure.kernel"], entry.recipe
        ratio = entry.scale
        if recipe.options.get("normalization", "unit") == "unit":
            ratio *= kernel.shape[1] * kernel.shape[2]
        published = c3a(recipe.options["block"], "published")
        return replace(entry, recipe=published, scale=1.0), {"structure.kernel": kernel * ratio}


def _check(name: str, layer: Layer) -> None:
    module, entry = layer.module, layer.entry
    if not isinstance(module, nn.Linear):
        raise Unfit(f"it has Linear only, {name} is a {type(module).__name__}")
    O, I, block = module.out_features, module.in_features, entry.recipe.options["block"]
    if O % block or I % block:
        raise Unfit(f"blocks of {block} do not divide {O} x {I} ({name})")
    if entry.recipe.options["normalization"] != "published" or entry.scale != 1:
        raise Unfit(f"its kernel is divided by the number of inputs, that of {name} is not; export_peft converts it")
    if entry.recipe.dropout:
        raise Unfit("it has no dropout")


def _is_plain(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+", name) is not None


def _looked_up(pattern: Mapping[str, int], name: str, default: int) -> int:
    """PEFT's own look-up: keys are suffixes behind a dot, in the order of the file, or else full names."""
    found = next((key for key in pattern if re.match(rf".*\.{key}$", name)), name)
    return pattern.get(found, default)
