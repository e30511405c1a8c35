"""Methods whose change is a Kronecker, Hadamard or Khatri-Rao product."""

from __future__ import annotations

from ..errors import StructureError
from ..recipe import Recipe
from ..structures import Hadamard, KhatriRao, Kronecker
from ..structures.base import check_count

__all__ = ["kronecker", "loha", "lokh", "lokr"]


def kronecker(rank: int | None = None, alpha: float = 1.0, dropout: float = 0.0) -> Recipe:
    """W + (alpha / R) B (x) A with B (O / R, R) and A (R, I / R): O + I numbers whatever R is.

    SURM, Sehanobish et al. 2024, arXiv 2406.17740, its Kronecker adapter. rank(dW) = R^2 where R <= sqrt(O), sqrt(I).

    Args:
        rank: R, a common divisor of every layer's O and I; None takes the one that gives dW the highest rank, layer
            by layer. Where O and I have no common divisor that is 1; `lokr` has no such limit.
        alpha: numerator of the scale.
        dropout: of the adapter's input, while training; rounded to 1/256.

    Raises:
        StructureError: a rank that is not a whole number of at least 1, an alpha that is 0 or not finite; when
            attached, options that a layer's sizes cannot take.
    """
    if rank is not None:
        check_count(rank, "kronecker: rank")
    return Recipe(
        Kronecker,
        {"rank": rank},
        alpha=alpha,
        rank_power=1.0,
        dropout=dropout,
        name="kronecker",
        learning_rate=3e-2,
    )


def lokr(
    rank: int = 8,
    alpha: float | None = None,
    factor: int = -1,
    decompose_both: bool = False,
    dropout: float = 0.0,
) -> Recipe:
    """W + (alpha / R) w1 (x) w2 with w1 (a, b) and w2 (c, d), O = a c, I = b d, as square as divisors allow.

    LoKr in LyCORIS, Yeh et al. 2023, arXiv 2309.14859, section 3.2. w2 is a product of two of rank R where
    R < max(c, d) / 2. rank(dW) = rank(w1) rank(w2), often all of it; at 512 x 512 there are 16 x 16 + 32 x 32 numbers.

    Args:
        rank: R.
        alpha: numerator of the scale; R when None.
        factor: a and b where it divides, else their upper bound; -1 for the largest divisors up to the square root.
        decompose_both: also split w1, where R < max(a, b) / 2.
        dropout: of the adapter's input, while training; rounded to 1/256.

    Raises:
        StructureError: a rank that is not a whole number of at least 1, an alpha that is 0 or not finite; when
            attached, options that a layer's sizes cannot take.
    """
    check_count(rank, "lokr: rank")
    if not isinstance(decompose_both, bool):
        raise StructureError(f"lokr: decompose_both must be true or false, got {decompose_both!r}")
    return Recipe(
        Kronecker,
        {"rank": rank, "factor": factor, "split": "auto-both" if decompose_both else "auto"},
        alpha=rank if alpha is None else alpha,
        rank_power=1.0,
        dropout=dropout,
        name="lokr",
        learning_rate=1e-2,
    )


def loha(rank: int = 8, alpha: float | None = None, dropout: float = 0.0) -> Recipe:
    """W + (alpha / R) (w1_a w1_b) * (w2_a w2_b), the entrywise product of two low-rank matrices.

    LoHa in LyCORIS, Yeh et al. 2023, arXiv 2309.14859, section 3.1, after FedPara, Hyeon-Woo et al. 2021,
    arXiv 2108.06098. rank(dW) <= R^2 with 2 R (O + I) parameters.

    Args:
        rank: R of both.
        alpha: numerator of the scale; R when None.
        dropout: of the adapter's input, while training; rounded to 1/256.

    Raises:
        StructureError: a rank that is not a whole number of at least 1, an alpha that is 0 or not finite; when
            attached, options that a layer's sizes cannot take.
    """
    check_count(rank, "loha: rank")
    return Recipe(
        Hadamard,
        {"rank": rank},
        alpha=rank if alpha is None else alpha,
        rank_power=1.0,
        dropout=dropout,
        name="loha",
        learning_rate=5e-3,
    )


def lokh(
    rank: int | None = None,
    alpha: float | None = None,
    factors: int = 2,
    orientation: str = "columns",
    dropout: float = 0.0,
) -> Recipe:
    """W + alpha F_1 kr ... kr F_k, a Kronecker product in every column, with F_j (N_j, I) and N_1 ... N_k >= O.

    Lu 2024, arXiv 2408.05883, its Khatri-Rao adaptation; the formula is our reading. With a rank, the other natural
    reading: alpha (B_1 A_1) kr (B_2 A_2) with thin B_j (N_j, R) and A_j (R, I).

    Args:
        rank: None for the chain of whole factors, I (N_1 + ... + N_k) numbers and full rank; R for thin ones,
            R (N_1 + ... + N_k + k I) numbers and rank R^k.
        alpha: the scale. When None 1 for the chain, and 16 with a rank, whose factors start that much smaller.
        factors: k.
        orientation: "columns", or "rows" for the same of the transpose.
        dropout: of the adapter's input, while training; rounded to 1/256.

    Raises:
        StructureError: a rank that is not a whole number of at least 1, an alpha that is 0 or not finite; when
            attached, options that a layer's sizes cannot take.
    """
    if rank is not None:
        check_count(rank, "lokh: rank")
    return Recipe(
        KhatriRao,
        {"rank": rank, "factors": factors, "orientation": orientation},
        alpha=(1.0 if rank is None else 16.0) if alpha is None else alpha,
        dropout=dropout,
        name="lokh",
        learning_rate=3e-3 if rank is None else 5e-3,
    )
