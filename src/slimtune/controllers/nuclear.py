"""The nuclear norm of weights as a penalty on them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import SlimtuneError, StructureError
from ..factors import Part
from ..factors.base import in_form
from ..ops.spectral import nuclear_norm
from ..recipe import is_number
from ..structures.base import check_count
from .base import Controller, require_rates
from .matrices import Matrix, named_matrices, require_held, stacked

__all__ = ["NuclearNorm"]

FORMS = ("subgradient", "prox", "ratio")


class NuclearNorm(Controller):
    """weight * sum over matrices M of |M|_* = sum_j s_j joins the loss, through the optimizer's gradients.

    The convex stand-in for the rank, Fazel, Hindi and Boyd 2001, in training: LoRAE's penalty, and that of Trained Rank
    Pruning (arXiv 2004.14566) without its projection. It needs no change of the loss, acts after clipping and mixed
    precision's unscaling, and once however many backward passes a step accumulates.

    - `form="subgradient"`: weight * U V^T of M = U S V^T, all singular vectors, what autograd finds for the norm.
    - `form="prox"`: after the step, s becomes max(s - lr * weight, 0), with the learning rate of the weight's group:
      ranks are exactly 0 in the end, which a sub-gradient never reaches, and an adaptive step (Adam) does not
      rescale the penalty.
    - `form="ratio"`: of weight * |M|_* / |M|_F, which does not change when M is scaled, so that it cannot be had for
      less by shrinking M while the next layer grows (or batch norm makes up for it); between 1 and sqrt(rank).

    A convolution's M is its kernel as (O, C h w), or with `matrix="spatial"` (C h, O w); one for each of its groups,
    whose norms are added. Weights sharded by FSDP are refused; other processes do the same, each on its own.

    Args:
        targets: "all-linear", "convolutions" (larger than 1 x 1, without the first), a list of names of layers or
            2-d parameters, suffixes or globs, or a regular expression.
        weight: lambda, at least 0.
        form: "subgradient", "prox" or "ratio".
        every: it acts on every so manieth step, from the first, with the same `weight`.
        matrix: "channel" or "spatial".

    Raises:
        StructureError: an option out of its range.
        TargetError: when attached, targets that match nothing, or are frozen, packed or sharded.
        SlimtuneError: an optimizer that does not hold them.
        DivergenceError: a matrix that is no longer finite.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(4, 4, bias=False))
        >>> with torch.no_grad(): _ = model[0].weight.copy_(torch.diag(torch.tensor([3.0, 2.0, 0.3, 0.1])))
        >>> model[0].weight.grad = torch.zeros(4, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> penalty = st.NuclearNorm(["0"], weight=0.5, form="prox")
        >>> _ = st.attach(penalty, model, optimizer)
        >>> optimizer.step(); model[0].weight.diagonal().tolist()
        [2.5, 1.5, 0.0, 0.0]
    """

    def __init__(
        self,
        targets: str | Sequence[str] = "all-linear",
        weight: float = 1e-3,
        *,
        form: str = "subgradient",
        every: int = 1,
        matrix: str = "channel",
    ) -> None:
        if not is_number(weight) or not 0 <= weight < math.inf:
            raise StructureError(f"NuclearNorm: weight must be a number of at least 0, got {weight!r}")
        if form not in FORMS:
            raise StructureError(f"NuclearNorm: form must be one of {', '.join(FORMS)}, got {form!r}")
        check_count(every, "NuclearNorm: every")
        in_form(Part("", torch.zeros(1, 1)), matrix)
        self.targets = targets if isinstance(targets, str) else list(targets)
        self.weight, self.form, self.every, self.matrix = weight, form, every, matrix
        self.done = 0
        """Optimizer steps taken."""

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._matrices = named_matrices(model, self.targets, self.matrix, "NuclearNorm")
        self._groups = require_held(self._matrices, optimizer, "NuclearNorm")
        if self.form == "prox":
            require_rates((self._groups[id(m.parameter)] for m in self._matrices), "NuclearNorm")

    @torch.no_grad()
    def value(self) -> Tensor:
        """The penalty itself, 0-d."""
        total = torch.zeros(())
        for m in self._matrices:
            M = m.of(m.parameter)
            norm = nuclear_norm(M).sum()
            total = total.to(norm) + (norm / _size(M).clamp_min(_tiny(M)) if self.form == "ratio" else norm)
        return self.weight * total

    @torch.no_grad()
    def before_step(self, model: nn.Module) -> None:
        if self.form == "prox" or not self._due():
            return
        unscale = getattr(self._optimizer, "grad_scale", None)  # a fused optimizer's gradients are still scaled
        for rows, M in stacked([m for m in self._matrices if m.parameter.grad is not None], "NuclearNorm"):
            U, s, Vh = _svd(rows, M)
            G = U @ Vh
            if self.form == "ratio":
                size = _size(M)[:, None, None, None].clamp_min(_tiny(M))
                G = (G - s.sum((1, 2))[:, None, None, None] * M / size.square()) / size
                G = torch.where(size > _tiny(M), G, 0)
            G *= self.weight
            if unscale is not None:
                G *= unscale
            for m, g in zip(rows, G, strict=True):
                m.parameter.grad.add_(m.back(g))  # type: ignore[union-attr]

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        if self.form == "prox" and self._due():
            for rows, M in stacked(self._matrices, "NuclearNorm"):
                U, s, Vh = _svd(rows, M)
                rates = [float(self._groups[id(m.parameter)]["lr"]) * self.weight for m in rows]
                s = (s - torch.tensor(rates, dtype=s.dtype, device=s.device)[:, None, None]).clamp_min(0)
                for m, new in zip(rows, (U * s[..., None, :]) @ Vh, strict=True):
                    m.parameter.copy_(m.back(new))
        self.done += 1

    def _due(self) -> bool:
        return bool(self.weight) and self.done % self.every == 0


def _svd(rows: Sequence[Matrix], M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        return torch.linalg.svd(M, full_matrices=False)
    except torch.linalg.LinAlgError:
        try:
            U, s, Vh = torch.linalg.svd(M.double(), full_matrices=False)
        except torch.linalg.LinAlgError as error:
            names = ", ".join(m.name for m in rows)
            raise SlimtuneError(f"NuclearNorm: the singular values of {names} were not found: {error}") from None
        return U.to(M), s.to(M), Vh.to(M)


def _size(M: Tensor) -> Tensor:
    """|M|_F, (*,) of (*, G, rows, columns)."""
    return torch.linalg.vector_norm(M, dim=(-3, -2, -1))


def _tiny(M: Tensor) -> float:
    return torch.finfo(M.dtype).tiny
