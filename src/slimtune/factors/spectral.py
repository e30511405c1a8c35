"""Factors by singular values of the weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import StructureError
from ..ops.svd import truncated_svd
from .base import Part, Replacement, factors, in_form, matrices, thin, thin_sizes

__all__ = ["svd"]


@factors
@dataclass(frozen=True)
class svd:
    """The nearest W' of rank R: B A = U_R S_R V_R^T, |W - W'|_F^2 = sum_{j > R} s_j^2 (Eckart and Young 1936).

    Args:
        split: "balanced", B = U sqrt(S) and A = sqrt(S) V^T, of all factorisations the one of least |A|_F^2 + |B|_F^2,
            for training; "left", B = U with orthonormal columns.
        form: of convolutions: "channel", a thinner convolution and a pointwise one; "spatial", a vertical and a
            horizontal one (other than that for kernels it does not fit).
        iterations: None for the exact decomposition, else power iterations of a randomised one.

    Raises:
        StructureError: an unknown split or form.

    Example:
        >>> W = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
        >>> svd()(Part("layer", W), 2).structure.dense().round(decimals=4).tolist()
        [[4.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    """

    split: str = "balanced"
    form: str = "channel"
    iterations: int | None = None

    def __post_init__(self) -> None:
        if self.split not in ("balanced", "left"):
            raise StructureError(f"svd: split must be balanced or left, got {self.split!r}")
        in_form(Part("", torch.zeros(1, 1)), self.form)

    def __call__(self, part: Part, rank: int) -> Replacement:
        lefts, rights = [], []
        for M in matrices(part, self.form):
            U, s, Vh = truncated_svd(M, rank, self.iterations)
            root = s.sqrt() if self.split == "balanced" else torch.ones_like(s)
            lefts.append(U * root)
            rights.append((s / root)[:, None] * Vh if self.split == "left" else root[:, None] * Vh)
        return Replacement(thin(part, torch.stack(lefts), torch.stack(rights), self.form))

    def sizes(self, part: Part) -> tuple[float, int]:
        return thin_sizes(part, self.form)

    def errors(self, part: Part) -> Tensor:
        """|W - W'|_F^2 at ranks 0, 1, ..., in fp64: the tails of the squared singular values."""
        values = torch.linalg.svdvals(matrices(part, self.form).double()).square().sum(0)
        return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)]).cpu()
