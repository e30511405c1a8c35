"""Methods that say the change of a weight block by block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..compositions import BlockAffine
from ..errors import StructureError
from ..recipe import Recipe
from ..structures import BlockLowRank, BlockTiled, Sum, Tiled
from ..structures.base import check_count
from .patterns import pattern_overrides

__all__ = ["bone", "gralora"]


def gralora(
    rank: int = 32,
    alpha: float | None = None,
    k: int | None = None,
    hybrid_rank: int = 0,
    dropout: float = 0.0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> Recipe:
    """W + (alpha / (R + H)) (dW + B A), dW in k x k blocks of rank R / k each, B A of rank H.

    GraLoRA, Jung et al. 2025, arXiv 2505.20355; with `hybrid_rank` Hybrid GraLoRA. R (O + I) parameters as
    LoRA's, rank up to k R. R leaves the hybrid part out, as PEFT's `r` does (the paper's r is R + H), and one scale
    serves both parts, one dropout mask too.

    Args:
        rank: R.
        alpha: numerator of the scale; 2 (R + H) when None (also for layers with a rank of their own).
        k: blocks per side, a divisor of O, I and R; chosen for each layer when None (see `BlockLowRank`).
        hybrid_rank: H, the rank of a plain low-rank part beside; the paper advises up to half of R + H, for 16 or less.
        dropout: of the adapter's input, while training; rounded to 1/256.
        rank_pattern: ranks of some layers, {name, suffix or glob: R}.
        alpha_pattern: alphas of some layers, likewise.

    Raises:
        StructureError: a rank that is not a whole number of at least 1, a hybrid_rank below 0, an alpha that is 0 or
            not finite, a pattern table that is not a mapping; when attached, a k that does not divide a layer's sizes.
    """
    check_count(hybrid_rank, "gralora: hybrid_rank", 0)

    def options(rank: int) -> dict[str, Any]:
        own = {"rank": rank, "blocks": k}
        if not hybrid_rank:
            return own
        return {"parts": [{"structure": "BlockLowRank", **own}, {"structure": "LowRank", "rank": hybrid_rank}]}

    check_count(rank, "gralora: rank")
    follows = (lambda r: 2 * (r + hybrid_rank)) if alpha is None else None
    return Recipe(
        Sum if hybrid_rank else BlockLowRank,
        options(rank),
        alpha=2 * (rank + hybrid_rank) if alpha is None else alpha,
        rank_power=1.0,
        dropout=dropout,
        overrides=pattern_overrides("gralora", rank_pattern, alpha_pattern, options, follows),
        name="gralora",
        learning_rate=5e-4,
    )


FORMS = ("miss", "mini", "bat", "row", "left")


def bone(rank: int = 64, form: str = "miss", mini_rank: int = 1, dropout: float = 0.0) -> Recipe:
    """W + dW with dW[o, i] = D[i mod R, o] ("miss"), or W'_ac = W_ac (1 + B_a) + B_a for R x R blocks ("bat").

    Bone, Kang & Yin 2024, arXiv 2409.15371. "miss" and "mini" are the block-affine *adaptation* of its later versions
    (now MiSS, the efficient form of eq. 3), "bat" and "row" the block-affine *transformation* of its first. There is no
    alpha: D and B are entries of the weight's change themselves, so that a step of AdamW moves dW as far as it moves
    a weight in full training.

    Args:
        rank: R, the block size. It need not divide the layer's sizes.
        form: "miss"; "mini", dW[o, i] = M[i mod R, o mod q]; "bat", one block for each R outputs (published as col);
            "row", W'_ac = W_ac (1 + B_c) + B_c, one block for each R inputs and much cheaper where R divides O;
            "left", W'_ac = (1 + B_a) W_ac + B_a, cheap where R divides I.
        mini_rank: q of "mini", at most the number of outputs.
        dropout: of the input of the change, while training; rounded to 1/256. The published code ignores it for "bat".

    Raises:
        StructureError: an unknown form, or a rank that is not a whole number of at least 1.
    """
    if form not in FORMS:
        raise StructureError(f"bone: form must be one of {', '.join(FORMS)}, got {form!r}")
    check_count(rank, "bone: rank")
    rate = 1e-3 if form == "mini" else 1e-4  # one number of mini stands for far more of dW, which moves in step
    common: dict[str, Any] = {"dropout": dropout, "name": "bone", "learning_rate": rate}
    if form == "mini":
        check_count(mini_rank, "bone: mini_rank")
    if form in ("miss", "mini"):
        return Recipe(Tiled, {"rank": rank} | ({"period": mini_rank} if form == "mini" else {}), **common)
    side = {"block": rank, "side": "row" if form == "row" else "col"}
    return Recipe(BlockTiled, side, BlockAffine, {"block": rank, "left": form == "left"}, **common)
