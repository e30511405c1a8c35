"""Weights that are projected to low rank while they train."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..compress import factorize
from ..errors import StructureError, TargetError
from ..factors import Part, svd
from ..factors.base import in_form
from ..ops.spectral import rank_by_tail, rank_by_value
from ..ranks import starts_at_mean
from ..recipe import is_number
from ..structures.base import check_count
from ..targets import unwrapped
from .base import Controller, require_rates
from .matrices import CONVOLUTIONS, Matrix, layer_matrices, require_held, spectra

__all__ = ["TRP"]

PENALTIES = ("subgradient", "prox")
KEPT = "trp_subgradient"
OWN = (KEPT, "grad_avg")
"""State of the weight's shape that is no momentum; centred RMSprop needs its mean below the root of its squares'."""


class TRP(Controller):
    """Every `period` steps W becomes D_e(W), its nearest matrix of the smallest rank that drops at most a share e of
    |W|_F^2; in between, and from there, the optimizer goes on as it would.

    Trained Rank Pruning, Xu et al. 2020, arXiv 2004.14566 (and 2018, arXiv 1812.02402): at steps t = 0, m, 2 m, ...
    T = D_e(W), and W = T - lr (grad f(T) + weight U_R V_R^T), otherwise W = W - lr grad f(W), with T = U_R S_R V_R^T.
    D_e is a truncated SVD with R the smallest rank with sum_{j > R} s_j^2 <= e sum_j s_j^2 (`ops.rank_by_tail`).

    If what a period adds to T is in norm below sqrt(e) |W|, the rank does not grow at its end. D_e applied again and
    again goes on cutting without any training in between, so that period = 1 is another, much harsher method.

    The matrix of a convolution is its kernel as (O, C h w), `form="channel"` (the paper's TRP1), or (C h, O w),
    "spatial" (TRP2, for 2-d kernels without groups); the groups of a convolution share one rank. Any stride, padding,
    dilation and bias will do. The penalty acts on steps 0, m, 2 m, ... alone, as in the authors' code: over a run it
    weighs `weight` / m. On the others, or without projections, attach `NuclearNorm`.

    Any torch optimizer will do. Its step divides the penalty's gradient as its own where it is adaptive (Adam), which
    takes the meaning of `weight` from it; `penalty="prox"` does not pass through it. Behind batch norm a weight can
    shrink without any effect, and the penalty makes it do so.

    It computes in fp32, with a `tail` below 0.001 partly in fp64. Half-precision weights are rounded after it, so their
    rank is what it is only up to that. Processes of DistributedDataParallel each do the same to the same weights; they
    need to be alike for the same bits. Weights sharded by FSDP are refused.

    Args:
        period: m, optimizer steps between projections.
        tail: e, the share of |W|_F^2 that a projection may drop, in [0, 1). Published: 0.02 on CIFAR, 0.005 on
            ImageNet, while the code has 0.1.
        weight: of the nuclear norm, at least 0. Published: 3e-4; up to 3e-3 is worth trying.
        penalty: "subgradient", as published: U_R V_R^T joins the gradient; "prox": before the truncation, singular
            values shrink by the learning rate times `weight`, and small ones become exactly 0.
        targets: as in `st.adapt`, or "convolutions": all whose kernel is larger than one, but the first.
        exclude: the same forms; what they match is left out.
        form: "channel" or "spatial".
        momentum: project the optimizer's momentum, too: what would leave the matrices of rank R at once is taken out.
        factorize: in the end, put factors in the place of the weights (`st.factorize`) where that is smaller.
        value: with `factorize`, the rank is how many singular values are at least this, where that is smaller; the
            authors' code takes 0.05. None for the rank of the last projection, which changes nothing.

    Raises:
        StructureError: an option out of its range.
        TargetError: when attached, targets that match nothing or that cannot be projected: frozen, adapted, sharded.
        SlimtuneError: an optimizer that does not hold them.
        DivergenceError: weights that are no longer finite.

    Example:
        >>> import slimtune as st
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> trp = st.TRP(period=2, tail=0.2, targets=["0"], factorize=True)
        >>> handle = st.attach(trp, model, optimizer)
        >>> for _ in range(5):
        ...     optimizer.zero_grad(); model(torch.randn(8, 16)).square().mean().backward(); optimizer.step()
        >>> handle.finish(); model[0].structure.rank == trp.ranks["0"] < 8
        True
    """

    def __init__(
        self,
        period: int = 20,
        tail: float = 0.02,
        *,
        weight: float = 3e-4,
        penalty: str = "subgradient",
        targets: str | Sequence[str] = CONVOLUTIONS,
        exclude: str | Sequence[str] = (),
        form: str = "channel",
        momentum: bool = False,
        factorize: bool = False,
        value: float | None = None,
    ) -> None:
        check_count(period, "TRP: period")
        if not is_number(tail) or not 0 <= tail < 1:
            raise StructureError(f"TRP: tail must be a share in [0, 1), got {tail!r}")
        if not is_number(weight) or not 0 <= weight < math.inf:
            raise StructureError(f"TRP: weight must be a number of at least 0, got {weight!r}")
        if penalty not in PENALTIES:
            raise StructureError(f"TRP: penalty must be one of {', '.join(PENALTIES)}, got {penalty!r}")
        in_form(Part("", torch.zeros(1, 1)), form)
        for what, flag in (("momentum", momentum), ("factorize", factorize)):
            if not isinstance(flag, bool):
                raise StructureError(f"TRP: {what} must be true or false, got {flag!r}")
        if value is not None and (not is_number(value) or not 0 <= value < math.inf):
            raise StructureError(f"TRP: value must be a number of at least 0, or None, got {value!r}")
        if value is not None and not factorize:
            raise StructureError("TRP: value is for factorize=True, which it says the ranks of")
        self.period, self.tail, self.weight, self.penalty = period, tail, weight, penalty
        self.form, self.momentum = form, momentum
        self.targets = targets if isinstance(targets, str) else list(targets)
        self.exclude = exclude if isinstance(exclude, str) else list(exclude)
        self.factorize, self.value = factorize, value
        self.done = 0
        """Optimizer steps taken."""
        self.projected = -1
        """`done` at the last projection."""
        self.ranks: dict[str, int] = {}
        """{layer: rank} at the last projection."""

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._news: dict[str, Any] | None = None
        self._matrices = layer_matrices(model, self.targets, self.exclude, self.form, "TRP")
        self._groups = require_held(self._matrices, optimizer, "TRP")
        self._untied(model)
        if self.weight and self.penalty == "prox":
            require_rates((self._groups[id(m.parameter)] for m in self._matrices), "TRP")
        self._start: list[tuple[Matrix, Tensor, int]] = []
        if self.done == 0 and self.projected < 0:
            before = [(m, m.parameter.detach().clone()) for m in self._matrices]
            self._project(False)
            self._start = [(m, W, m.parameter._version) for m, W in before]

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned. Weights loaded before `attach` are as they were before it."""
        for m, W, version in getattr(self, "_start", []):
            if m.parameter._version == version:
                m.parameter.copy_(W)
        self._start = []
        super().load_state_dict(state)

    @torch.no_grad()
    def before_step(self, model: nn.Module) -> None:
        self._start = []
        if not self.weight or self.penalty != "subgradient" or self.projected != self.done:
            return
        known = {m.name: self._optimizer.state.get(m.parameter, {}).pop(KEPT, None) for m in self._matrices}
        lacking = [m for m in self._matrices if known[m.name] is None and m.name in self.ranks]
        for m, found, n, _ in spectra(lacking, "TRP", self._exact):
            if found is not None:
                known[m.name] = m.back(found.polar(n, self.ranks[m.name]))
        unscale = getattr(self._optimizer, "grad_scale", None)  # a fused optimizer's gradients are still scaled
        for m in self._matrices:
            G, p = known[m.name], m.parameter
            if G is not None and p.grad is not None:
                p.grad.add_(G if unscale is None else G * unscale, alpha=self.weight)

    def after_step(self, model: nn.Module) -> None:
        self.done += 1
        self._news = None
        if self.done % self.period == 0:
            self._project()

    @torch.no_grad()
    def end(self, model: nn.Module) -> None:
        """Project once more, and put factors in the place of the weights if that was asked for."""
        if self.projected != self.done:
            self._project(False)
        for m in self._matrices:
            self._optimizer.state.get(m.parameter, {}).pop(KEPT, None)
        if not self.factorize:
            return
        ranks = dict(self.ranks)
        if self.value is not None:
            for m, found, _, s in spectra([m for m in self._matrices if m.name in ranks], "TRP"):
                if found is not None:
                    ranks[m.name] = min(ranks[m.name], rank_by_value(s, self.value))
        factorize(model, {name: max(1, rank) for name, rank in ranks.items()}, svd(form=self.form), self._optimizer)

    def note(self) -> dict[str, Any] | None:
        return self._news

    @torch.no_grad()
    def _project(self, more: bool = True) -> None:
        """W = D_e(W); `more`: and keep what the step after it adds to the gradient, which else is computed anew."""
        skipped = []
        for m, found, n, s in spectra(self._matrices, "TRP", self._exact):
            if found is None:
                skipped.append(m.name)
                continue
            less = self._threshold(m)
            if less:
                s = (found.s[n] - less).clamp_min(0).square().sum(0).sqrt().cpu()
            rank = self.ranks[m.name] = rank_by_tail(s, self.tail)
            if rank < len(s) or less:
                m.parameter.copy_(m.back(found.cut(n, rank, less)))
            state = self._optimizer.state.get(m.parameter)
            if self.momentum and rank < len(s):
                for key, v in (state or {}).items():
                    if (
                        torch.is_tensor(v)
                        and v.shape == m.parameter.shape
                        and not starts_at_mean(key)
                        and key not in OWN
                    ):
                        v.copy_(m.back(found.tangent(n, rank, m.of(v))))
            # an optimizer that has no state of a parameter yet would take ours for its own
            if more and self.weight and self.penalty == "subgradient" and state:
                state[KEPT] = m.back(found.polar(n, rank))
        self.projected = self.done
        self._news = {"ranks": dict(self.ranks)}
        if skipped:
            self._news["skipped"] = skipped

    @property
    def _exact(self) -> bool:
        return self.tail < 1e-3

    def _threshold(self, m: Matrix) -> float:
        """What singular values lose before they are cut."""
        if self.penalty != "prox" or not self.weight or self.done == 0:
            return 0.0
        return float(self._groups[id(m.parameter)]["lr"]) * self.weight

    def _untied(self, model: nn.Module) -> None:
        users: dict[int, set[str]] = {}
        for name, module in unwrapped(model).named_modules(remove_duplicate=False):
            for p in module._parameters.values():
                users.setdefault(id(p), set()).add(name)
        for m in self._matrices:
            others = users[id(m.parameter)] - {m.name}
            if others:
                raise TargetError(
                    f"TRP: {m.name!r} shares its weight with {', '.join(sorted(others))}; exclude it, or untie them"
                )
