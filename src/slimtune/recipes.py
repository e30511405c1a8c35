"""Layer 4: published methods, one function each. A recipe names its parts and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .compositions import Additive, Composition, Magnitude
from .recipe import Recipe
from .structures import LowRank

__all__ = ["RECIPES", "dora", "lora", "rslora"]


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
    """
    return _low_rank("lora", Additive, {}, rank, alpha, 1.0, dropout, rank_dropout, rank_pattern, alpha_pattern, 5e-4)


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
    return _low_rank("rslora", Additive, {}, rank, alpha, 0.5, dropout, rank_dropout, rank_pattern, alpha_pattern, 2e-4)


def dora(
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rank_dropout: float = 0.0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    detach: bool = True,
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
    """
    options = {} if detach else {"detach": False}
    return _low_rank(
        "dora", Magnitude, options, rank, alpha, 1.0, dropout, rank_dropout, rank_pattern, alpha_pattern, 5e-4
    )


def _low_rank(
    name: str,
    composition: type[Composition],
    composition_options: Mapping[str, object],
    rank: int,
    alpha: float | None,
    rank_power: float,
    dropout: float,
    rank_dropout: float,
    rank_pattern: Mapping[str, int] | None,
    alpha_pattern: Mapping[str, float] | None,
    learning_rate: float,
) -> Recipe:
    options: dict[str, object] = {"rank": rank}
    if rank_dropout:
        options["rank_dropout"] = rank_dropout
    overrides: dict[str, dict[str, object]] = {}
    for pattern, r in (rank_pattern or {}).items():
        overrides.setdefault(pattern, {})["rank"] = r
        if alpha is None:
            overrides[pattern]["alpha"] = 2.0 * r
    for pattern, a in (alpha_pattern or {}).items():
        overrides.setdefault(pattern, {})["alpha"] = float(a)
    return Recipe(
        LowRank,
        options,
        composition,
        composition_options,
        alpha=2.0 * rank if alpha is None else float(alpha),
        rank_power=rank_power,
        dropout=dropout,
        overrides=overrides,
        name=name,
        learning_rate=learning_rate,
    )


RECIPES: dict[str, Callable[..., Recipe]] = {f.__name__: f for f in (dora, lora, rslora)}
