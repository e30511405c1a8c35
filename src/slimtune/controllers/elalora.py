"""Ranks that move between layers while they train.

Shapes: O out, I in, R rank.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import StructureError
from ..layers import Host
from ..ops.processes import summed, whole
from ..ranks import seeded
from ..structures.base import check_count
from ..taps import Left, Listening, Right, Tap
from ..targets import hosts
from .allocator import Allocator, Change, Scores, check_share, length_of
from .exchange import exchange, exchange_by_gain, moving

__all__ = ["ElaLoRA"]

RULES = ("published", "improved")


def outside(M: Tensor, v: Tensor, exact: bool = True) -> Tensor:
    """v without what the columns of M span, of length 1.

    Args:
        M: (I, R); fewer columns than rows.
        v: (I,).
        exact: by an orthonormal basis of M, twice, which leaves 1e-8; else v - M M^T v once, which is that only if the
            columns are orthonormal, as in the published code: with rows of N(0, 0.02^2) up to 9 % of a row stay in.
    """
    if exact:
        Q = torch.linalg.qr(M)[0]
        for _ in range(2):
            v = v - Q @ (Q.t() @ v)
    else:
        v = v - M @ (M.t() @ v)
    return v / (v.norm() + 1e-6)


class Residual:
    """Listens to a layer for its residual gradient (I - P_B) G (I - P_A), with G = dL/dW, (O, I), and P the projections
    onto the spans of B's columns and A's rows.

    Kept are the sums G Omega^T, (O, K), and Psi^T G, (2 K, I), over the passes of one step, with random Omega and Psi
    and K = `count` + 4: a sketch from which its leading singular triples follow, as in Tropp et al. 2017, arXiv
    1609.00048, algorithm 4; exactly, where K is at least its rank.
    """

    def __init__(self, host: Host, A: Tensor, B: Tensor, count: int, generator: torch.Generator) -> None:
        room = min(A.shape[1] - len(A), len(B) - B.shape[1])
        width = max(min(count + 4, room), 1)
        self.QA, self.QB = torch.linalg.qr(A.t())[0], torch.linalg.qr(B)[0]
        Omega = torch.randn(A.shape[1], width, generator=generator).to(A)
        Psi = torch.randn(len(B), 2 * width, generator=generator).to(B)
        self.Omega = (Omega - self.QA @ (self.QA.t() @ Omega)).t().contiguous()  # (K, I)
        self.Psi = Psi - self.QB @ (self.QB.t() @ Psi)  # (O, 2 K)
        self.tap = Tap(host, [Left(self.Omega), Right(self.Psi, A.dtype)], Listening())
        self.handle = host.register_forward_hook(self.tap.forward, with_kwargs=True, prepend=True)

    def triples(self) -> tuple[Tensor, Tensor, Tensor]:
        """(U (O, K), S (K,), V (K, I)); S is 0 where the gradient or a factor is not finite, or no gradient came by."""
        for product in self.tap.products:
            if product.total is None:
                product.start(self.tap.host, self.QA.device)
            product.total = summed(product.total, self.tap.host.weight.device)  # type: ignore[arg-type]
        Y, Z = (product.total for product in self.tap.products)
        parts: Any = (Y, Z, self.QA, self.QB, self.Psi)
        self.finite = all(bool(t.isfinite().all()) for t in parts)
        if not self.finite:
            parts = map(torch.zeros_like, parts)
        Y, Z, QA, QB, Psi = parts
        Q = torch.linalg.qr(Y - QB @ (QB.t() @ Y))[0]
        X = torch.linalg.pinv(Psi.t() @ Q) @ (Z - (Z @ QA) @ QA.t())
        U, S, V = torch.linalg.svd(X, full_matrices=False)
        return Q @ U, S, V


class _Eager:
    """While there is one of these, what is compiled runs as it is written: hooks that come after compilation are not
    called otherwise. That holds for the whole process, so that one which is forgotten ends with its owner."""

    count: ClassVar[int] = 0
    stance: ClassVar[Any] = None

    def __init__(self) -> None:
        if not _Eager.count:
            _Eager.stance = torch.compiler.set_stance("force_eager")
        _Eager.count += 1
        self.end = weakref.finalize(self, _Eager.ended)

    @staticmethod
    def ended() -> None:
        _Eager.count -= 1
        if not _Eager.count:
            _Eager.stance.__exit__(None, None, None)


class ElaLoRA(Allocator):
    """Ranks move from layers where they matter least to layers where they matter most, during training.

    ElaLoRA, Chang et al. 2025, arXiv 2504.00254, as its code has it. With t = 0 for the first optimizer step:

        t <= warmup                      scores are gathered (see `Allocator`), no rank moves
        warmup < t < total - final       every `interval` steps a round: up to b(t) ranks go, as many come
        t >= total - final               nothing moves and nothing is gathered any more

    with b(t) = round(b (1 - p^3)), p from 0 at `warmup` to 1 at total - final. In a round of the *published* rule every
    layer puts up its k worst ranks; of all those the b(t) worst are taken away, and the b(t) best give their layer one
    more, of core 0, with directions that are random and orthogonal to those of the layer's other ranks. A round leaves
    learning rates, schedules and the moments of every rank that stays as they are, and growing leaves dW as it is.

    By that rule a layer grows whose ranks are all good, which says little about what one more would do; a layer of
    rank 1 is never asked; and a random direction takes long to be of use, so that it is often the next to go. The
    *improved* rule (ours) asks the gradient. Of the step before a round every layer sketches its residual gradient
    (I - P_B) G (I - P_A), what of G = dL/dW its ranks cannot follow, in O(k (O + I)) numbers and with no more passes.
    Ranks go to the layers where its squared singular values are largest per parameter, and start in the directions of
    those singular vectors, with the length of the layer's others. They come from the layers where sqrt(S) per
    parameter is smallest. The total of parameters stays within that of the start, rather than that of ranks; scores
    remember a whole interval, beta = 1 - 1 / interval.

    Under DDP and FSDP2 shapes stay as they are. Ranks then move among slots, so that the structure must have more of
    them than ranks at the start: `start`, or the recipe's `ceiling`. Under torch.compile `masked=True` avoids compiling
    anew at every round; the step whose gradient is sketched runs uncompiled.

    Args:
        k: how many ranks a layer gives or gets in one round, at most.
        b: how many ranks come in one round, at most; 0 for none, ever. The paper's runs: 4, of k = 2.
        warmup: steps before the first interval, or a share of `total_steps` (a number that is not whole).
        final: steps at the end without rounds, likewise.
        interval: steps between rounds, likewise. The paper's runs: 14 to 26 %, 19 to 47 % and 2.4 to 4.3 %.
        schedule: b(t) rather than b.
        rule: improved or published.
        orthogonal: new directions exactly orthogonal to the others; False for one projection v - A^T A v, as published,
            which is that only once the others are orthonormal.
        start: ranks live at the start, where the structure has more slots; None for all.
        unit: what the budget counts, "ranks" or "parameters"; None for parameters by the improved rule.
        beta: of the scores' averages; None for 0.85 by the published rule, max(0.85, 1 - 1 / interval) by the improved.
        total_steps: optimizer steps of the run.
        adapter: name of the adapter to act on; by default the one that trains and whose recipe names ElaLoRA.
        floor: ranks that every layer keeps, at least 1.
        ceiling: ranks that a layer has at most; None for no limit but min(O, I).
        masked: keep shapes as they are, until `end`; None where several processes train (see `Allocator`).
        seed: of new directions and sketches.

    Raises:
        StructureError: an option of the wrong type or outside its range; phases that leave no step between them; masked
            mode where no layer has a slot to spare; the improved rule on structures without factors A and B.
        SlimtuneError: no such adapter, another optimizer's parameters, a state saved at other ranks than the model's.

    Warns:
        UserWarning: no gradient came by where the improved rule looks for it; the round is passed over.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)); _ = st.adapt(model, st.elalora(rank=4))
        >>> optimizer = torch.optim.AdamW(st.param_groups(model))
        >>> _ = st.attach(st.ElaLoRA(total_steps=100, b=1, interval=10), model, optimizer)
        >>> for _ in range(100):
        ...     optimizer.zero_grad(); model(torch.randn(16, 8)).square().sum().backward(); optimizer.step()
        >>> sum(row.rank for row in st.summary(model).rows)
        8
    """

    def __init__(
        self,
        *,
        k: int = 2,
        b: int = 4,
        warmup: float = 0.15,
        final: float = 0.25,
        interval: float = 0.03,
        schedule: bool = True,
        rule: str = "improved",
        orthogonal: bool = True,
        start: int | None = None,
        unit: str | None = None,
        beta: float | None = None,
        total_steps: int | None = None,
        adapter: str | None = None,
        floor: int = 1,
        ceiling: int | None = None,
        masked: bool | None = None,
        seed: int = 0,
    ) -> None:
        if total_steps is None:
            raise StructureError("ElaLoRA: expected the total_steps of the run: its schedule ends with it")
        check_count(total_steps, "ElaLoRA: total_steps")
        check_count(k, "ElaLoRA: k")
        check_count(b, "ElaLoRA: b", 0)
        if rule not in RULES:
            raise StructureError(f"ElaLoRA: rule must be one of {', '.join(RULES)}, got {rule!r}")
        for what, value in (("schedule", schedule), ("orthogonal", orthogonal)):
            if not isinstance(value, bool):
                raise StructureError(f"ElaLoRA: {what} must be true or false, got {value!r}")
        if start is not None:
            check_count(start, "ElaLoRA: start", floor)
        improved = rule == "improved"
        if unit == "parameters" and not improved:
            raise StructureError("ElaLoRA: the published rule counts ranks; take rule='improved' to count parameters")
        self.warmup = check_share(warmup, "ElaLoRA: warmup", total_steps)
        self.final = check_share(final, "ElaLoRA: final", total_steps)
        self.interval = check_share(interval, "ElaLoRA: interval", total_steps, 1)
        if self.warmup + self.final >= total_steps > 1:
            raise StructureError(
                f"ElaLoRA: warmup = {warmup} and final = {final} leave no step for rounds{length_of(total_steps)}"
            )
        if beta is None:
            beta = max(0.85, 1 - 1 / self.interval) if improved else 0.85
        super().__init__(
            adapter=adapter,
            unit=unit or ("parameters" if improved else "ranks"),
            floor=floor,
            ceiling=ceiling,
            beta1=beta,
            beta2=beta,
            masked=masked,
            seed=seed,
        )
        self.total_steps, self.k, self.b, self.schedule, self.rule = total_steps, k, b, schedule, rule
        self.orthogonal, self.start = orthogonal, start
        self.budget: int | None = None
        """What all ranks together may cost."""

    def moves(self, t: int) -> int:
        """How many ranks a round after step t, counted from 1, would move."""
        return moving(t - 1, self.b, self.warmup, self.final, self.total_steps, self.schedule)

    def observes(self, t: int) -> bool:
        return t - 1 < self.total_steps - self.final

    def due(self, t: int) -> bool:
        since = t - 1 - self.warmup
        return self.observes(t) and since > 0 and since % self.interval == 0 and self.moves(t) > 0

    def most(self, layer: str) -> int:
        structure = self.layers[layer]
        return min(super().most(layer), structure.out_features, structure.in_features)

    def check(self) -> None:
        start = self.start if self.start is not None and not self.done else None
        for layer in self.sizes:
            dims = self.layers[layer].rank_dims
            if self.rule == "improved" and (dims.get("A"), dims.get("B")) != (0, 1):
                raise StructureError(
                    f"ElaLoRA: {layer}: {type(self.layers[layer]).__name__} has no factors A and B that new ranks "
                    "could start in; take rule='published'"
                )
        spare = any(self.off.values()) or any(start is not None and start < size for size in self.sizes.values())
        if self._masked and not spare and self.b and self.observes(self.done + 1):
            raise StructureError(
                "ElaLoRA: shapes stay fixed under DDP, FSDP2 and masked=True, and every layer is full, so no rank "
                "could move; give the recipe a ceiling above its rank, as in elalora(rank=8, ceiling=16)"
            )

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._probes: dict[str, Residual]
        self._stop_listening()
        super().begin(model, optimizer)
        found = hosts(model)
        self._hosts = {layer: found[layer] for layer in self.layers}
        self._directions: dict[str, tuple[Tensor, Tensor]] = {}
        self._gains: dict[str, list[float]] = {}
        self._listen()

    def before_step(self, model: nn.Module) -> None:
        if self.done or self.budget is not None:
            return
        if self.start is not None:
            for layer, size in self.sizes.items():
                if size < self.start:
                    raise StructureError(f"ElaLoRA: {layer}: {size} slots cannot hold {self.start} ranks")
            first = list(range(self.start))
            self.carry_out({layer: Change(first) for layer, size in self.sizes.items() if size > self.start})
        self.budget = self.spent()

    def after_step(self, model: nn.Module) -> None:
        if self._probes:
            self._ask()
        super().after_step(model)
        if self.done == 1 and self.start is not None and self._news is None:
            self._news = {"ranks": self.ranks()}  # `before_step` took slots away
        self._directions, self._gains = {}, {}
        if self.observes(self.done - 1) and not self.observes(self.done):
            self.forget()
        self._listen()

    def end(self, model: nn.Module) -> None:
        self._stop_listening()
        super().end(model)

    def missing(self) -> str | None:
        if self.done < self.total_steps - self.final:
            return (
                f"the run ended after {self.done} of its {self.total_steps} steps; ranks were to move until "
                f"step {self.total_steps - self.final}"
            )
        return self._overran(self.total_steps)

    def release(self) -> None:
        self._stop_listening()

    def decide(self, t: int, scores: Scores) -> dict[str, Change]:
        layers, slots = list(scores), [list(row) for row in scores.values()]
        rows = [list(row.values()) for row in scores.values()]
        ceilings, b = [self.most(layer) for layer in layers], self.moves(t)
        if self.rule == "published":
            gone, grown = exchange(rows, self.k, b, ceilings, self.floor)
        else:
            gains, costs = [self._gains[layer] for layer in layers], [self.cost(layer) for layer in layers]
            slack = (self.budget or self.spent()) - self.spent()
            gone, grown = exchange_by_gain(rows, gains, self.k, b, costs, slack, ceilings, self.floor)
        changes = {}
        for i, layer in enumerate(layers):
            keep = [j for n, j in enumerate(slots[i]) if (i, n) not in gone]
            if len(keep) < len(slots[i]) or i in grown:
                changes[layer] = Change(keep, grown.count(i))
        return changes

    @torch.no_grad()
    def grown(self, layer: str, keep: Sequence[int], count: int) -> dict[str, Tensor]:
        new = super().grown(layer, keep, count)
        structure = self.layers[layer]
        for name, dim in structure.rank_dims.items():
            values, rows = new[name].movedim(dim, 0), whole(getattr(structure, name)).movedim(dim, 0)[list(keep)]
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            if values.dim() != 2 or not values.any():
                continue  # what makes dW of a new rank 0
            if layer in self._directions:
                values.copy_(self._directions[layer][dim][:count])
            length = rows.norm(dim=1).mean() if self.rule == "improved" and len(rows) else 1.0
            for j in range(count):
                v = length * outside(rows.t(), values[j].to(rows), self.orthogonal)
                values[j] = v
                rows = torch.cat([rows, v[None]])
        return new

    # ---- the residual gradient

    @torch.no_grad()
    def _listen(self) -> None:
        """Sketch the gradients of the next step, if a round follows it."""
        if self.rule != "improved" or not self.due(self.done + 1):
            return
        self._check_sizes()
        for layer, structure in self.layers.items():
            factors = (whole(getattr(structure, name)).movedim(dim, 0) for name, dim in (("A", 0), ("B", 1)))
            A, B = (t[self.live(layer)].to(torch.promote_types(t.dtype, torch.float32)) for t in factors)
            draw = seeded(self.seed, layer, self.done, "probe")
            self._probes[layer] = Residual(self._hosts[layer], A, B.t(), self.k, draw)
        self._eager = _Eager() if "torch._dynamo" in sys.modules else None

    def _stop_listening(self) -> None:
        for probe in vars(self).get("_probes", {}).values():
            probe.handle.remove()
        self._probes = {}
        if eager := vars(self).get("_eager"):
            eager.end()
        self._eager = None

    @torch.no_grad()
    def _ask(self) -> None:
        probes = self._probes
        self._stop_listening()
        for layer, probe in probes.items():
            U, S, V = probe.triples()
            self._directions[layer] = (V, U.t())
            self._gains[layer] = S[: self.k].square().tolist()
        if not all(probe.finite for probe in probes.values()):  # such a layer would seem to want no ranks
            self._gains = {layer: [] for layer in probes}
        if not any(map(any, self._gains.values())):
            warnings.warn(
                "ElaLoRA: no finite gradient came by in the step before a round, so no rank moves",
                UserWarning,
                stacklevel=2,
            )
