"""Ranks that follow gates trained with the rest of the adapter.

Shapes: H heads, R rank, L layers.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DivergenceError, SlimtuneError, StructureError
from ..ops.processes import agreed, edited, local, several, whole
from ..ranks import change_ranks, seeded
from ..structures import GatedHeads
from ..structures.base import check_count
from .allocator import check_share
from .base import Controller, require_rates, trained_adapters

__all__ = ["ARD", "fill_ranks"]

SMOOTH = 1e-4
"""Where |x| of the variation over depth turns from quadratic to linear."""


def fill_ranks(
    wanted: Sequence[float], costs: Sequence[int], budget: int, least: int = 0, most: Sequence[int] | None = None
) -> list[int]:
    """Whole ranks that a budget pays for, given where it hurts least: rank j of gate i is worth `wanted[i]` - j.

    Every gate first gets `least`; then the rank worth most is added, of equal ones that of the earlier gate, until no
    rank that is left fits. So no gate that wants w gets round(w) + 1 before all others have theirs.

    Example:
        >>> fill_ranks([2.6, 1.2, 3.0], costs=[10, 10, 10], budget=60)
        [2, 1, 3]
    """
    ranks = [least] * len(wanted)
    left = budget - least * sum(costs)
    ends = most or [least + max(0, left) // cost for cost in costs]
    ranked = [(wanted[i] - j, -i, i) for i, end in enumerate(ends) for j in range(least, end)]
    for _, _, i in sorted(ranked, reverse=True):
        if costs[i] <= left:
            ranks[i] += 1
            left -= costs[i]
    return ranks


class ARD(Controller):
    """Trains how many ranks every head has: ARD-LoRA in our reading, for `GatedHeads`.

    ARD-LoRA, Shinwari and Usama 2025, arXiv 2506.18267: rank round(R0 alpha_h) per head, the objective
    L_task + lambda (sum |alpha_h| + beta TV(alpha)). There is no official code; the abstract gives the l1 and the total
    variation, the rest is ours. Counted in optimizer steps t = 0, 1, ...:

    1. t < Tw: alpha rests at 1, gates are hard: low rank head by head. The first step is always of this phase, since
       B = 0 gives alpha no gradient.
    2. Tw <= t < T - Tf: gates are soft, with tau falling from tau_start to tau_end exponentially. The optimizer moves
       alpha by the task's gradient alone; then, with eta the rate of alpha and D its step,

           alpha <- clip(alpha + sign(D) max(|D| - eta lambda beta, 0) - eta lambda w_h)

       which are the proximal steps of TV over time and of the l1 (in the gradient, Adam would divide them away: alpha
       would fall by the learning rate whatever lambda). Before the first of these steps and every `interval` after,
       each head is given round(R0 alpha_h) + slack ranks: the last are dropped, and new ones start with B = 0.
    3. t >= T - Tf: alpha rests, gates are hard, and each head holds its round(R0 alpha_h) ranks.

    eta is the learning rate of alpha's group times travel / (N eta_w), with N the steps of phase 2 and eta_w the rate
    that the group's schedule starts from (without a schedule, that at the start of phase 2): alpha moves by `travel`
    where the gradient, as Adam normalises it, is always 1 and the rate constant. lambda is in the same unit: a gate
    grows where its normalised gradient exceeds lambda.

    Args:
        total_steps: T.
        penalty: lambda.
        variation: beta.
        over: "time", or "depth" for beta sum_l |alpha_{l+1,h} - alpha_{l,h}| over the layers of one kind (names that
            differ in a number), smoothed within 1e-4 and taken as a gradient step.
        travel: see above.
        warmup: Tw, as a number of steps or a share of T below 1.
        final: Tf, likewise.
        interval: steps between two changes of ranks; a twentieth of phase 2 when None.
        tau_start: tau at the start of phase 2.
        tau_end: tau at its last step.
        slack: closed ranks held beyond round(R0 alpha_h) for the gate to open; of those dropped the gate is at most
            sigmoid(-slack / tau).
        least: ranks a head keeps.
        most: ranks a head may have; 2 R0 when None. In masked mode no more than it holds (`rows`).
        by_cost: w_h is what a rank of the head costs over the mean of all gates; 1 otherwise.
        budget: the most parameters that A and B may have in the end, as a whole number or, as any other, as a multiple
            of those of R0 ranks everywhere. Then lambda is the start of a dual ascent,
            lambda <- max(0, lambda + dual_rate / N (used / budget - 1)) after each step of phase 2, used = sum of
            R0 alpha_h times cost, and phase 3 starts with the ranks of `fill_ranks`.
        dual_rate: of that ascent.
        masked: keep all shapes; the closed gates alone take ranks away, until `end`. None for so where several
            processes train. Growth then takes spare ranks from the start (`rows` of the structure).
        adapter: name of the adapter; by default those whose recipe names the class.
        seed: of new ranks.

    Raises:
        StructureError: options that are none; a warm-up and final phase that leave no step between; a budget below
            `least` ranks everywhere, when attached.
        SlimtuneError: when attached to a model without such an adapter, or with two on one layer, or to an optimizer
            that does not hold its gates and, unless masked, its factors.
        DivergenceError: gates that are not finite.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(8, 8)); _ = st.adapt(model, st.ardlora(rank=4))
        >>> optimizer = torch.optim.AdamW(st.param_groups(model))
        >>> controller = ARD(total_steps=10, penalty=3.0); _ = st.attach(controller, model, optimizer)
        >>> for _ in range(10):
        ...     model(torch.randn(2, 8)).sum().backward(); optimizer.step(); optimizer.zero_grad()
        >>> model[0].adapters["default"].structure.rank
        1
    """

    _adjusts = frozenset(("penalty", "budget"))

    def __init__(
        self,
        *,
        total_steps: int,
        penalty: float = 0.1,
        variation: float = 0.1,
        over: str = "time",
        travel: float = 4.0,
        warmup: float = 0.1,
        final: float = 0.2,
        interval: int | None = None,
        tau_start: float = 0.5,
        tau_end: float = 0.05,
        slack: int = 2,
        least: int = 1,
        most: int | None = None,
        by_cost: bool = False,
        budget: float | None = None,
        dual_rate: float = 10.0,
        masked: bool | None = None,
        adapter: str | None = None,
        seed: int = 0,
    ) -> None:
        check_count(total_steps, "ARD: total_steps")
        for key, value in (("penalty", penalty), ("variation", variation), ("dual_rate", dual_rate)):
            _check_number(key, value, 0.0)
        for key, value in (("travel", travel), ("tau_start", tau_start), ("tau_end", tau_end)):
            _check_number(key, value, 1e-12)
        if over not in ("time", "depth"):
            raise StructureError(f"ARD: over must be 'time' or 'depth', got {over!r}")
        check_count(slack, "ARD: slack", 0)
        check_count(least, "ARD: least", 0)
        check_count(seed, "ARD: seed", 0)
        if isinstance(budget, float):
            _check_number("budget", budget, 1e-12)
        for key, count, low in (("interval", interval, 1), ("most", most, max(1, least)), ("budget", budget, 1)):
            if count is not None and not isinstance(count, float):
                check_count(count, f"ARD: {key}", low)
        for key, flag in (("masked", False if masked is None else masked), ("by_cost", by_cost)):
            if not isinstance(flag, bool):
                raise StructureError(f"ARD: {key} must be true or false, got {flag!r}")
        self.start = max(1, check_share(warmup, "ARD: warmup", total_steps))
        self.stop = total_steps - check_share(final, "ARD: final", total_steps)
        if self.stop <= self.start and total_steps > 2:
            raise StructureError(
                f"ARD: warm-up and final phase leave none of {total_steps} steps between: {self.start} and "
                f"{total_steps - self.stop}"
            )
        self.interval = interval or max(1, (self.stop - self.start) // 20)
        self.penalty, self.variation, self.over, self.travel = penalty, variation, over, travel
        self.tau_start, self.tau_end, self.slack = tau_start, tau_end, slack
        self.least, self.most, self.by_cost = least, most, by_cost
        self.budget, self.dual_rate = budget, dual_rate
        self.masked, self.adapter, self.seed = masked, adapter, seed
        self.done = 0
        """Optimizer steps taken."""
        self.full_rate: float | None = None
        """eta_w, once known."""

    # ---- the schedule

    def adapts(self, t: int) -> bool:
        """Whether alpha moves in step t."""
        return self.start <= t < self.stop

    def tau(self, t: int) -> float:
        """The temperature of step t; that of the nearest step of phase 2 outside it."""
        share = min(max((t - self.start) / max(1, self.stop - 1 - self.start), 0.0), 1.0)
        return self.tau_start * (self.tau_end / self.tau_start) ** share

    # ---- the controller

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._news: dict[str, Any] | None = None
        self._structures = self._find(model)
        self._alphas = [s.alpha for s in self._structures.values()]
        places = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        if not all(id(alpha) in places for alpha in self._alphas):
            raise SlimtuneError("ARD: attach it to the optimizer that holds the adapter's gates, alpha")
        self._groups = [places[id(alpha)] for alpha in self._alphas]
        require_rates((optimizer.param_groups[i] for i in self._groups), "ARD")
        self._masked = several() if self.masked is None else self.masked
        factors = [p for s in self._structures.values() for p in (s.A, s.B) if p.requires_grad]
        if not (self._masked or all(id(p) in places for p in factors)):
            raise SlimtuneError(
                "ARD: the optimizer holds the gates, but not A and B, whose shapes change: give all of them to one, in "
                "groups if need be, or take masked=True"
            )
        self._sizes = [local(alpha).numel() for alpha in self._alphas]
        costs = [float(s.rank_cost) for s in self._structures.values()]
        mean = sum(c * s.head_count for c, s in zip(costs, self._structures.values(), strict=True)) / sum(
            s.head_count for s in self._structures.values()
        )
        self._weights = self._spread([c / mean for c in costs]) if self.by_cost else 1.0
        self._low = self._spread([self.least / s.base_rank for s in self._structures.values()])
        self._high = self._spread([self._most(s) / s.base_rank for s in self._structures.values()])
        self._costs = self._spread(
            [c * s.base_rank for c, s in zip(costs, self._structures.values(), strict=True)],
            [s.head_count for s in self._structures.values()],
        )
        self._pairs = self._neighbours() if self.over == "depth" else None
        if isinstance(self.budget, float):
            total = sum(s.rank_cost * s.base_rank * s.head_count for s in self._structures.values())
            self.budget = int(self.budget * total)
        floor = self.least * sum(s.rank_cost * s.head_count for s in self._structures.values())
        if self.budget is not None and self.budget < floor:
            raise StructureError(
                f"ARD: a budget of {self.budget:,} parameters is below the {floor:,} of rank {self.least} everywhere"
            )
        self._hard: bool | None = None
        self._tau: float | None = None
        self._set()

    @torch.no_grad()
    def before_step(self, model: nn.Module) -> None:
        if self.adapts(self.done):
            self._before = self._flat()
        else:  # without a gradient no optimizer moves it, whatever its moments say
            for alpha in self._alphas:
                alpha.grad = None

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        self._news = None
        if self.adapts(self.done):
            self._regularise()
        self.done += 1
        if self.done == self.stop:
            self._round(0, settle=True)
        elif self.adapts(self.done) and (self.done - self.start) % self.interval == 0:
            self._round(self.slack)
        self._set()

    def missing(self) -> str | None:
        if self.done < self.stop:
            return (
                f"the run ended after {self.done} steps, before step {self.stop}, where gates come to whole ranks; "
                "they stay soft"
            )
        return None

    @torch.no_grad()
    def end(self, model: nn.Module) -> None:
        """Take away the ranks behind closed hard gates, where shapes may change; gates still soft stay as they are."""
        if self.adapts(self.done) or any(hasattr(s.A, "full_tensor") for s in self._structures.values()):
            return
        masked, self._masked = self._masked, False
        self._round(0)
        self._masked = masked

    def note(self) -> dict[str, Any] | None:
        return self._news

    # ---- the gates

    def _flat(self) -> Tensor:
        device = self._alphas[0].device  # layers may lie on several
        return torch.cat([local(alpha.detach()).to(device) for alpha in self._alphas])

    def _spread(self, values: Sequence[float], sizes: Sequence[int] | None = None) -> Tensor:
        """One value per layer, as `_flat` has the gates."""
        like = local(self._alphas[0].detach())
        return torch.cat([like.new_full((n,), v) for v, n in zip(values, sizes or self._sizes, strict=True)])

    def _regularise(self) -> None:
        groups = [self._optimizer.param_groups[i] for i in self._groups]  # load_state_dict makes new ones
        rates = [float(group["lr"]) for group in groups]
        if self.full_rate is None:
            self.full_rate = max(float(group.get("initial_lr", group["lr"])) for group in groups) or 1.0
        share = self.travel / ((self.stop - self.start) * self.full_rate)
        eta = rates[0] * share if len(set(rates)) == 1 else self._spread([rate * share for rate in rates])
        step = self._flat().sub_(self._before).mul_(share)
        strength = eta * (self.penalty * self.variation)
        if self._pairs is None:
            step = step.sign() * (step.abs() - strength).clamp_min(0)
        alpha = self._before + step
        if self._pairs is not None:
            low, high = self._pairs
            slope = ((alpha[high] - alpha[low]) / SMOOTH).clamp(-1, 1)
            slope = slope * (strength[low] if isinstance(strength, Tensor) else strength)
            alpha = alpha.index_add(0, high, slope, alpha=-1).index_add(0, low, slope)
        alpha = (alpha - eta * self.penalty * self._weights).clamp(self._low, self._high)
        torch._foreach_copy_([local(a.detach()) for a in self._alphas], list(alpha.split(self._sizes)))
        if self.budget is not None:
            used = float((torch.cat([whole(a.detach()).to(self._costs) for a in self._alphas]) * self._costs).sum())
            dual_rate = self.dual_rate / (self.stop - self.start)
            self.penalty = max(0.0, self.penalty + dual_rate * (used / self.budget - 1))

    def _neighbours(self) -> tuple[Tensor, Tensor]:
        """Indices into `_flat` of each gate and of the same gate one layer up."""
        kinds: dict[tuple[str, int], list[tuple[list[int], int]]] = {}
        at = 0
        for layer, size in zip(self._structures, self._sizes, strict=True):
            place = [int(number) for number in re.findall(r"\d+", layer)]
            kinds.setdefault((re.sub(r"\d+", "#", layer), size), []).append((place, at))
            at += size
        low: list[int] = []
        high: list[int] = []
        for (_, size), found in kinds.items():
            starts = [start for _, start in sorted(found)]
            for one, two in itertools.pairwise(starts):
                low += range(one, one + size)
                high += range(two, two + size)
        device = self._low.device
        return torch.tensor(low, dtype=torch.long, device=device), torch.tensor(high, dtype=torch.long, device=device)

    def _set(self) -> None:
        """Gates as the step that comes next wants them."""
        tau = self.tau(self.done)
        if tau != self._tau:  # as a number, which unlike a tensor made of it waits for no device
            taus = [s.tau for s in self._structures.values()]
            torch._foreach_zero_(taus)
            torch._foreach_add_(taus, tau)
            self._tau = tau
        hard = not self.adapts(self.done)
        if hard != self._hard:
            for structure in self._structures.values():
                structure.hard.fill_(hard)
            self._hard = hard

    # ---- the ranks

    def ranks(self) -> dict[str, list[int]]:
        """{layer: round(R0 alpha_h) of every head}.

        Raises:
            DivergenceError: a gate that is not finite.
        """
        for layer, structure in self._structures.items():
            if not whole(structure.alpha.detach()).isfinite().all():
                raise DivergenceError(f"ARD: {layer}: a gate is not finite; are its gradients?")
        return {layer: s.hard_ranks().tolist() for layer, s in self._structures.items()}

    def _settle(self) -> None:
        """Put alpha where its ranks cost no more than the budget."""
        wanted, costs, most = [], [], []
        for s in self._structures.values():
            wanted += [s.base_rank * a for a in whole(s.alpha.detach()).tolist()]
            costs += [s.rank_cost] * s.head_count
            most += [self._most(s)] * s.head_count
        ranks = agreed(lambda: fill_ranks(wanted, costs, int(self.budget or 0), self.least, most))
        at = 0
        for s in self._structures.values():
            values = [rank / s.base_rank for rank in ranks[at : at + s.head_count]]
            at += s.head_count
            edited(s.alpha.detach(), functools.partial(_copy, values))

    def _round(self, slack: int, settle: bool = False) -> None:
        """Give every head its ranks and `slack` more."""
        found = self.ranks()  # on every process: alpha may be sharded
        if settle and self.budget is not None:
            self._settle()
            found = self.ranks()
        ranks = agreed(lambda: found)
        self._news = {"ranks": {layer: sum(own) for layer, own in ranks.items()}, "heads": ranks}
        if self._masked:
            return
        for layer, structure in self._structures.items():
            most = self._most(structure)
            rows = [min(rank + slack, max(rank, most)) for rank in ranks[layer]]
            _hold(structure, rows, seeded(self.seed, layer, self.done), self._optimizer)

    def _most(self, structure: GatedHeads) -> int:
        most = 2 * structure.base_rank if self.most is None else self.most
        return min(most, *structure.rows()) if self._masked else most

    def _find(self, model: nn.Module) -> dict[str, GatedHeads]:
        found: dict[str, GatedHeads] = {}
        for layer, _, a in trained_adapters(model, "ARD", self.adapter):
            if isinstance(a.structure, GatedHeads) and a.structure.alpha.requires_grad:
                if layer in found:
                    raise SlimtuneError(f"ARD: {layer}: several adapters train there; say which by adapter=")
                found[layer] = a.structure
        if not found:
            raise SlimtuneError("ARD: the adapter has no gates in training; it acts on GatedHeads")
        return found


def _hold(
    structure: GatedHeads, rows: Sequence[int], generator: torch.Generator, optimizer: torch.optim.Optimizer
) -> None:
    """Keep the first `rows[h]` ranks of every head and add those missing; at least one is left in the layer."""
    rows = rows if sum(rows) else [1, *rows[1:]]
    held = list(zip(structure.heads.tolist(), structure.index.tolist(), strict=True))
    keep = [i for i, (head, j) in enumerate(held) if j < rows[head]]
    have = set(held)
    missing = [(h, j) for h, count in enumerate(rows) for j in range(count) if (h, j) not in have]
    if len(keep) == len(held) and not missing:
        return
    change_ranks(structure, keep, structure.ranks_at(missing, generator) if missing else None, [optimizer])
    held = [held[i] for i in keep] + missing
    order = sorted(range(len(held)), key=held.__getitem__)
    if order != list(range(len(held))):
        change_ranks(structure, order, None, [optimizer])


def _copy(values: Sequence[float], t: Tensor) -> None:
    t.copy_(t.new_tensor(values))


def _check_number(key: str, value: object, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < float("inf"):
        raise StructureError(f"ARD: {key} must be a number of at least {least:g}, got {value!r}")
