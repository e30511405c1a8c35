"""Symmetric low-rank matrices from one factor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StructureError
from .base import Factored, check_count

__all__ = ["Symmetric"]


class Symmetric(Factored):
    """dW = A[:O] A[:I]^T with one A (N, R), N = max(O, I).

    SingLoRA, Bensaid et al. 2025, arXiv 2507.05566, eq. 8 and section 4.4, in PyTorch's orientation. R N numbers, half
    of LoRA's on a square layer. The leading square block of dW is symmetric and positive semidefinite: with the
    published form it can raise the weight's eigenvalues but never lower one. The other forms lift that, for the same
    or hardly more parameters, and start at dW = 0 by themselves; the published one starts at A0 A0^T, so its scale
    has to start at 0 and grow (`Ramp`).

    Args:
        rank: R >= 1.
        form: "plain", as published. "centred": A[:O] A[:I]^T - A0[:O] A0[:I]^T, A0 = A at the start (saved); trained
            is `dA` = A - A0, so that weight decay pulls towards dW = 0.
            "signed": P[:O] M[:I]^T + M[:O] P[:I]^T, A = [P, M], M = 0 at the start; up to a rotation of the columns
            this is A diag(+1 ..., -1 ...) A^T, any symmetric matrix of rank R with as many positive as negative
            eigenvalues; R even. "core": A[:O] J A[:I]^T with J (R, R) = 0 at the start, no longer symmetric.
        init: A starts at U(-b, b) with b = 1 / sqrt(N), as the paper's theory asks ("size"), or b = 1 / sqrt(R), as
            public code has it ("rank"), which makes A A^T about N / R times as large: 500 times the weight of a layer
            of 4096.

    Raises:
        StructureError: rank below 1, or odd where the form is "signed"; an unknown form or init.

    Example:
        >>> structure = Symmetric(3, 2, rank=1)
        >>> _ = nn.init.constant_(structure.A, 2.0)
        >>> structure.dense().tolist()
        [[4.0, 4.0], [4.0, 4.0], [4.0, 4.0]]
    """

    fast_parameters = ("J",)
    forms = ("plain", "centred", "signed", "core")
    A: Tensor
    A0: Tensor
    dA: Tensor

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        rank: int = 8,
        form: str = "plain",
        init: str = "size",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features)
        check_count(rank, "Symmetric: rank")
        if form not in self.forms:
            raise StructureError(f"Symmetric: form must be one of {', '.join(self.forms)}, got {form!r}")
        if init not in ("size", "rank"):
            raise StructureError(f"Symmetric: init must be size or rank, got {init!r}")
        if form == "signed" and rank % 2:
            raise StructureError(f"Symmetric: rank must be even for form signed, got {rank}; try {rank + 1}")
        self.form, self.init = form, init
        size = max(out_features, in_features)
        self._own = "dA" if form == "centred" else "A"
        self.register_parameter(self._own, nn.Parameter(torch.empty(size, rank, device=device, dtype=dtype)))
        if form == "core":
            self.J = nn.Parameter(torch.empty(rank, rank, device=device, dtype=dtype))
        if form == "centred":
            self.register_buffer("A0", torch.empty(size, rank, device=device, dtype=dtype))

    @property
    def rank(self) -> int:
        trained: Tensor = getattr(self, self._own)
        return trained.shape[1]

    def factors(self) -> tuple[Tensor, Tensor]:
        O, I = self.out_features, self.in_features
        if self.form == "centred":
            A0, D = self.A0, self.dA
            return torch.cat([D[:O], A0[:O]], 1), torch.cat([(A0 + D)[:I], D[:I]], 1).t()
        A = self.A
        if self.form == "plain":  # a slice costs its gradient a copy even where it is the whole
            return A if len(A) == O else A[:O], (A if len(A) == I else A[:I]).t()
        if self.form == "core":
            return A[:O] @ self.J, A[:I].t()
        return A[:O], A[:I].roll(self.rank // 2, 1).t()  # signed

    def reset_parameters(self) -> None:
        with torch.no_grad():
            size = max(self.out_features, self.in_features)
            bound = 1 / math.sqrt(size if self.init == "size" else self.rank)
            if self.form == "centred":
                self.A0.uniform_(-bound, bound)
                self.dA.zero_()
                return
            self.A.uniform_(-bound, bound)
            if self.form == "core":
                self.J.zero_()
            if self.form == "signed":
                self.A[:, self.rank // 2 :].zero_()

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank, "form": self.form, "init": self.init}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank {self.rank}, {self.form}"
