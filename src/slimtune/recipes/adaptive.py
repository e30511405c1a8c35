"""Methods that move ranks between layers while they train."""

from __future__ import annotations

from typing import Any

from ..controllers import AdaLoRA, ElaLoRA, Orthogonality
from ..controllers.allocator import ANY_LENGTH
from ..errors import StructureError
from ..recipe import Recipe
from ..structures import LowRank
from ..structures.base import check_count

__all__ = ["adalora", "elalora"]


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
    masked: bool | None = None,
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
        masked: keep shapes as they are until training ends, for torch.compile; None where several processes train.

    Raises:
        StructureError: a rank that is not a whole number of at least 1, an initial_rank below it, an alpha that is 0 or
            not finite, an option outside the range that `AdaLoRA` and `Orthogonality` give.
    """
    check_count(rank, "adalora: rank")
    start = -(-3 * rank // 2) if initial_rank is None else initial_rank
    check_count(start, "adalora: initial_rank", rank)
    schedule: dict[str, Any] = {"target": rank, "t_init": t_init, "t_final": t_final, "delta_t": delta_t}
    schedule |= {"regrow": regrow, "unit": unit, "floor": floor, "ceiling": ceiling, "masked": masked}
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
        learning_rate=1e-2,
    )


def elalora(
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    orthogonality: float = 0.1,
    rule: str = "improved",
    k: int = 2,
    b: int = 4,
    warmup: float = 0.15,
    final: float = 0.25,
    interval: float = 0.03,
    schedule: bool = True,
    floor: int = 1,
    ceiling: int | None = None,
) -> Recipe:
    """W + (alpha / R) B diag(e) A, whose ranks move between layers while it trains, R on average.

    ElaLoRA, Chang et al. 2025, arXiv 2504.00254, its code's rule or an improved one of our own (see `ElaLoRA`), on the
    form of AdaLoRA, arXiv 2303.10512, eqs. 3 and 4. The scale stays that of the start. In a loop of your own, connect
    its controllers: `for c in st.controllers_of(recipe, total_steps): st.attach(c, model, optimizer)`.

    Under DDP and FSDP2, where shapes must not change, give a ceiling: every layer then has that many slots, of which R
    hold a rank at the start. Otherwise the slots that hold none are taken away at the first step.

    Args:
        rank: R, that of every layer at the start.
        alpha: numerator of the scale; 2 R when None.
        dropout: of the adapter's input, while training; rounded to 1/256.
        orthogonality: coefficient of the penalty on A A^T - I and B^T B - I (see `Orthogonality`); 0 for none.
        rule: improved or published.
        k: how many ranks a layer gives or gets in one round, at most.
        b: how many ranks come in one round, at most, at first.
        warmup: steps before the first interval, or a share of all (a number that is not whole).
        final: steps after the last round, likewise.
        interval: steps between two rounds, likewise.
        schedule: whether the number of ranks that move falls from b to 0.
        floor: ranks that every layer keeps.
        ceiling: ranks that a layer has at most; None for no limit but its size.

    Raises:
        StructureError: a rank that is not a whole number of at least 1, a ceiling below it or a floor above it, an
            alpha that is 0 or not finite, an option outside the range that `ElaLoRA` and `Orthogonality` give.
    """
    check_count(rank, "elalora: rank")
    options: dict[str, Any] = {"rule": rule, "k": k, "b": b, "warmup": warmup, "final": final, "interval": interval}
    options |= {"schedule": schedule, "floor": floor}
    if ceiling is not None:
        check_count(ceiling, "elalora: ceiling", rank)
        options |= {"ceiling": ceiling, "start": rank}
    check_count(floor, "elalora: floor")
    if floor > rank:
        raise StructureError(f"elalora: floor {floor} is above the rank, {rank}, so that no layer could give any")
    ElaLoRA(total_steps=ANY_LENGTH, **options)  # refuses bad values before a model is loaded
    Orthogonality(orthogonality)
    penalty: dict[str, Any] = {"Orthogonality": {"coefficient": orthogonality}} if orthogonality else {}
    slots = ceiling or rank
    numerator = 2 * rank if alpha is None else alpha
    return Recipe(
        LowRank,
        {"rank": slots, "core": True},
        alpha=numerator if ceiling is None else numerator * slots / rank,
        rank_power=1.0,
        dropout=dropout,
        controllers=penalty | {"ElaLoRA": options},
        name="elalora",
        learning_rate=1e-2,
    )
