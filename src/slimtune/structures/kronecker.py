"""Kronecker products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import StructureError
from ..ops import kronecker_linear, replayed_dropout
from ..ops.products import factor_pair, kronecker_work
from .base import Structure

__all__ = ["Kronecker"]

SPLITS = ("none", "left", "right", "both", "auto", "auto-both")


class Kronecker(Structure):
    """dW = w1 (x) w2 with w1 (a, b), w2 (c, d), O = a c and I = b d: dW[p c + s, q d + t] = w1[p, q] w2[s, t].

    SURM, Sehanobish et al. 2024, arXiv 2406.17740 (its B is w1, its A is w2), and LoKr, Yeh et al. 2023,
    arXiv 2309.14859. w1 starts at zero and w2 at U(-1/sqrt(d), 1/sqrt(d)), which is `kaiming_uniform_(a=sqrt(5))`,
    so dW = 0 and only w1 receives a gradient at the first step. Where a factor is split, it is a product of two of
    rank R: w1 = w1_a w1_b with w1_a zero, w2 = w2_a w2_b. rank(dW) = rank(w1) rank(w2).

    The factors' shapes are SURM's by default: w1 (O / R, R) and w2 (R, I / R), O + I numbers whatever R is.

    Args:
        rank: R. In SURM's shapes a common divisor of O and I; None takes the one that gives dW the highest rank.
            Elsewhere the inner rank of a split factor, and what a scale alpha / R divides by.
        factor: choose LoKr's shapes instead. (a, c) are the two closest divisors of O, a <= c, and (b, d) those of I
            (-1), or a and b are `factor` where that divides, else the largest divisor up to it.
        left: choose the shape of w1 yourself, (a, b) with a dividing O and b dividing I.
        split: which factors are products of two: "none", "left" (w1), "right" (w2), "both"; "auto" splits w2 if
            R < max(c, d) / 2, "auto-both" also w1 if R < max(a, b) / 2, as LoKr does.

    Raises:
        StructureError: sizes that do not divide O and I, with those that do; both `factor` and `left`; a split
            without a rank; numbers below 1.

    Example:
        >>> structure = Kronecker(6, 4)
        >>> structure.reset_parameters()
        >>> structure
        Kronecker(6 x 4, (3 x 2) kron (2 x 2))
        >>> structure.dense().abs().max().item()
        0.0
    """

    fast_parameters = ("w1", "w1_a")
    w1: Tensor
    w2: Tensor
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        rank: int | None = None,
        factor: int | None = None,
        left: Sequence[int] | None = None,
        split: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features)
        if rank is not None and not _is_count(rank):
            raise StructureError(f"Kronecker: rank must be a whole number of at least 1 or None, got {rank!r}")
        if split not in SPLITS:
            raise StructureError(f"Kronecker: split must be one of {', '.join(SPLITS)}, got {split!r}")
        if split != "none" and rank is None:
            raise StructureError(f"Kronecker: split={split!r} needs a rank")
        if left is not None and factor is not None:
            raise StructureError("Kronecker: give factor or left, not both")
        if factor is not None:
            if factor != -1 and not _is_count(factor):
                raise StructureError(f"Kronecker: factor must be -1 or a whole number of at least 1, got {factor!r}")
            left = (factor_pair(out_features, factor)[0], factor_pair(in_features, factor)[0])
        elif left is None:
            rank = self._inner(rank)
            left = (out_features // rank, rank)
        a, b = self._checked(left)
        c, d = out_features // a, in_features // b
        auto = split.startswith("auto")
        split_1 = split in ("left", "both") or (split == "auto-both" and rank < max(a, b) / 2)  # type: ignore[operator]
        split_2 = split in ("right", "both") or (auto and rank < max(c, d) / 2)  # type: ignore[operator]
        self._rank, self.left, self.right = rank, (a, b), (c, d)
        self.split = {(False, False): "none", (True, False): "left", (False, True): "right"}.get(
            (split_1, split_2), "both"
        )
        for name, shape, in_two in (("w1", self.left, split_1), ("w2", self.right, split_2)):
            shapes = {f"{name}_a": (shape[0], rank), f"{name}_b": (rank, shape[1])} if in_two else {name: shape}
            for key, size in shapes.items():
                self.register_parameter(key, nn.Parameter(torch.empty(*size, device=device, dtype=dtype)))  # type: ignore[arg-type]

    def _inner(self, rank: int | None) -> int:
        """SURM's R."""
        O, I = self.out_features, self.in_features
        common = [r for r in range(1, math.isqrt(math.gcd(O, I)) + 1) if math.gcd(O, I) % r == 0]
        common = sorted({*common, *(math.gcd(O, I) // r for r in common)})
        if rank is None:
            return max(common, key=lambda r: (min(r, O // r) * min(r, I // r), -r))
        if rank not in common:
            sizes = ", ".join(map(str, common))
            raise StructureError(
                f"Kronecker: rank {rank} does not divide both {O} and {I}; it can be {sizes}, "
                "or give factor=-1 for shapes that need no common divisor"
            )
        return rank

    def _checked(self, left: Sequence[int]) -> tuple[int, int]:
        if isinstance(left, str) or not isinstance(left, Sequence) or len(left) != 2 or not all(map(_is_count, left)):
            raise StructureError(f"Kronecker: left must be two whole numbers of at least 1, got {left!r}")
        for size, whole, what in zip(left, (self.out_features, self.in_features), ("rows", "columns"), strict=True):
            if whole % size:
                fits = ", ".join(str(m) for m in range(1, whole + 1) if whole % m == 0)
                raise StructureError(f"Kronecker: {size} {what} of w1 do not divide {whole}; it can be {fits}")
        return left[0], left[1]

    @property
    def rank(self) -> int | None:
        return self._rank

    @property
    def work(self) -> float:
        return 1.5 * kronecker_work(self.left, self.right)  # thin products run at two thirds of a GEMM's speed

    def factors(self) -> tuple[Tensor, Tensor]:
        """(w1, w2), (a, b) and (c, d)."""
        w1 = self.w1_a @ self.w1_b if self.split in ("left", "both") else self.w1
        w2 = self.w2_a @ self.w2_b if self.split in ("right", "both") else self.w2
        return w1, w2

    def dense(self) -> Tensor:
        return torch.kron(*self.factors())

    def forward(self, x: Tensor) -> Tensor:
        return kronecker_linear(x, None, None, *self.factors())

    def columns(self, index: Tensor) -> Tensor:
        w1, w2 = self.factors()
        d = self.right[1]
        q, t = torch.div(index, d, rounding_mode="floor"), index % d
        return (F.embedding(q, w1.t())[..., :, None] * F.embedding(t, w2.t())[..., None, :]).flatten(-2)

    def linear(self, x: Tensor, W: Tensor, bias: Tensor | None, scale: Tensor, dropout: float = 0.0) -> Tensor:
        if dropout:
            y = F.linear(x, W, bias)
            return y + scale.to(y.dtype) * replayed_dropout(self, x, dropout)
        if self._weight_pays(x.numel() // self.in_features):  # one factor is nearly all of dW
            return super().linear(x, W, bias, scale)
        return kronecker_linear(x, W, bias, *self.factors(), scale)

    def exact_factors(self) -> tuple[Tensor, Tensor]:
        """(w1 = B1 A1, w2 = B2 A2): kron(B1, B2) and kron(A1, A2), of rank min(a, b) min(c, d), or less where split."""
        w1, w2 = self.factors()
        thin = []
        for name, w, whole in (("w1", w1, ("none", "right")), ("w2", w2, ("none", "left"))):
            short = min(w.shape)
            if self.split not in whole and self._rank is not None and self._rank < short:
                thin.append((getattr(self, f"{name}_a"), getattr(self, f"{name}_b")))
            else:
                eye = torch.eye(short, device=w.device, dtype=w.dtype)
                thin.append((w, eye) if short == w.shape[1] else (eye, w))
        (B1, A1), (B2, A2) = thin
        return torch.kron(B1, B2), torch.kron(A1, A2)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name in self.fast_parameters:
                    p.zero_()
                else:
                    p.uniform_(-1 / math.sqrt(p.shape[1]), 1 / math.sqrt(p.shape[1]))

    def options(self) -> dict[str, Any]:
        return {"rank": self._rank, "left": list(self.left), "split": self.split}

    def extra_repr(self) -> str:
        (a, b), (c, d) = self.left, self.right
        split = "" if self.split == "none" else f", {self.split} split at rank {self._rank}"
        return f"{super().extra_repr()}, ({a} x {b}) kron ({c} x {d}){split}"


def _is_count(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= 1
