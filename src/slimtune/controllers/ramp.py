"""Scales that grow over the first steps."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import SlimtuneError, StructureError
from ..structures.base import check_count
from .base import Controller, adapters

__all__ = ["Ramp"]


class Ramp(Controller):
    """s(t) = min(t / T, 1) s with t = 1 for the first optimizer step.

    SingLoRA, Bensaid et al. 2025, arXiv 2507.05566, eq. 8. The scale belongs to the step that comes next: once
    attached it is s / T, after k steps min((k + 1) / T, 1) s, in evaluations and files too. Evaluating does not move
    it, and neither do the backward passes that one step accumulates. Of several optimizers that step together,
    attach it to one: every step it sees counts. Starting from t = 1 rather than 0 the first step already learns.

    Args:
        steps: T, at least 1.
        share: T as a share of `total_steps`, where `steps` is None; the paper takes 1 % and finds 0.5 to 8 % alike.
        total_steps: optimizer steps of the run.
        adapter: name of the adapter to ramp; by default all those whose recipe names a Ramp.

    Raises:
        StructureError: neither `steps` nor `total_steps`, or either below 1, or a share outside (0, 1].
        SlimtuneError: when attached to a model without such an adapter.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(4, 4)); _ = st.adapt(model, st.singlora(rank=2))
        >>> optimizer = torch.optim.SGD(st.param_groups(model, lr=0.1))
        >>> scale = model[0].adapters["default"].scale
        >>> _ = st.attach(st.Ramp(steps=4), model, optimizer); first = scale.item()
        >>> optimizer.step(); first, scale.item()
        (0.25, 0.5)
    """

    def __init__(
        self,
        steps: int | None = None,
        *,
        share: float = 0.01,
        total_steps: int | None = None,
        adapter: str | None = None,
    ) -> None:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise StructureError(f"Ramp: share must be in (0, 1], got {share!r}")
        if steps is None:
            if total_steps is None:
                raise StructureError("Ramp: expected steps, or the total_steps of the run to take a share of")
            steps = max(1, round(share * total_steps))
        check_count(steps, "Ramp: steps")
        self.steps, self.adapter, self.done = steps, adapter, 0

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._adapters = [
            a
            for _, name, a in adapters(model)
            if (name == self.adapter if self.adapter is not None else "Ramp" in a.recipe.controllers)
        ]
        if not self._adapters:
            what = "whose recipe names a Ramp" if self.adapter is None else f"called {self.adapter!r}"
            raise SlimtuneError(f"Ramp: the model has no adapter {what}")
        self._set()

    def after_step(self, model: nn.Module) -> None:
        self.done += 1
        if self.done < self.steps:  # once full it is left alone
            self._set()

    def missing(self) -> str | None:
        if self.done + 1 < self.steps:
            return f"the run ended after {self.done} of the ramp's {self.steps} steps, so the scale is not yet full"
        return None

    @torch.no_grad()
    def _set(self) -> None:
        u = min((self.done + 1) / self.steps, 1.0)
        for adapter in self._adapters:
            adapter.scale.fill_(u * adapter.recipe.scale(adapter.structure.rank))
