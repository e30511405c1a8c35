"""Factors by Kronecker, Khatri-Rao and Hadamard products.

Shapes: O out, I in, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import StructureError
from ..ops.decompositions import hadamard_als, hadamard_descent, khatri_rao_svd, kronecker_svd
from ..ops.products import factor_pair
from ..structures import Hadamard, KhatriRao, KroneckerSum, Structure, Sum
from .base import Part, Replacement, factors

__all__ = ["hadamard", "khatri_rao", "kronecker"]


def _filled(structure: Structure, *tensors: Tensor) -> Replacement:
    with torch.no_grad():
        for p, t in zip(structure.parameters(), tensors, strict=True):
            p.copy_(t)
    return Replacement(structure)


def _below(part: Part, per_rank: float, most: int) -> tuple[float, int]:
    """`Factors.sizes`, of at most so many ranks."""
    return per_rank, max(0, min(most, math.ceil(part.W.numel() / per_rank) - 1))


@factors
@dataclass(frozen=True)
class kronecker:
    """The nearest sum of R Kronecker products, W' = sum_r B_r (x) C_r: `ops.decompositions.kronecker_svd`.

    One rank takes a b + c d numbers, B (a, b) and C (c, d): far fewer than O + I, so R is larger than of other factors.

    Args:
        left: (a, b), dividing O and I; None takes the largest divisors up to their square roots.
        iterations: None for the exact decomposition, else power iterations of a randomised one.

    Raises:
        StructureError: sizes that do not divide a layer's, more terms than min(a b, c d).

    Example:
        >>> part = Part("layer", torch.kron(torch.randn(2, 2), torch.randn(3, 4)))
        >>> make = kronecker()
        >>> make.sizes(part), torch.allclose(make(part, 1).structure.dense(), part.W, atol=1e-5)
        ((16, 2), True)
    """

    left: Sequence[int] | None = None
    iterations: int | None = None

    def _left(self, part: Part) -> tuple[int, int]:
        O, I = part.W.shape
        if self.left is None:
            return factor_pair(O)[0], factor_pair(I)[0]
        if len(self.left) != 2 or O % self.left[0] or I % self.left[1]:
            raise StructureError(f"kronecker: left={tuple(self.left)} does not divide the {O} x {I} of {part.name!r}")
        return self.left[0], self.left[1]

    def __call__(self, part: Part, rank: int) -> Replacement:
        left = self._left(part)
        found = kronecker_svd(part.W, left, min(rank, self._most(part)), self.iterations)
        made = KroneckerSum(
            *part.W.shape, rank=found.left.shape[0], left=left, device=part.W.device, dtype=found.left.dtype
        )
        return _filled(made, found.left, found.right)

    def _most(self, part: Part) -> int:
        a, b = self._left(part)
        return min(a * b, part.W.numel() // (a * b))

    def sizes(self, part: Part) -> tuple[float, int]:
        """(a b + c d, the largest number of terms that is smaller than W)."""
        a, b = self._left(part)
        return _below(part, a * b + part.W.numel() // (a * b), self._most(part))


@factors
@dataclass(frozen=True)
class khatri_rao:
    """The nearest sum of R Khatri-Rao products, W' = sum_r F_r kr G_r: `ops.decompositions.khatri_rao_svd`.

    One rank takes I (n_1 + n_2) numbers, n_1 n_2 = O (by rows O (n_1 + n_2), n_1 n_2 = I), and the largest that helps
    is small. It saves memory, not time: products are those of a dense weight, which is made for each call.

    Args:
        split: (n_1, n_2); None takes the two closest divisors. A size without any leaves the layer dense.
        orientation: "columns", "rows", or None for that of fewer numbers a rank.

    Raises:
        StructureError: another orientation, sizes that do not fit a layer's.

    Example:
        >>> part = Part("layer", torch.randn(16, 8))
        >>> make = khatri_rao()
        >>> make.sizes(part), make(part, 1).structure
        ((64, 1), KhatriRao(16 x 8, columns, sizes 4 4))
    """

    split: Sequence[int] | None = None
    orientation: str | None = None

    def __post_init__(self) -> None:
        if self.orientation not in (None, "columns", "rows"):
            raise StructureError(f"khatri_rao: orientation must be columns, rows or None, got {self.orientation!r}")

    def _plan(self, part: Part) -> tuple[str, tuple[int, int], int]:
        """(orientation, sizes, numbers a rank)."""
        O, I = part.W.shape
        plans = []
        for orientation, tall, wide in (("columns", O, I), ("rows", I, O)):
            n1, n2 = self.split or factor_pair(tall)
            if n1 * n2 == tall and self.orientation in (None, orientation):
                plans.append((orientation, (n1, n2), wide * (n1 + n2)))
        if not plans:
            raise StructureError(f"khatri_rao: split={self.split} does not fit the {O} x {I} of {part.name!r}")
        return min(plans, key=lambda plan: plan[2])

    def __call__(self, part: Part, rank: int) -> Replacement:
        orientation, split, _ = self._plan(part)
        W = part.W if orientation == "columns" else part.W.t()
        found = khatri_rao_svd(W, split, min(rank, *split))
        F, G = found.factors
        O, I = part.W.shape
        options: Any = {"sizes": list(split), "orientation": orientation}
        made: Structure
        to: Any = {"device": F.device, "dtype": F.dtype}
        if len(F) == 1:
            made = KhatriRao(O, I, **options, **to)
        else:
            made = Sum(O, I, parts=[{"structure": KhatriRao, **options}] * len(F), **to)
        return _filled(made, *(t for pair in zip(F, G, strict=True) for t in pair))

    def sizes(self, part: Part) -> tuple[float, int]:
        """(numbers of one product, the largest number of products that is smaller than W)."""
        _, split, per_rank = self._plan(part)
        return _below(part, per_rank, min(split))


@factors
@dataclass(frozen=True)
class hadamard:
    """W' = (C1 D1) * (C2 D2), entry by entry, both of rank R: `ops.decompositions.hadamard_als`, then
    `hadamard_descent`. A local minimum, never above that of the truncated singular value decomposition of rank R, up to
    rounding; at equal numbers that one has rank 2 R.

    One rank takes 2 (O + I) numbers. It saves memory; its products are those of rank R^2, or of a dense weight.

    Args:
        starts: the first from the singular value decomposition, the others random.
        sweeps: of each, at most; one costs 4 O I R^2 multiply-adds.
        polish: steps of gradient descent after it, 0 for none.
        seed: of the starts.

    Raises:
        StructureError: counts below 1.

    Example:
        >>> part = Part("layer", torch.randn(12, 12))
        >>> make = hadamard(sweeps=20)
        >>> make.sizes(part), make(part, 1).structure
        ((48, 2), Hadamard(12 x 12, ranks 1 and 1))
    """

    starts: int = 1
    sweeps: int = 30
    polish: int = 200
    seed: int = 0

    def __call__(self, part: Part, rank: int) -> Replacement:
        O, I = part.W.shape
        found = hadamard_als(
            part.W, (rank, rank), starts=self.starts, sweeps=self.sweeps, tolerance=1e-6, seed=self.seed
        )
        if self.polish:
            found = hadamard_descent(part.W, found[:4], steps=self.polish)
        return _filled(Hadamard(O, I, rank=rank, device=part.W.device, dtype=found.C1.dtype), *found[:4])

    def sizes(self, part: Part) -> tuple[float, int]:
        """(2 (O + I), the largest rank that is smaller than W)."""
        return _below(part, 2 * sum(part.W.shape), min(part.W.shape))
