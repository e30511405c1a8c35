"""Methods that move ranks between layers while they train."""

from __future__ import annotations

from typing import Any

from ..controllers import AdaLoRA, Orthogonality
from ..recipe import Recipe
from ..structures import LowRank
from ..structures.base import check_count

__all__ = ["adalora"]

ANY_LENGTH = 10**9
"""Steps of a run that is not known yet: enough for any schedule given in steps."""


def adalora(
    rank: int = 8,
    initial_rank: int | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    orthogonality: float = 0.1,
    t_init: float = 0.1,
    t_final: float = 0.5,
    delta_t: float = 10,
    regrow: bool = True,
    unit: str = "ranks",
    floor: int = 1,
    ceiling: int | None = None,
) -> Recipe:
    """W + (alpha / R0) B diag(e) A, whose ranks are pruned from R0 to R on average while it trains.

    AdaLoRA, Zhang et al. 2023, arXiv 2303.10512, eqs. 3 and 4 and algorithm 1. The scale stays that of the start. In a
    loop of your own, connect its controllers:
    `for c in st.controllers_of(recipe, total_steps): st.attach(c, model, optimizer)`.

    Args:
        rank: R, the average rank of a layer in the end.
        initial_rank: R0, that of every layer at the start; 1.5 R, rounded up, when None.
        alpha: numerator of the scale; 2 R0 when None.
        dropout: of the adapter's input, while training; rounded to 1/256.
        orthogonality: coefficient of the penalty on A A^T - I and B^T B - I (see `Orthogonality`); 0 for none.
        t_init: steps before the first pruning, or a share of all (a number that is not whole).
        t_final: steps after the last pruning, likewise.
        delta_t: steps between two prunings, likewise.
        regrow: whether ranks pruned before the last time may come back, as published (see `AdaLoRA`).
        unit: what the budget counts, "ranks" or "parameters".
        floor: ranks that every layer keeps.
        ceiling: ranks that a layer has at most in the end; None for no limit.

    Raises:
        StructureError: a rank that is not a whole number of at least 1, an initial_rank below it, an alpha that is 0 or
            not finite, an option outside the range that `AdaLoRA` and `Orthogonality` give.
    """
    check_count(rank, "adalora: rank")
    start = -(-3 * rank // 2) if initial_rank is None else initial_rank
    check_count(start, "adalora: initial_rank", rank)
    schedule: dict[str, Any] = {"target": rank, "t_init": t_init, "t_final": t_final, "delta_t": delta_t}
    schedule |= {"regrow": regrow, "unit": unit, "floor": floor, "ceiling": ceiling}
    AdaLoRA(total_steps=ANY_LENGTH, **schedule)  # refuses bad values before a model is loaded
    Orthogonality(orthogonality)
    penalty: dict[str, Any] = {"Orthogonality": {"coefficient": orthogonality}} if orthogonality else {}
    return Recipe(
        LowRank,
        {"rank": start, "core": True},
        alpha=2 * start if alpha is None else alpha,
        rank_power=1.0,
        dropout=dropout,
        controllers=penalty | {"AdaLoRA": schedule},
        name="adalora",
        learning_rate=1e-3,
    )
