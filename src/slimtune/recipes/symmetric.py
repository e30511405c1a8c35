"""Methods whose change is a symmetric matrix."""

from __future__ import annotations

from typing import Any

from ..controllers import Ramp
from ..recipe import Recipe
from ..structures import Symmetric
from ..structures.base import check_count

__all__ = ["singlora"]


def singlora(
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    form: str = "plain",
    init: str = "size",
    ramp_share: float = 0.01,
    ramp_steps: int | None = None,
) -> Recipe:
    """W + (alpha / R) min(t / T, 1) A A^T with one thin A, its first rows serving the shorter side.

    SingLoRA, Bensaid et al. 2025, arXiv 2507.05566, eq. 8 and section 4.4. The base is unchanged until training begins;
    t counts optimizer steps, from 1. In a loop of your own, connect the ramp:
    `for c in st.controllers_of(recipe, total_steps): st.attach(c, model, optimizer)`.

    Args:
        rank: R.
        alpha: numerator of the scale; R when None.
        dropout: of the adapter's input, while training; rounded to 1/256.
        form: plain (published), or one that needs no ramp: centred, signed or core (see `Symmetric`).
        init: bound of the start, size for 1 / sqrt(max(O, I)) or rank for 1 / sqrt(R) as in public code.
        ramp_share: T as a share of all optimizer steps.
        ramp_steps: T itself, instead of the share.

    Raises:
        StructureError: a rank or ramp_steps that is not a whole number of at least 1, a ramp_share outside (0, 1], an
            alpha that is 0 or not finite; when attached, an unknown form or init.
    """
    check_count(rank, "singlora: rank")
    ramp: dict[str, Any] = {"share": ramp_share} if ramp_steps is None else {"steps": ramp_steps}
    Ramp(total_steps=1, **ramp)  # refuses bad values before a model is loaded
    return Recipe(
        Symmetric,
        {"rank": rank, "form": form, "init": init},
        alpha=rank if alpha is None else alpha,
        rank_power=1.0,
        dropout=dropout,
        controllers={"Ramp": ramp} if form == "plain" else {},
        start_scale=0.0 if form == "plain" else 1.0,
        name="singlora",
        learning_rate=3e-3,
    )
