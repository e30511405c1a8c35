"""Ranks taken away where they matter least, on a budget that falls with the cube of what is left of the time."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import StructureError
from ..ranks import starts_at_mean
from ..structures.base import check_count
from .allocator import Allocator, Change, Scores, best_ranks, check_share, clear_slots, length_of

__all__ = ["AdaLoRA", "cubic_budget"]


def cubic_budget(t: int, full: int, target: int, t_init: int, t_final: int, total_steps: int) -> int:
    """b(t): `full` up to t_init, `target` from T - t_final on, in between target + (full - target) u^3 rounded down,
    with u = 1 - (t - t_init) / (T - t_final - t_init).

    AdaLoRA, Zhang et al. 2023, arXiv 2303.10512, as its code has it; eq. 13 writes t - t_init - t_final in the
    numerator, which would start above `full`.

    Example:
        >>> [cubic_budget(t, 12, 6, 2, 5, 60) for t in (1, 2, 3, 5, 10, 30, 55, 60)]
        [12, 12, 11, 11, 9, 6, 6, 6]
    """
    if t <= t_init:
        return full
    if t >= total_steps - t_final:
        return target
    u = 1 - (t - t_init) / (total_steps - t_final - t_init)
    return int((full - target) * u**3 + target)


class AdaLoRA(Allocator):
    """Prunes from a larger rank to an average of `target`: after t steps the budget b(t) goes to the best ranks.

    AdaLoRA, Zhang et al. 2023, arXiv 2303.10512, algorithm 1: b(t) is `cubic_budget`, the score that of `Allocator`.
    For t_init steps nothing is pruned; then, every delta_t steps, the ranks that b(t) does not pay for; at
    T - t_final, for good, down to the target: tensors, gradients and optimizer state become that much smaller, and
    training goes on with what is left. T counts optimizer steps; a run that ends before T - t_final keeps what it has.

    As published, a pruned rank loses its core only and goes on training, so that it comes back if it is worth it; the
    total holds right after a round. With `regrow=False` a rank pruned is gone, and its memory with it, at every round.

    Other than PEFT's: ranks are pruned by index, so that equal scores never take too many; the momentum of a
    pruned rank is cleared; every layer keeps a rank; it acts by itself in any loop, and resumes anywhere.

    Args:
        target: average rank of a layer in the end.
        t_init: steps before the first pruning, or a share of `total_steps` (a number that is not whole).
        t_final: steps after the last pruning, likewise. The paper's runs: 9 to 15 % and 44 to 58 %.
        delta_t: steps between two prunings, likewise.
        regrow: whether ranks pruned before T - t_final may come back.
        total_steps: T, optimizer steps of the run.
        adapter: name of the adapter to act on; by default the one that trains and whose recipe names AdaLoRA.
        unit: "ranks", or "parameters" for a budget of `target` (O + I + 1), summed over layers, where S is weighed
            against what a rank costs.
        floor: ranks that every layer keeps, at least 1.
        ceiling: ranks that a layer has at most in the end; None for no limit.
        beta1: of the sensitivity's mean, in (0, 1).
        beta2: of the uncertainty's, in (0, 1).
        masked: keep shapes as they are, until `end`; None where several processes train (see `Allocator`).

    Raises:
        StructureError: an option out of its range, no total_steps, a schedule that leaves no step to prune in; when
            attached, a target above the present ranks, floor or ceiling that do not go with it, structures
            whose ranks cannot change or, with regrow, without a core.
        SlimtuneError: no such adapter, another optimizer's parameters, a state saved at other ranks than the model's.

    Example:
        >>> import slimtune as st
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)); _ = st.adapt(model, st.adalora(rank=2))
        >>> optimizer = torch.optim.AdamW(st.param_groups(model))
        >>> controllers = st.controllers_of(model[0].adapters["default"].recipe, total_steps=6)
        >>> handles = [st.attach(c, model, optimizer) for c in controllers]
        >>> for _ in range(6):
        ...     model(torch.randn(2, 8)).square().mean().backward(); optimizer.step(); optimizer.zero_grad()
        >>> sum(row.rank for row in st.summary(model).rows)
        4
    """

    def __init__(
        self,
        target: int = 8,
        *,
        t_init: float = 0.1,
        t_final: float = 0.5,
        delta_t: float = 10,
        regrow: bool = True,
        total_steps: int | None = None,
        adapter: str | None = None,
        unit: str = "ranks",
        floor: int = 1,
        ceiling: int | None = None,
        beta1: float = 0.85,
        beta2: float = 0.85,
        masked: bool | None = None,
    ) -> None:
        super().__init__(
            adapter=adapter, unit=unit, floor=floor, ceiling=ceiling, beta1=beta1, beta2=beta2, masked=masked
        )
        check_count(target, "AdaLoRA: target", floor)
        if ceiling is not None and ceiling < target:
            raise StructureError(f"AdaLoRA: ceiling must be at least target, {target}, got {ceiling!r}")
        if not isinstance(regrow, bool):
            raise StructureError(f"AdaLoRA: regrow must be true or false, got {regrow!r}")
        if total_steps is None:
            raise StructureError("AdaLoRA: expected the total_steps of the run: its schedule ends with it")
        check_count(total_steps, "AdaLoRA: total_steps")
        self.target, self.regrow, self.total_steps = target, regrow, total_steps
        self.t_init = check_share(t_init, "AdaLoRA: t_init", total_steps)
        self.t_final = check_share(t_final, "AdaLoRA: t_final", total_steps)
        self.delta_t = check_share(delta_t, "AdaLoRA: delta_t", total_steps, least=1)
        if not self.t_init < total_steps - self.t_final:
            raise StructureError(
                f"AdaLoRA: t_init = {t_init} and t_final = {t_final} leave no step to prune in{length_of(total_steps)}"
            )
        self.full = 0
        """The budget at the start, once attached."""

    @property
    def last(self) -> int:
        """T - t_final, the step of the last pruning."""
        return self.total_steps - self.t_final

    def budget(self, t: int) -> int:
        """b(t), in the budget's unit."""
        goal = self.target * sum(self.cost(layer) for layer in self.layers)
        return cubic_budget(t, self.full, goal, self.t_init, self.t_final, self.total_steps)

    def check(self) -> None:
        self.full = self.full or self.spent()
        goal = self.budget(self.last)
        # a budget of parameters need not come out even: what it leaves over is less than a rank
        rank = max(self.cost(layer) for layer in self.layers)
        if goal - self.full >= rank:
            raise StructureError(f"AdaLoRA: target {self.target} is a budget of {goal} {self.unit}, of {self.full}")
        if self.done >= self.last:
            return
        most = {layer: min(rank, self.most(layer)) for layer, rank in self.ranks().items()}
        if goal - sum(r * self.cost(layer) for layer, r in most.items()) >= rank:
            raise StructureError(f"AdaLoRA: with a ceiling of {self.ceiling} the layers cannot hold {goal} {self.unit}")
        if self.regrow:
            for layer, structure in self.layers.items():
                if "core" not in structure.rank_dims:
                    raise StructureError(
                        f"AdaLoRA: {layer}: a pruned rank comes back from its core, which {type(structure).__name__} "
                        "has not got here; take LowRank(core=True) or regrow=False"
                    )

    def missing(self) -> str | None:
        if self.done < self.last and self.spent() > self.budget(self.last):
            return (
                f"the run ended after {self.done} of its {self.total_steps} steps, before the last pruning at step "
                f"{self.last}, so the layers keep more ranks than the target of {self.target} on average"
            )
        return self._overran(self.total_steps)

    def observes(self, t: int) -> bool:
        return t < self.last

    def due(self, t: int) -> bool:
        return t == self.last or (self.t_init < t < self.last and t % self.delta_t == 0)

    def decide(self, t: int, scores: Scores) -> dict[str, Change]:
        costs = {layer: self.cost(layer) for layer in scores}
        # before the end a ceiling would take more than the budget asks for
        most = {layer: self.most(layer) for layer in scores} if t == self.last else None
        kept = best_ranks(scores, costs, self.budget(t), self.floor, most)
        return {layer: Change(keep) for layer, keep in kept.items() if len(keep) < len(scores[layer])}

    def carry_out(self, changes: Mapping[str, Change]) -> None:
        if self.done == self.last:
            super().carry_out(changes)
            self.forget()
        elif self.regrow:
            self._switch_off({layer: set(self.live(layer)) - set(change.keep) for layer, change in changes.items()})
            self._news = {"ranks": self.ranks() | {layer: len(change.keep) for layer, change in changes.items()}}
        else:
            super().carry_out(changes)

    @torch.no_grad()
    def _switch_off(self, pruned: Mapping[str, set[int]]) -> None:
        """Zero these ranks' cores, and their momentum, lest it brings them back at once. Second moments stay: without
        them the next step would be up to 3.2 learning rates long."""
        for layer, slots in pruned.items():
            structure = self.layers[layer]
            clear_slots(structure.core, 0, sorted(slots))  # type: ignore[arg-type]
            for name, dim in structure.rank_dims.items():
                p = getattr(structure, name)
                for key, v in self.moments(p):
                    if not starts_at_mean(key) and key not in self._keys:
                        clear_slots(v, dim, sorted(slots))
