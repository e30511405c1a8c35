"""Methods that train a diagonal between frozen factors of the weight."""

from __future__ import annotations

from ..errors import StructureError
from ..recipe import Recipe, is_number
from ..structures import LDU
from ..structures.base import check_count

__all__ = ["loldu"]


def loldu(
    rank: int = 64,
    alpha: float | None = None,
    dropout: float = 0.0,
    unit: bool = True,
    start: str = "lu",
    train_scale: bool = True,
) -> Recipe:
    """W + (alpha / R) P L diag(sigma z - z0) U with W = P L diag(D) U, the first R columns of L and rows of U.

    LoLDU, Shi et al. 2024, arXiv 2410.13618. W stays as it is; trained are z and sigma, R + 1 numbers per
    layer. So few want a learning rate a hundred times LoRA's. Quality grows with R up to the whole of min(O, I), and
    so does the time of a step: R = 16 adds less to it than LoRA of that rank does, R = 64 about three times as much.

    Args:
        rank: R, at most; a layer has no more than min(O, I).
        alpha: numerator of the scale; R when None, as in the paper.
        dropout: of the adapter's input, while training; rounded to 1/256.
        unit: directions of norm 1, which one learning rate fits; false for the factors as published.
        start: z0: lu, uniform, normal, constant, ones or zeros (see `LDU`).
        train_scale: train sigma too.

    Raises:
        StructureError: a rank that is not a whole number of at least 1, an alpha that is 0 or not finite; an unknown
            start when attached.
    """
    check_count(rank, "loldu: rank")
    if alpha is not None and not is_number(alpha):
        raise StructureError(f"loldu: alpha must be a number, got {alpha!r}")
    return Recipe(
        LDU,
        {"rank": rank, "unit": unit, "start": start, "train_scale": train_scale},
        alpha=1.0 if alpha is None else alpha / rank,
        dropout=dropout,
        name="loldu",
        learning_rate=5e-2,
    )
