"""Methods whose ranks follow trained gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..controllers import ARD
from ..errors import StructureError
from ..recipe import Recipe
from ..structures import GatedHeads
from ..structures.base import check_count
from .patterns import pattern_overrides

__all__ = ["ardlora"]


def ardlora(
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    heads: int | str | Mapping[str, int | Sequence[Any]] = "auto",
    rows: int | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    penalty: float = 0.1,
    variation: float = 0.1,
    over: str = "time",
    travel: float = 4.0,
    warmup: float = 0.1,
    final: float = 0.2,
    interval: int | None = None,
    slack: int = 2,
    least: int = 1,
    most: int | None = None,
    by_cost: bool = False,
    budget: float | None = None,
    masked: bool | None = None,
) -> Recipe:
    """W_h + (alpha / R0) B_h diag(g_h) A_h for every head h, whose trained alpha_h opens round(R0 alpha_h) ranks.

    ARD-LoRA, Shinwari and Usama 2025, arXiv 2506.18267, in our reading: there is no official code, and the abstract
    names per-head scaling factors, l1 and total variation. Connect the controller in a loop of your own:
    `for c in st.controllers_of(recipe, total_steps): st.attach(c, model, optimizer)`.

    Args:
        rank: R0, ranks per head at the start. On a layer of H heads they cost about H / 2 times LoRA's.
        alpha: numerator of the scale, which stays when ranks change; 2 R0 when None.
        dropout: of the adapter's input, while training; rounded to 1/256.
        heads: "auto", attention's projections by head and any other layer as one; 1 for gates per layer; a number for
            all layers; or {name, suffix or glob: H, or [H, "input"] where the heads are of the inputs}, and "auto" for
            the others.
        rows: ranks each head holds at the start, such as `most` where shapes must stay; R0 when None.
        rank_pattern: R0 of some layers, {name, suffix or glob: R0}.
        penalty: lambda of the l1, see `ARD`, as is all that follows.
        variation: beta.
        over: "time" or "depth".
        travel: how far a gradient that never changes its sign would move alpha; noisy ones move it a tenth of that.
        warmup: steps or share of steps with alpha at rest.
        final: likewise, at the end.
        interval: steps between two changes of ranks.
        slack: closed ranks held for a gate to open.
        least: ranks a head keeps.
        most: ranks a head may have; 2 R0 when None.
        by_cost: weigh the l1 by what a rank costs.
        budget: the most parameters that A and B may have in the end; not a whole number, a multiple of those at the
            start (1.0: as many).
        masked: keep all shapes until training ends.

    Raises:
        StructureError: a rank that is not a whole number of at least 1, an alpha that is 0 or not finite, an option
            that `ARD` does not take; when attached, heads that do not divide a layer.
    """
    check_count(rank, "ardlora: rank")
    control: dict[str, Any] = {
        "penalty": penalty,
        "variation": variation,
        "over": over,
        "travel": travel,
        "warmup": warmup,
        "final": final,
        "interval": interval,
        "slack": slack,
        "least": least,
        "most": most,
        "by_cost": by_cost,
        "budget": budget,
        "masked": masked,
    }
    ARD(total_steps=1, **control)  # refuses bad values before a model is loaded
    if most is None and least > 2 * rank:
        raise StructureError(f"ardlora: least {least} is above most, 2 R0 = {2 * rank} by default")
    follows = (lambda r: 2.0) if alpha is None else (lambda r: alpha / r)
    overrides = pattern_overrides("ardlora", rank_pattern, None, lambda r: {"rank": r}, follows)
    options: dict[str, Any] = {"rank": rank, "heads": heads if isinstance(heads, (int, str)) else "auto"}
    if not isinstance(heads, (int, str)):
        for pattern, own in _heads(heads).items():
            overrides[pattern] = overrides.get(pattern, {}) | own
    return Recipe(
        GatedHeads,
        options if rows is None else options | {"rows": rows},
        alpha=follows(rank),
        dropout=dropout,
        overrides=overrides,
        controllers={"ARD": control},
        name="ardlora",
        learning_rate=5e-4,
    )


def _heads(table: object) -> dict[str, dict[str, Any]]:
    if not isinstance(table, Mapping):
        raise StructureError(f"ardlora: heads must be 'auto', a number or a table {{name: number}}, got {table!r}")
    found = {}
    for pattern, value in table.items():
        pair = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
        count, side = value if pair else (value, "auto")
        check_count(count, f"ardlora: heads of {pattern!r}")
        found[pattern] = {"heads": count, "side": side}
    return found
