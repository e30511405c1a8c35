"""LoRA whose factors follow the gradient of their product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..controllers import LoRAPro
from ..recipe import Recipe
from .lowrank import lora

__all__ = ["lorapro"]


def lorapro(
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    form: str = "factors",
    X: str = "sylvester",
    damping: float = 1e-6,
    cap: float | None = 0.2,
    retract: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> Recipe:
    """W + (alpha / R) B A with thin B and A that step where the gradient of W points, as far as they can.

    LoRA-Pro, Wang et al. 2024, arXiv 2407.18242, theorems 2.1 to 2.3. The adapter is LoRA's; its optimizer is not. In a
    loop of your own, connect it: `for c in st.controllers_of(recipe, total_steps): st.attach(c, model, optimizer)`.

    Args:
        rank: R.
        alpha: numerator of the scale; 2 R when None (also for layers with a rank of their own).
        dropout: of the adapter's input, while training; rounded to 1/256.
        form: "factors", the authors' efficient form; "full", their AdamW with two (O, I) moments per layer; or "lean",
            ours, with thin ones (see `LoRAPro`). The learning rate of the last two is in units of W, as for full
            fine-tuning; that of the first wants to be larger than LoRA's.
        X: "sylvester", "zero" or "symmetric".
        damping: of the factors' Gram matrices, in units of their mean eigenvalue.
        cap: the longest step as a share of the larger factor, or None.
        retract: leave out the product of the two steps; not for "factors" with momentum.
        rank_pattern: ranks of some layers, {name, suffix or glob: R}.
        alpha_pattern: alphas of some layers, likewise.

    Raises:
        StructureError: as `lora` and `LoRAPro`.
    """
    options: dict[str, Any] = {"form": form, "X": X, "damping": damping, "cap": cap, "retract": retract}
    LoRAPro(**options)  # refuses bad values before a model is loaded
    plain = lora(rank, alpha, dropout, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    rate = 2 * plain.learning_rate if form == "factors" else 2e-4
    return replace(plain, controllers={"LoRAPro": options}, name="lorapro", learning_rate=rate)
