"""Low-rank changes whose rows and columns both carry a trained magnitude."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..compositions import BiMagnitude
from ..recipe import Recipe
from .lowrank import lora

__all__ = ["bora"]


def bora(
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rank_dropout: float = 0.0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    detach: bool = True,
) -> Recipe:
    """H diag(m_column / |H|_column) with H = diag(m_row / |V|_row) V, V = W + (alpha / R) B A, and m_row, m_column
    trained from |W|_row and |W|_column.

    BoRA, Wang et al. 2024, arXiv 2412.06441. Our reading: the paper's equations were seen only in a port, which
    normalises rows first and holds both norms constant in the gradient; see `BiMagnitude`. No published number could
    be checked. The change has full rank, so it cannot be written as a LoRA file. Any other structure takes these
    magnitudes too: `Recipe(structure, options, BiMagnitude)`.

    Args:
        rank: R.
        alpha: numerator of the scale; 2 R when None (also for layers with a rank of their own).
        dropout: of the input of B A alone, while training; W keeps the whole input, both between the magnitudes of
            the undropped V. Rounded to 1/256.
        rank_dropout: of the (T, R) product instead; much cheaper.
        rank_pattern: ranks of some layers, {name, suffix or glob: R}.
        alpha_pattern: alphas of some layers, likewise.
        detach: hold both norms constant in the gradient. False gives the exact gradient.

    Example:
        >>> bora(rank=4).composition.__name__
        'BiMagnitude'
    """
    plain = lora(rank, alpha, dropout, rank_dropout, rank_pattern, alpha_pattern)
    options = {} if detach is True else {"detach": detach}
    return replace(plain, composition=BiMagnitude, composition_options=options, name="bora")
