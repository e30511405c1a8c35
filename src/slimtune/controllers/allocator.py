"""What controllers that move ranks share: scores, masks, a plan that all processes carry out alike.

Shapes: O out, I in, R rank, L layers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import DivergenceError, SlimtuneError, StructureError
from ..ops.processes import agreed, edited, local, several, whole
from ..ranks import change_ranks, rank_states, seeded, starts_at_mean
from ..structures import Structure
from ..structures.base import check_count
from .base import Controller, trained_adapters

__all__ = ["ANY_LENGTH", "Allocator", "Change", "Scores", "best_ranks", "check_share", "clear_slots", "length_of"]

ANY_LENGTH = 10**9
"""Steps of a run that is not known yet: enough for any schedule given in steps."""

Scores = Mapping[str, Mapping[int, float]]
"""{layer: {slot: S of the rank there}}, live ranks only, layers in the model's order."""


class Change(NamedTuple):
    """What a round does to one layer: the slots whose ranks stay, and how many ranks are added."""

    keep: list[int]
    grow: int = 0


def best_ranks(
    scores: Scores, costs: Mapping[str, int], budget: int, floor: int = 1, ceiling: Mapping[str, int] | None = None
) -> dict[str, list[int]]:
    """The ranks to keep: those with the largest S / cost that `budget` pays for.

    Every layer first keeps its `floor` best. Of equal ranks the one of the later layer is kept, within a layer the one
    of the larger slot. With equal costs the total is the budget exactly; otherwise no rank left out would still fit.

    Args:
        costs: {layer: cost of one rank}.
        budget: what the ranks kept may cost together.
        floor: ranks that every layer keeps, however bad.
        ceiling: {layer: ranks that it keeps at most}.

    Returns:
        {layer: slots kept, ascending}.

    Example:
        >>> best_ranks({"a": {0: 1.0, 1: 5.0}, "b": {0: 1.0, 1: 1.0, 2: 7.0}}, {"a": 1, "b": 1}, budget=3)
        {'a': [1], 'b': [1, 2]}
    """
    ranked = [(s / costs[layer], i, j, layer) for i, layer in enumerate(scores) for j, s in scores[layer].items()]
    ranked.sort(reverse=True)
    most = {layer: len(scores[layer]) if ceiling is None else ceiling[layer] for layer in scores}
    kept: dict[str, list[int]] = {layer: [] for layer in scores}
    rest = []
    for item in ranked:
        _, _, j, layer = item
        if len(kept[layer]) < floor:
            kept[layer].append(j)
            budget -= costs[layer]
        else:
            rest.append(item)
    for _, _, j, layer in rest:
        if costs[layer] <= budget and len(kept[layer]) < most[layer]:
            kept[layer].append(j)
            budget -= costs[layer]
    return {layer: sorted(slots) for layer, slots in kept.items()}


def check_share(value: object, what: str, total_steps: int, least: int = 0) -> int:
    """Steps, from a whole number of them or a share of `total_steps` in [0, 1), as any other number is read.

    Raises:
        StructureError: anything else, or fewer than `least` steps given as such.
    """
    if isinstance(value, float) and 0 <= value < 1:
        return max(least, int(value * total_steps))
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise StructureError(
            f"{what} must be a number of steps, at least {least}, or a share of them in [0, 1), got {value!r}"
        )
    return value


def length_of(total_steps: int) -> str:
    """How long the run is, for a message; nothing where a recipe checks its options before that is known."""
    return "" if total_steps == ANY_LENGTH else f" of total_steps = {total_steps}"


class Allocator(Controller, ABC):
    """A controller that moves ranks between layers, by how sensitive the loss is to them.

    The score of AdaLoRA, Zhang et al. 2023, arXiv 2303.10512, eqs. 8 to 12, here per element w with gradient g, after
    each optimizer step, g as the step used it:

        I = |w g|,  Ib = beta1 Ib + (1 - beta1) I,  Ub = beta2 Ub + (1 - beta2) |I - Ib|,  s = Ib Ub

    and for a rank j the sum over the tensors that carry it, such as A, B and the core, of the mean of s over the
    entries of rank j. Ib and Ub start at zero, are kept in fp32 in `optimizer.state`, and stand still while a tensor
    has no gradient. They remember about 1 / (1 - beta) = 6.7 steps.

    A plan is made by process 0 and sent to the others. It is carried out in one of two ways. *Physical*: tensors
    shrink and grow, gradients and optimizer rows with them. *Masked*: shapes stay as they are, as torch.compile, DDP's
    buckets and FSDP2 want it; a rank that is off is zero in every tensor, gradient and moment, which no optimizer moves
    away from, and its slot serves the next rank that is added. `end` compacts.

    Subclasses say when (`observes`, `due`) and what (`decide`), and how a new rank starts (`grown`).

    Args:
        adapter: name of the adapter to act on; by default the one that trains and whose recipe names the class.
        unit: what a budget counts, "ranks" or "parameters": one rank costs 1, or as many numbers as it has, O + I + 1.
        floor: ranks that every layer keeps, at least 1.
        ceiling: ranks that a layer has at most; None for no limit of its own.
        beta1: of Ib, in (0, 1).
        beta2: of Ub, in (0, 1).
        masked: masked rather than physical; None for masked where several processes train.
        seed: of new ranks.

    Raises:
        StructureError: a unit, floor, ceiling, beta that is none; structures whose ranks cannot change.
        SlimtuneError: a model without such an adapter, parameters that the optimizer does not hold, or a state that was
            saved at other ranks than the model's.
        DivergenceError: a score that is not finite.
    """

    def __init__(
        self,
        *,
        adapter: str | None = None,
        unit: str = "ranks",
        floor: int = 1,
        ceiling: int | None = None,
        beta1: float = 0.85,
        beta2: float = 0.85,
        masked: bool | None = None,
        seed: int = 0,
    ) -> None:
        self._kind = type(self).__name__
        if unit not in ("ranks", "parameters"):
            raise StructureError(f"{self._kind}: unit must be 'ranks' or 'parameters', got {unit!r}")
        check_count(floor, f"{self._kind}: floor")
        if ceiling is not None:
            check_count(ceiling, f"{self._kind}: ceiling", floor)
        for what, beta in (("beta1", beta1), ("beta2", beta2)):
            if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 < beta < 1:
                raise StructureError(f"{self._kind}: {what} must be in (0, 1), got {beta!r}")
        if masked is not None and not isinstance(masked, bool):
            raise StructureError(f"{self._kind}: masked must be true, false or None, got {masked!r}")
        check_count(seed, f"{self._kind}: seed", 0)
        self.adapter, self.unit, self.floor, self.ceiling = adapter, unit, floor, ceiling
        self.beta1, self.beta2, self.masked, self.seed = beta1, beta2, masked, seed
        self.done = 0
        """Optimizer steps taken."""
        self.sizes: dict[str, int] = {}
        """{layer: slots}, its tensors' R."""
        self.off: dict[str, list[int]] = {}
        """{layer: slots without a rank}, masked mode only; layers with none are left out."""

    # ---- what a subclass says

    @abstractmethod
    def observes(self, t: int) -> bool:
        """Whether the gradients of step t (from 1) count."""

    @abstractmethod
    def due(self, t: int) -> bool:
        """Whether ranks move after step t."""

    @abstractmethod
    def decide(self, t: int, scores: Scores) -> dict[str, Change]:
        """{layer: what happens to it}, for layers to which something does. Process 0 alone calls it: no collectives."""

    def check(self) -> None:
        """The layers are known (`sizes`, `cost`, `most`): raise StructureError if no plan can suit them."""

    def grown(self, layer: str, keep: Sequence[int], count: int) -> dict[str, Tensor]:
        """Values of `count` ranks to add beside those kept, alike on every process; by default the structure's own."""
        return self._structures[layer].new_ranks(count, seeded(self.seed, layer, self.done))

    # ---- what a subclass may ask

    @property
    def layers(self) -> dict[str, Structure]:
        """The structures acted on, in the model's order."""
        return self._structures

    def live(self, layer: str) -> list[int]:
        """Slots that hold a rank, ascending."""
        off = set(self.off.get(layer, ()))
        return [j for j in range(self.sizes[layer]) if j not in off]

    def ranks(self) -> dict[str, int]:
        """The live rank of every layer."""
        return {layer: size - len(self.off.get(layer, ())) for layer, size in self.sizes.items()}

    def cost(self, layer: str) -> int:
        """What one rank of a layer costs in the budget's unit."""
        return self._costs[layer]

    def most(self, layer: str) -> int:
        """Ranks that a layer may have: `ceiling`, and in masked mode no more than its slots."""
        limits = [self.ceiling] if self.ceiling is not None else []
        limits += [self.sizes[layer]] if self._masked else []
        return min(limits) if limits else 2**31

    def spent(self) -> int:
        """What the live ranks cost together."""
        return sum(rank * self._costs[layer] for layer, rank in self.ranks().items())

    def moments(self, p: Tensor) -> list[tuple[str, Tensor]]:
        """What the optimizer's state holds of a parameter, or of a buffer nothing, in its shape: (key, tensor). Codes
        of 8-bit optimizers are left out: their 0 is not zero."""
        state = self._optimizer.state.get(p, {})
        floats = [(key, v) for key, v in state.items() if torch.is_tensor(v) and v.dim() and v.is_floating_point()]
        return [(key, v) for key, v in floats if v.shape == p.shape]

    def _overran(self, total_steps: int) -> str | None:
        if self.done <= total_steps:
            return None
        return f"made for {total_steps} steps, it has seen {self.done}; ranks stood still since its schedule ended"

    # ---- the controller

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._news: dict[str, Any] | None = None
        self._structures = self._find(model)
        self._keys = tuple(f"{self._kind.lower()}_{what}" for what in ("sensitivity", "uncertainty"))
        held = {p for group in optimizer.param_groups for p in group["params"]}
        self._parameters = [p for s in self._structures.values() for p, _ in _carriers(s) if p.requires_grad]
        if not held.issuperset(self._parameters):
            raise SlimtuneError(f"{self._kind}: attach it to the optimizer that holds the adapter's parameters")
        present = {layer: _rank(s) for layer, s in self._structures.items()}
        self._costs = {layer: self._cost(s) for layer, s in self._structures.items()}
        if not self.sizes:
            self.sizes = present
        self._same_ranks(present)
        self._masked = (several() or any(self.off.values())) if self.masked is None else self.masked
        self.check()

    def after_step(self, model: nn.Module) -> None:
        self.done += 1
        self._news = None
        if self.observes(self.done):
            self._observe()
        if self.due(self.done):
            scores = self.scores()
            self.carry_out(agreed(lambda: self.decide(self.done, scores)))

    def end(self, model: nn.Module) -> None:
        """Take away the slots that hold no rank, where shapes may change."""
        for layer, slots in list(self.off.items()):
            structure = self._structures[layer]
            if slots and not any(hasattr(p, "full_tensor") for p, _ in _carriers(structure)):
                change_ranks(structure, self.live(layer), None, [self._optimizer])
                self.sizes[layer] = _rank(structure)
                del self.off[layer]

    def note(self) -> dict[str, Any] | None:
        return self._news

    # ---- scores

    @torch.no_grad()
    def _observe(self) -> None:
        seen = [p for p in self._parameters if p.grad is not None]
        if not seen:
            return
        state = self._optimizer.state
        for p in seen:
            if self._keys[0] not in state[p]:
                dtype = torch.promote_types(p.dtype, torch.float32)
                state[p].update({key: torch.zeros_like(p, dtype=dtype) for key in self._keys})
        Ib, Ub = ([local(state[p][key]) for p in seen] for key in self._keys)
        w = [local(p).to(i.dtype) for p, i in zip(seen, Ib, strict=True)]
        g = [local(p.grad).to(i.dtype) for p, i in zip(seen, Ib, strict=True)]  # type: ignore[arg-type]
        work = torch._foreach_mul(w, g)
        torch._foreach_abs_(work)
        torch._foreach_lerp_(Ib, work, 1 - self.beta1)
        torch._foreach_sub_(work, Ib)
        torch._foreach_abs_(work)
        torch._foreach_lerp_(Ub, work, 1 - self.beta2)

    @torch.no_grad()
    def scores(self) -> dict[str, dict[int, float]]:
        """S of every live rank. With sharded parameters every process has to call it."""
        state, found = self._optimizer.state, []
        self._check_sizes()
        for layer, structure in self._structures.items():
            total = None
            for p, dim in _carriers(structure):
                if self._keys[0] in (own := state.get(p, {})):
                    s = whole(own[self._keys[0]] * own[self._keys[1]])
                    mean = s.movedim(dim, 0).flatten(1).mean(1) if s.dim() > 1 else s
                    total = mean if total is None else total + mean.to(total)
            found.append(torch.zeros(self.sizes[layer]) if total is None else total)
        device = found[0].device
        flat = torch.cat([s.to(device, torch.float64) for s in found]).tolist()
        scores, at = {}, 0
        for layer, size in self.sizes.items():
            scores[layer] = {j: flat[at + j] for j in self.live(layer)}
            at += size
            if not all(map(math.isfinite, scores[layer].values())):
                raise DivergenceError(f"{self._kind}: {layer}: a score is not finite; are its gradients?")
        return scores

    def forget(self) -> None:
        """Drop Ib and Ub: no more rounds will come."""
        for p in self._parameters:
            for key in self._keys:
                self._optimizer.state.get(p, {}).pop(key, None)

    # ---- changes

    def carry_out(self, changes: Mapping[str, Change]) -> None:
        """Make these changes, alike on every process, and put the ranks into the run's log."""
        if not changes:
            return
        for layer, (keep, grow) in changes.items():
            structure, live = self._structures[layer], self.live(layer)
            if not set(keep) <= set(live) or len(keep) + grow < 1:
                raise SlimtuneError(f"{self._kind}: {layer}: cannot keep {keep} of the ranks {live} and add {grow}")
            new = self.grown(layer, keep, grow) if grow else {}
            if self._masked:
                self._fill(layer, sorted(keep), grow, new)
            else:
                change_ranks(structure, keep, new, [self._optimizer])
                self.sizes[layer] = _rank(structure)
        self._news = {"ranks": self.ranks()}

    @torch.no_grad()
    def _fill(self, layer: str, keep: list[int], grow: int, new: Mapping[str, Tensor]) -> None:
        free = [j for j in range(self.sizes[layer]) if j not in set(keep)]
        if grow > len(free):
            raise SlimtuneError(
                f"{self._kind}: {layer}: no room for {grow} more ranks, {self.sizes[layer]} slots hold {len(keep)}; "
                "shapes are fixed while it is masked, so start with a larger rank"
            )
        structure, taken, off = self._structures[layer], free[:grow], free[grow:]
        for name, dim in structure.rank_dims.items():
            t: Tensor = getattr(structure, name)
            clear_slots(t, dim, free)
            if grow:
                _put(t, dim, taken, new[name])
            if t.grad is not None:
                clear_slots(t.grad, dim, free)
            for key, at in rank_states(self._optimizer, t, t.shape, dim).items():
                v = self._optimizer.state[t][key]
                clear_slots(v, at, free)
                if grow and keep and starts_at_mean(key):
                    kept = whole(v).index_select(at, torch.tensor(keep, device=v.device))
                    _put(v, at, taken, kept.mean(at, keepdim=True))
        self.off.pop(layer, None)
        if off:
            self.off[layer] = off

    # ---- finding the layers

    def _find(self, model: nn.Module) -> dict[str, Structure]:
        found = trained_adapters(model, self._kind, self.adapter)
        names = list(dict.fromkeys(name for _, name, _ in found))
        if len(names) > 1:
            raise SlimtuneError(f"{self._kind}: several adapters train: {', '.join(names)}; say which by adapter=")
        structures = {layer: a.structure for layer, _, a in found}
        for layer, structure in structures.items():
            if not structure.rank_dims:
                raise StructureError(f"{self._kind}: {layer}: the ranks of {type(structure).__name__} cannot change")
        return structures

    def _cost(self, structure: Structure) -> int:
        if self.unit == "ranks":
            return 1
        return sum(p.numel() for p, _ in _carriers(structure)) // _rank(structure)

    def _check_sizes(self) -> None:
        for layer, structure in self._structures.items():
            if _rank(structure) != self.sizes[layer]:
                raise SlimtuneError(
                    f"{self._kind}: {layer}: something else has changed its rank from {self.sizes[layer]} to "
                    f"{_rank(structure)}; resize before the controller is attached"
                )

    def _same_ranks(self, present: Mapping[str, int]) -> None:
        if set(self.sizes) != set(present):
            raise SlimtuneError(
                f"{self._kind}: its state is of a run that adapts {', '.join(self.sizes)}, the model has "
                f"{', '.join(present)}"
            )
        for layer, rank in present.items():
            if self.sizes[layer] != rank:
                raise SlimtuneError(
                    f"{self._kind}: {layer}: its state is of a run with rank {self.sizes[layer]} there, the model has "
                    f"{rank}; load the adapter of the same checkpoint first"
                )
        self.sizes = {layer: self.sizes[layer] for layer in present}  # in the model's order


def _carriers(structure: Structure) -> list[tuple[nn.Parameter, int]]:
    """The parameters that carry ranks, with the dimension that counts them."""
    pairs = ((getattr(structure, name), dim) for name, dim in structure.rank_dims.items())
    return [(p, dim) for p, dim in pairs if isinstance(p, nn.Parameter)]


def _rank(structure: Structure) -> int:
    name, dim = next(iter(structure.rank_dims.items()))
    return getattr(structure, name).shape[dim]


def clear_slots(t: Tensor, dim: int, slots: Sequence[int]) -> None:
    """Zero these slots along a dimension, in place, also of a sharded tensor."""
    if slots:
        edited(t, lambda t: t.index_fill_(dim, torch.tensor(slots, device=t.device), 0.0))


def _put(t: Tensor, dim: int, slots: Sequence[int], values: Tensor) -> None:
    shape = list(values.shape)
    shape[dim] = len(slots)
    edited(t, lambda t: t.index_copy_(dim, torch.tensor(slots, device=t.device), values.expand(shape).to(t)))
