"""Methods whose change is one product of two thin matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..compositions import ColumnMagnitude, Magnitude
from ..errors import StructureError
from ..recipe import Recipe
from ..structures import LowRank
from ..structures.base import check_count
from .patterns import pattern_overrides

__all__ = ["dora", "lora", "rslora"]


def lora(
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rank_dropout: float = 0.0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> Recipe:
    """W + (alpha / R) B A with thin B and A.

    LoRA, Hu et al. 2021, arXiv 2106.09685, eq. 3.

    Args:
        rank: R.
        alpha: numerator of the scale; 2 R when None (also for layers with a rank of their own).
        dropout: of the adapter's input, while training; rounded to 1/256.
        rank_dropout: of the (T, R) product instead; much cheaper.
        rank_pattern: ranks of some layers, {name, suffix or glob: R}.
        alpha_pattern: alphas of some layers, likewise.

    Raises:
        StructureError: a rank that is not a whole number of at least 1, an alpha that is 0 or not finite, a pattern
            table that is not a mapping.
    """
    check_count(rank, "lora: rank")
    follows = (lambda r: 2 * r) if alpha is None else None
    return Recipe(
        LowRank,
        {"rank": rank, "rank_dropout": rank_dropout} if rank_dropout else {"rank": rank},
        alpha=2 * rank if alpha is None else alpha,
        rank_power=1.0,
        dropout=dropout,
        overrides=pattern_overrides("lora", rank_pattern, alpha_pattern, lambda r: {"rank": r}, follows),
        name="lora",
        learning_rate=5e-4,
    )


def rslora(
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    rank_dropout: float = 0.0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> Recipe:
    """W + (alpha / sqrt(R)) B A: the scale that keeps learning stable as R grows.

    rsLoRA, Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2. alpha does not follow R here: that is the point.

    Args:
        rank: R.
        alpha: numerator of the scale.
        dropout: of the adapter's input, while training; rounded to 1/256.
        rank_dropout: of the (T, R) product instead; much cheaper.
        rank_pattern: ranks of some layers, {name, suffix or glob: R}.
        alpha_pattern: alphas of some layers, likewise.
    """
    plain = lora(rank, alpha, dropout, rank_dropout, rank_pattern, alpha_pattern)
    return replace(plain, rank_power=0.5, name="rslora", learning_rate=2e-4)


def dora(
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rank_dropout: float = 0.0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    detach: bool = True,
    axis: str = "row",
) -> Recipe:
    """diag(m / |V|_row) V with V = W + (alpha / R) B A and m trained from |W|_row.

    DoRA, Liu et al. 2024, arXiv 2402.09353, eq. 5.

    Args:
        rank: R.
        alpha: numerator of the scale; 2 R when None (also for layers with a rank of their own).
        dropout: of the adapter's input, while training; rounded to 1/256.
        rank_dropout: of the (T, R) product instead; much cheaper.
        rank_pattern: ranks of some layers, {name, suffix or glob: R}.
        alpha_pattern: alphas of some layers, likewise.
        detach: hold |V|_row constant in the gradient (section 4.3).
        axis: "row", one magnitude per output feature, as the authors' code and PEFT have it; or "column", one per
            input feature: V diag(m / |V|_column) with m trained from |W|_column.

    Raises:
        StructureError: as `lora`; or another axis.
    """
    if axis not in ("row", "column"):
        raise StructureError(f"dora: axis must be 'row' or 'column', got {axis!r}")
    plain = lora(rank, alpha, dropout, rank_dropout, rank_pattern, alpha_pattern)
    options = {} if detach is True else {"detach": detach}
    composition = Magnitude if axis == "row" else ColumnMagnitude
    return replace(plain, composition=composition, composition_options=options, name="dora")
