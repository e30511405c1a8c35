"""Changes of the diagonal in a weight's own triangular factorisation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StructureError
from ..ops import diagonal_linear, ldu, pivot_rows
from .base import Factored, Structure, check_count

__all__ = ["LDU"]


class LDU(Factored):
    """dW = P L diag(sigma z - z0) U, where W = P L diag(D) U is the LU factorisation of the weight below.

    LoLDU, Shi et al. 2024, arXiv 2410.13618, with its residual W - P L diag(z0) U written as a change of W, which is
    never edited: whatever z0, dW = 0 at the start. L (O, R) and U (R, I) are the first R columns and rows, frozen;
    trained are z and sigma, R + 1 numbers, kept as differences from their start, `dz` = z - z0 and `dsigma` =
    sigma - 1, so that sigma z - z0 = dsigma z0 + (1 + dsigma) dz: weight decay pulls towards dW = 0, not towards
    z = 0. The published sigma, which starts at alpha / R, is this one times the recipe's scale.

    Frozen are R (O + I) numbers beside W. They are computed in fp64 when the adapter is made and again when it is
    loaded; the file holds the pivot rows, R whole numbers, and z0, so that ties between pivots cannot be settled
    differently the next time. The factors of another weight are other directions: an adapter loaded over a rounded or
    further trained base warns.

    Args:
        rank: R >= 1, at most: a layer with fewer outputs or inputs has R = min(O, I).
        unit: divide columns of L and rows of U by their norms and multiply D by them: the same set of changes, but
            one learning rate fits all (the published norms span two orders of magnitude). False is as published.
        start: z0, which only matters to the gradient of sigma: "lu" (D), "uniform" (within half the mean of D),
            "normal" (mean and deviation of D), "constant" (mean of D), "ones" or "zeros".
        train_scale: whether sigma trains.

    Raises:
        StructureError: rank below 1, an unknown start.

    Example:
        >>> W = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> structure = LDU(2, 2, rank=2, unit=False)
        >>> structure.reset_parameters()
        >>> structure.prepare(lambda dtype: W)
        >>> structure.start.tolist()
        [2.0, 2.5]
        >>> _ = nn.init.ones_(structure.dsigma)
        >>> structure.dense().tolist()
        [[2.0, 1.0], [1.0, 3.0]]
    """

    starts = ("lu", "uniform", "normal", "constant", "ones", "zeros")
    pivots: Tensor
    start: Tensor
    L: Tensor
    U: Tensor

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        rank: int = 64,
        unit: bool = True,
        start: str = "lu",
        train_scale: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features)
        check_count(rank, "LDU: rank")
        if start not in self.starts:
            raise StructureError(f"LDU: start must be one of {', '.join(self.starts)}, got {start!r}")
        self.unit, self.start_name = unit, start
        R = min(rank, out_features, in_features)
        self.dz = nn.Parameter(torch.empty(R, device=device, dtype=dtype))
        self.dsigma = nn.Parameter(torch.empty(1, device=device, dtype=dtype)) if train_scale else None
        self.register_buffer("pivots", torch.empty(R, device=device, dtype=torch.int64))
        self.register_buffer("start", torch.empty(R, device=device, dtype=dtype))
        self.register_buffer("L", torch.empty(out_features, R, device=device, dtype=dtype), persistent=False)
        self.register_buffer("U", torch.empty(R, in_features, device=device, dtype=dtype), persistent=False)

    @property
    def rank(self) -> int:
        return self.dz.shape[0]

    @property
    def work(self) -> float:
        return self.rank * (self.out_features + self.in_features)

    def coefficients(self) -> Tensor:
        """sigma z - z0, (R,)."""
        if self.dsigma is None:
            return self.dz
        return torch.addcmul(self.dz, self.dsigma, self.start + self.dz)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.L, self.coefficients()[:, None] * self.U

    def linear(self, x: Tensor, W: Tensor, bias: Tensor | None, scale: Tensor, dropout: float = 0.0) -> Tensor:
        if not dropout and self._weight_pays(x.numel() // self.in_features):
            return Structure.linear(self, x, W, bias, scale)
        return diagonal_linear(x, W, bias, self.L, self.coefficients(), self.U, scale, dropout)

    def _weight_pays(self, rows: int) -> bool:
        # thin: four products with rows of x; dense: dW twice and its pull-back, and g^T x
        size = self.out_features * self.in_features
        return 2 * rows * self.work > 3 * self.rank * size + rows * size

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.dz.zero_()
            self.pivots.fill_(-1)  # none chosen yet
            if self.dsigma is not None:
                self.dsigma.zero_()

    @torch.no_grad()
    def prepare(self, weight: Callable[[torch.dtype | None], Tensor]) -> None:
        W, R = weight(None).detach(), self.rank
        panel = W[:, :R].cpu().double()
        fresh = bool((self.pivots < 0).any())
        rows = pivot_rows(panel) if fresh else self.pivots.cpu()
        L, D, U = ldu(panel, W[rows.to(W.device)].cpu().double(), rows)
        if self.unit:
            l, u = L.norm(dim=0), U.norm(dim=1)
            L, D, U = L / l, D * l * u, U / torch.where(u > 0, u, 1.0)[:, None]
        self.L.copy_(L)
        self.U.copy_(U)
        if fresh:
            self.pivots.copy_(rows)
            self.start.copy_(self._draw(D))
        elif self.start_name == "lu" and (shift := (D - self.start.cpu()).norm()) > 1e-4 * D.norm():
            warnings.warn(
                f"LDU: the weight below is not the one this adapter was trained on: its diagonal is off by "
                f"{shift / D.norm():.2%}, and so are the directions that the change is made of",
                UserWarning,
                stacklevel=2,
            )

    def _draw(self, D: Tensor) -> Tensor:
        mean = D.mean()
        if self.start_name == "uniform":
            return torch.empty_like(D).uniform_(-1, 1) * mean.abs() / 2
        if self.start_name == "normal":
            return mean + torch.randn_like(D) * D.std(correction=0)
        return {"lu": D, "ones": torch.ones_like(D), "zeros": torch.zeros_like(D)}.get(
            self.start_name, mean.expand_as(D)
        )

    def options(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "unit": self.unit,
            "start": self.start_name,
            "train_scale": self.dsigma is not None,
        }

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank {self.rank}"
