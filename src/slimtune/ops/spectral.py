"""Spectra of matrices: how many directions matter, and where singular values are cut or shrunk.

Shapes: O out, I in, K = min(O, I), R rank. M (O, I), s (K,) singular values, falling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import StructureError

__all__ = [
    "break_even",
    "effective_rank",
    "nuclear_norm",
    "nuclear_subgradient",
    "participation_rank",
    "rank_by_budget",
    "rank_by_energy",
    "rank_by_sum",
    "rank_by_tail",
    "rank_by_value",
    "singular_threshold",
    "stable_rank",
]


def stable_rank(s: Tensor) -> float:
    """sum_j s_j^2 / s_1^2 of singular values (K,): at least 1, at most `participation_rank`. 0 for a zero matrix.

    Example:
        >>> stable_rank(torch.tensor([2.0, 1.0, 1.0]))
        1.5
    """
    s = s.double()
    return float(s.square().sum() / s.max().square()) if bool(s.any()) else 0.0


def participation_rank(s: Tensor) -> float:
    """(sum_j s_j)^2 / sum_j s_j^2 of singular values (K,), the nuclear norm squared over the Frobenius norm squared.

    Example:
        >>> participation_rank(torch.tensor([1.0, 1.0, 0.0]))
        2.0
    """
    s = s.double()
    return float(s.sum().square() / s.square().sum()) if bool(s.any()) else 0.0


def effective_rank(s: Tensor) -> float:
    """exp(-sum_j p_j ln p_j), p = s / sum s, of singular values (K,): Roy and Vetterli 2007. At most the rank.

    Example:
        >>> round(effective_rank(torch.tensor([1.0, 1.0, 0.0])), 6)
        2.0
    """
    s = s.double()
    if not bool(s.any()):
        return 0.0
    p = s / s.sum()
    return float(torch.special.entr(p).sum().exp())


def rank_by_energy(s: Tensor, keep: float) -> int:
    """The smallest R with sum_{j <= R} s_j^2 >= keep * sum_j s_j^2; 0 for a zero matrix or keep = 0.

    Example:
        >>> [rank_by_energy(torch.tensor([3.0, 2.0, 1.0]), keep) for keep in (0.5, 0.64, 0.65, 0.93)]
        [1, 1, 2, 3]
    """
    return rank_by_tail(s, 1 - keep)


def rank_by_tail(s: Tensor, share: float) -> int:
    """The smallest R with sum_{j > R} s_j^2 <= share * sum_j s_j^2, TRP's rule. Share 0 keeps all but exact zeros.

    Raises:
        StructureError: a share outside [0, 1].

    Example:
        >>> rank_by_tail(torch.tensor([3.0, 2.0, 1.0]), 0.1)
        2
    """
    if not 0 <= share <= 1:
        raise StructureError(f"rank_by_tail: the share must be in [0, 1], got {share!r}")
    square = s.double().square()
    tails = torch.cat([square.flip(0).cumsum(0).flip(0), square.new_zeros(1)])
    return int((tails <= share * tails[0]).nonzero()[0])


def rank_by_sum(s: Tensor, keep: float) -> int:
    """The smallest R with sum_{j <= R} s_j >= keep * sum_j s_j, Cuttlefish's accumulative rank; at least 1.

    Example:
        >>> [rank_by_sum(torch.tensor([3.0, 2.0, 1.0]), keep) for keep in (0.5, 0.6, 1.0)]
        [1, 2, 3]
    """
    sums = s.double().cumsum(0)
    return min(int((sums < keep * sums[-1]).sum()) + 1, len(s))


def rank_by_value(s: Tensor, least: float) -> int:
    """How many singular values are at least `least`.

    Example:
        >>> rank_by_value(torch.tensor([3.0, 2.0, 1.0]), 2.0)
        2
    """
    return int((s >= least).sum())


def rank_by_budget(out_features: int, in_features: int, keep: float, multiple: int = 1) -> int:
    """The largest R with R (O + I) <= keep * O I, rounded down to a multiple where that leaves any; at least 1.

    Example:
        >>> rank_by_budget(96, 96, 0.5), rank_by_budget(96, 96, 0.8, multiple=8)
        (24, 32)
    """
    # a hair more, lest a share such as 0.7 that no binary fraction holds lose a rank
    rank = int(keep * out_features * in_features / (out_features + in_features) * (1 + 1e-12))
    return max(1, rank // multiple * multiple or rank)


def break_even(out_features: int, in_features: int) -> float:
    """O I / (O + I): B (O, R) and A (R, I) are smaller than O x I, and cost fewer multiply-adds, iff R is below.

    Example:
        >>> break_even(128, 1152)
        115.2
    """
    return out_features * in_features / (out_features + in_features)


def nuclear_norm(M: Tensor) -> Tensor:
    """sum_j s_j of M (*, O, I). Its gradient is U V^T of the thin SVD, finite at any M."""
    return torch.linalg.matrix_norm(M, "nuc")


def nuclear_subgradient(U: Tensor, Vh: Tensor) -> Tensor:
    """U V^T, the smallest sub-gradient of |M|_* at M = U diag(s) Vh with s > 0. U (*, O, R), Vh (*, R, I).

    Example:
        >>> M = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
        >>> U, s, Vh = torch.linalg.svd(M)
        >>> nuclear_subgradient(U, Vh).abs().tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    return U @ Vh


def singular_threshold(M: Tensor, tau: float) -> tuple[Tensor, int]:
    """(U max(s - tau, 0) V^T, how many singular values are left) of M (O, I): argmin_X |X - M|_F^2 / 2 + tau |X|_*.

    Cai, Candes and Shen 2010, arXiv 0810.3286, theorem 2.1.

    Example:
        >>> singular_threshold(torch.diag(torch.tensor([3.0, 1.0])), 1.5)[0].tolist()
        [[1.5, 0.0], [0.0, 0.0]]
    """
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    rank = int((s > tau).sum())
    return (U[:, :rank] * (s[:rank] - tau)) @ Vh[:rank], rank
