"""From full-rank to low-rank training at the right moment, at the right ranks.

Shapes: O out, I in (a convolution's I is its input channels per group times its kernel), R rank, K = min(O, I),
G groups.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..compress import factorize, part_of, shared_weights
from ..errors import SlimtuneError, StructureError, TargetError
from ..factors import svd
from ..factors.base import Part, in_form, matrices
from ..layouts import ConvLayout, layout_of
from ..ops.processes import agreed, several
from ..ops.spectral import rank_by_energy, rank_by_sum
from ..speedup import Call, measure
from ..structured import Structured, check_holdable
from ..structures import Structure
from ..structures.base import check_count
from ..targets import HEADS, own_modules, pick, select, unwrapped
from .base import Controller
from .matrices import CONVOLUTIONS, convolutions
from .plateau import settled, slope
from .stableranks import frobenius_decay, random_stable_rank, scaled_rank, stable_ranks

__all__ = ["Cuttlefish"]

SHORTCUTS = ("shortcut", "downsample", "skip")
"""Parts of a name that tell a pointwise convolution beside others from one among them."""

RULES = ("scaled", "accumulative", "energy")
ACCUMULATIVE, ENERGY = 0.8, 0.9

RANDOM = 0.8
"""In the median over layers, weights at random have 0.97 to 1.06 of the stable rank that is expected of them; those of
a ResNet-20 and -56 trained on CIFAR-10 have 0.58 and 0.55, those of a small trained Llama 0.55."""


# ---------------------------------------------------------------- which layers


def _candidates(model: nn.Module, held: Iterable[Tensor]) -> dict[str, nn.Module]:
    """Layers that could be factorised in training: their weight is their own, trained, and of this optimizer."""
    of_optimizer = {id(p) for p in held}
    shared, found = shared_weights(model), {}
    for name, module in own_modules(model).items():
        weight = module._parameters.get("weight")
        if weight is None or not weight.requires_grad or id(weight) in shared or id(weight) not in of_optimizer:
            continue
        try:
            check_holdable(module, name)
        except TargetError:
            continue
        found[name] = module
    return found


def _by_default(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """Without the stem, the output head and pointwise shortcuts."""
    own = unwrapped(model)
    get = getattr(own, "get_output_embeddings", None)
    head = get() if callable(get) else None
    heads = [m for m in ([head] if head is not None else [getattr(own, n, None) for n in HEADS]) if m is not None]
    last = {m for h in heads for m in h.modules()} if heads else set(list(layers.values())[-1:])
    modules = list(own.modules())
    convolutions = [m for m in modules if layout_of(type(m)) is ConvLayout]
    embedded = any(isinstance(m, nn.Embedding) for m in modules)
    stem = convolutions[0] if convolutions else None if embedded else next(iter(layers.values()), None)
    wide = any(math.prod(m.kernel_size) > 1 for m in convolutions)  # type: ignore[arg-type,operator]
    chosen = []
    for name, module in layers.items():
        pointwise = layout_of(type(module)) is ConvLayout and math.prod(module.kernel_size) == 1  # type: ignore[arg-type]
        if pointwise and wide and any(part in name.lower() for part in SHORTCUTS):
            continue
        if module is not stem and module not in last:
            chosen.append(name)
    return chosen


# ---------------------------------------------------------------- the controller


class Cuttlefish(Controller):
    """Trains W until the stable ranks of its layers stand, then goes on with B A of those ranks in W's place.

    Cuttlefish, Wang et al. 2023, arXiv 2305.02538. Every `period` optimizer steps it looks at the stable rank
    rho = |W|_F^2 / s_1^2 of every tracked layer. When all have come to rest (`settled`), or when `latest` is reached,
    each layer gets a rank and `factorize` replaces W by the nearest B A of it, balanced, in the optimizer as well:
    groups and schedules hold, momentum M becomes B^T M and M A^T. From then on B and A decay by the gradient of
    decay / 2 |B A|_F^2 instead of their weight decay. At the start ranks rest as well, until something is learned: so
    at least half of the layers must first have moved, except under the rule "energy".

    In one's own loop that is nothing, or, with `automatic=False`, one line after the step:

        if cuttlefish.ready:
            st.factorize(model, cuttlefish.ranks, optimizer=optimizer)

    A rank follows one of three rules, s being the singular values:

    - "scaled": ceil(xi rho), xi = K / rho at the start. For weights that start at random.
    - "accumulative": the larger of that and the smallest R with sum_{j <= R} s_j >= keep sum s_j. For transformers
      from random weights.
    - "energy": the smallest R with sum_{j <= R} s_j^2 >= keep sum s_j^2. For pretrained weights, of which xi, being a
      ratio to ranks that they had before, says nothing.

    It is then at least `floor` K, rounded up to a `multiple` where that still saves, and a layer that would not become
    smaller is kept dense.

    The first `prefix` layers are kept dense. With "auto" it times, once and before the first step, layers of each stack
    (neighbours whose outputs are of one size) against factors of rank K / 4, forward and backward, and keeps the stacks
    before the first that becomes `speedup` times faster. What it found is state: a run that is resumed does not time
    again. Two runs may find different; give a number for runs that must be alike.

    Another model comes out of the switch: a copy such as an average of weights is to be made anew, a compiled model
    compiles once more. DistributedDataParallel holds the old parameters: `automatic=False`, factorise the inner model
    on every process and wrap it anew.

    To resume: put its state back (`Attached.load_state_dict`) first, then the model's and the optimizer's. After the
    switch that gives the model the ranks that the saved numbers have.

    Not built: batch normalisation between B and A (section 3 of the paper, in place of the decay), since the layer
    would no longer be a linear map that can be merged, saved and expanded.

    Args:
        total_steps: optimizer steps of the run. None takes away `earliest` and `latest`, and asks for a period.
        targets: layers to track and factorise: names, suffixes, globs, one regular expression, "all-linear", or
            "convolutions", those after the first whose kernel is larger than one. None for every linear layer and
            convolution in training but the stem (the first convolution; without any, and without embeddings, the first
            layer), the output head, and pointwise convolutions called `SHORTCUTS`.
        exclude: the same forms; what they match is left out.
        period: optimizer steps between two looks. None for a hundredth of the run, but at least 10 steps or, in runs of
            less than 200, a twentieth.
        rule: see above. None for "energy" where the weights do not look random when attached (the median of rho over
            that of a random matrix is below `RANDOM`), else "scaled".
        keep: share in (0, 1] of "accumulative" (0.8 when None) and "energy" (0.9).
        floor: share of K in [0, 1]. The released code takes 0.5 for DeiT, 0.2 for ResNet-50, none for CIFAR.
        multiple: that ranks are rounded up to.
        guard: keep layers dense that would not become smaller, which the paper does not.
        form: of convolutions, "channel" or "spatial".
        prefix: K of the paper, a number of layers in their order, or "auto"; when None "auto", but 0 where targets are
            given.
        speedup: see above.
        published: the detector as released: whole numbers for stable ranks, also in `scaled_rank`; slopes as they are
            rather than relative to the rank; a layer that has settled once stays so, whether it has moved or not; the
            switch one period after the detection. A period is then an epoch.
        window: of the average, and looks before the first decision; 5, or 15 if published.
        tail: looks whose slopes are averaged; 5, or 11.
        tolerance: of the slope: 0.01, relative to the rank, per hundredth of the run (without `total_steps` per look);
            if published 0.1 per look.
        relax: pairs (n, f): with at most n layers left to settle (unless published, at least half have), f
            times the tolerance.
        earliest: share of the run before which no layer settles, such as while the learning rate warms up.
        latest: share of the run at which the switch is forced.
        decay: lambda of the Frobenius decay; 0 leaves the factors their group's weight decay instead.
        reset: let the optimizer's state of all parameters start afresh at the switch, as published.
        rate: factor of all learning rates after the switch, such as 1 / 3 for DeiT. Schedules and what they log are
            left alone.
        rewarm: steps after the switch over which that factor rises linearly.
        automatic: factorise after the step in which the decision falls.

    Raises:
        StructureError: an option that is none, or neither `total_steps` nor `period`.
        TargetError: when attached, nothing to factorise, a layer that cannot be, or one that the optimizer lacks.
        SlimtuneError: when attached, sharded weights; several processes without `automatic=False`.
        DivergenceError: a weight that is not finite.

    Warns:
        UserWarning: when attached, weights that do not look random under a rule with xi; at the end, when no switch
            took place, or one that left every layer dense.

    Example:
        >>> import slimtune as st
        >>> _ = torch.manual_seed(0); model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        >>> cuttlefish = st.Cuttlefish(total_steps=8, rule="energy", keep=0.5, prefix=0)
        >>> _ = st.attach(cuttlefish, model, optimizer)
        >>> for _ in range(8):
        ...     optimizer.zero_grad(); model(torch.randn(4, 16)).square().mean().backward(); optimizer.step()
        >>> cuttlefish.switched_at, cuttlefish.ranks
        (4, {'1': 16})
    """

    replaces = True

    def __init__(
        self,
        *,
        total_steps: int | None = None,
        targets: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        period: int | None = None,
        rule: str | None = None,
        keep: float | None = None,
        floor: float = 0.0,
        multiple: int = 8,
        guard: bool = True,
        form: str = "channel",
        prefix: int | str | None = None,
        speedup: float = 1.5,
        published: bool = False,
        window: int | None = None,
        tail: int | None = None,
        tolerance: float | None = None,
        relax: Sequence[Sequence[float]] = ((1, 5.0), (2, 2.5)),
        earliest: float = 0.1,
        latest: float = 0.5,
        decay: float = 1e-4,
        reset: bool = False,
        rate: float = 1.0,
        rewarm: int = 0,
        automatic: bool = True,
    ) -> None:
        flags = {"guard": guard, "published": published, "reset": reset, "automatic": automatic}
        for key, flag in flags.items():
            if not isinstance(flag, bool):
                raise StructureError(f"Cuttlefish: {key} must be true or false, got {flag!r}")
        for key, count, least in (
            ("total_steps", total_steps, 1),
            ("period", period, 1),
            ("multiple", multiple, 1),
            ("window", window, 1),
            ("tail", tail, 1),
            ("rewarm", rewarm, 0),
        ):
            if count is not None:
                check_count(count, f"Cuttlefish: {key}", least)
        if total_steps is None and period is None:
            raise StructureError("Cuttlefish: expected total_steps, the length of the run, or a period")
        if rule is not None and rule not in RULES:
            raise StructureError(f"Cuttlefish: rule must be one of {', '.join(RULES)}, got {rule!r}")
        if rule == "scaled" and keep is not None:
            raise StructureError("Cuttlefish: keep belongs to the rules accumulative and energy, not to scaled")
        for key, share, open_ in (
            ("keep", 1.0 if keep is None else keep, True),
            ("floor", floor, False),
            ("earliest", earliest, False),
            ("latest", latest, True),
        ):
            _check_number(key, share, 0.0, 1.0, open_)
        if earliest >= latest:
            raise StructureError(f"Cuttlefish: earliest must be before latest, got {earliest!r} and {latest!r}")
        tolerance = (0.1 if published else 0.01) if tolerance is None else tolerance
        _check_number("tolerance", tolerance, 0.0)
        _check_number("decay", decay, 0.0)
        _check_number("speedup", speedup, 0.0, open_=True)
        _check_number("rate", rate, 0.0, open_=True)
        in_form(Part("", torch.zeros(1, 1)), form)
        prefix = ("auto" if targets is None else 0) if prefix is None else prefix
        if prefix != "auto":
            if isinstance(prefix, str):
                raise StructureError(f"Cuttlefish: prefix must be a number of layers or 'auto', got {prefix!r}")
            check_count(prefix, "Cuttlefish: prefix", 0)
        try:
            pairs = [[int(n), float(f)] for n, f in relax]
        except (TypeError, ValueError):
            raise StructureError(f"Cuttlefish: relax must hold pairs (layers left, factor), got {relax!r}") from None
        self.total_steps, self.rule, self.keep, self.floor = total_steps, rule, keep, floor
        self.targets = targets if targets is None or isinstance(targets, str) else list(targets)
        self.exclude = exclude if isinstance(exclude, str) else list(exclude)
        length = total_steps or 1
        self.period = period or max(1, round(length / 100), min(10, length // 20))
        self.multiple, self.guard, self.form = multiple, guard, form
        self.prefix, self.speedup, self.published = prefix, speedup, published
        self.window = window or (15 if published else 5)
        self.tail = tail or (11 if published else 5)
        self.tolerance, self.relax, self.earliest, self.latest = tolerance, pairs, earliest, latest
        self.decay, self.reset, self.rate, self.rewarm, self.automatic = decay, reset, rate, rewarm, automatic
        self.done = 0
        """Optimizer steps taken."""
        self.layers: list[str] = []
        """Layers tracked, in the model's order."""
        self.dense: list[str] | None = None
        """Those before the first that is worth it; None until they are known."""
        self.speedups: list[list[Any]] = []
        """[layers of a stack, measured speed-up] of those that were timed."""
        self.chosen = rule
        """The rule, once the weights have been seen."""
        self.first: dict[str, float] = {}
        """Stable rank of every layer at the start."""
        self.history: dict[str, list[float]] = {}
        """Stable ranks, look by look, from the start; whole numbers if published."""
        self.moved: list[str] = []
        """Layers whose slope has been above the tolerance."""
        self.stable: list[str] = []
        """Layers that have settled."""
        self.settled_at: int | None = None
        """The step after which all had."""
        self.ranks: dict[str, int] | None = None
        """The layers to factorise, with their ranks, once that is decided."""
        self.switched_at: int | None = None
        """The step after which the model had them."""

    # ---- what one asks

    @property
    def ready(self) -> bool:
        """Whether the ranks are decided and the model has yet to be factorised."""
        return self.ranks is not None and any(not isinstance(self._modules[name], Structured) for name in self.ranks)

    # ---- the controller

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.release()
        self._optimizer = optimizer
        self._news: dict[str, Any] | None = None
        if self.automatic and several():
            raise SlimtuneError(
                "Cuttlefish: several processes train, and parameters cannot be replaced under their wrapper: give "
                "automatic=False, and once it is ready factorize the inner model on each of them and wrap it anew"
            )
        if self.layers:
            self._find(model)
            if self.switched_at is not None and self.ready:
                self._factorize(model)
        else:
            self._choose(model)
            self.first = agreed(lambda: stable_ranks(self._modules, self.form))
            self._choose_rule()
            self._record(self.first)
            if self.prefix != "auto":
                self._keep(self.layers[: int(self.prefix)])
        if self.dense is None:
            self._listen()

    def before_step(self, model: nn.Module) -> None:
        self._return()
        if self.dense is None:
            self._profile()
        self._notice()
        if self.switched_at is not None:
            self._penalise()
            self._borrow()

    def after_step(self, model: nn.Module) -> None:
        self._return()
        self.done += 1
        self._news = None
        if self.ranks is None:
            self._look(model)
        self._notice()

    def end(self, model: nn.Module) -> None:
        self._return()

    def missing(self) -> str | None:
        if self.switched_at is None:
            told = "decided but nobody factorised the model" if self.ranks else "yet to be made when the run ended"
            return f"the switch was {told}, after {self.done} steps; all layers are dense"
        if not self.ranks:
            return "no layer would have become smaller, or faster, by being factorised; all were kept dense"
        return None

    def release(self) -> None:
        for handle in vars(self).pop("_handles", []):
            handle.remove()
        self._return()

    def note(self) -> dict[str, Any] | None:
        return self._news

    # ---- which layers

    def _choose(self, model: nn.Module) -> None:
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        layers = _candidates(model, held)
        own = own_modules(model)
        if self.targets is None:
            names = _by_default(model, layers)
        elif self.targets == "all-linear":
            names = select(model, self.targets)
        elif self.targets == CONVOLUTIONS:
            names = convolutions(model)
        else:
            names = pick(self.targets, [n for n, m in own.items() if n in layers or layout_of(type(m))], "targets")
        if self.exclude:
            out = pick(self.exclude, own, "exclude")
            names = [n for n in names if not any(n == o or n.startswith(f"{o}.") for o in out)]
        for name in names:
            if name not in layers:
                self._refuse(own[name], name)
        if not names:
            raise TargetError("Cuttlefish: the model has no layer in training that could be factorised")
        self.layers = names
        self._modules = {name: own[name] for name in names}

    @staticmethod
    def _refuse(module: nn.Module, name: str) -> None:
        weight: Any = module._parameters.get("weight")
        if hasattr(weight, "full_tensor"):
            raise SlimtuneError(
                f"Cuttlefish: the weight of {name!r} is sharded and cannot be replaced: train unsharded till the switch"
            )
        check_holdable(module, name)
        if not weight.requires_grad:
            raise TargetError(f"Cuttlefish: the weight of {name!r} is frozen; targets must be layers in training")
        raise TargetError(
            f"Cuttlefish: the weight of {name!r} is shared with another layer, or not among the parameters of the "
            "optimizer it is attached to"
        )

    def _find(self, model: nn.Module) -> None:
        own = own_modules(model)
        gone = [name for name in self.layers if name not in own]
        if gone:
            raise TargetError(f"Cuttlefish: its state is of a model with a layer {gone[0]!r}, which this one lacks")
        self._modules = {name: own[name] for name in self.layers}

    def _choose_rule(self) -> None:
        expected = [random_stable_rank(*matrices(part_of(m, n), self.form).shape[1:]) for n, m in self._modules.items()]
        known = [rho / e for rho, e in zip(self.first.values(), expected, strict=True) if rho]
        looks_random = not known or median(known) >= RANDOM
        if self.rule is None:
            self.chosen = "scaled" if looks_random else "energy"
        elif self.rule != "energy" and not looks_random:
            warnings.warn(
                f"Cuttlefish: these weights do not start at random (stable rank {self.first[self.layers[0]]:.1f} of "
                f"{self.layers[0]!r}, a random one has {expected[0]:.1f}), so that xi of rule={self.rule!r} means "
                "nothing; rule='energy' is for pretrained weights",
                UserWarning,
                stacklevel=4,
            )

    # ---- the dense prefix

    def _keep(self, dense: list[str]) -> None:
        self.dense = dense
        for name in dense:
            self.history.pop(name, None)

    def _listen(self) -> None:
        """See how the layers are called, in which order, until the first step."""
        self._calls: dict[str, tuple[Call, tuple[int, ...]]] = {}
        self._handles = [
            module.register_forward_hook(partial(_heard, self._calls, name), with_kwargs=True)
            for name, module in self._modules.items()
        ]

    def _profile(self) -> None:
        self.dense, self.speedups = agreed(self._timed)
        self._keep(self.dense)
        for handle in vars(self).pop("_handles", []):
            handle.remove()
        del self._calls

    def _timed(self) -> tuple[list[str], list[list[Any]]]:
        stacks: list[tuple[tuple[int, ...], list[str]]] = []
        for name, (_, out) in self._calls.items():
            if not stacks or stacks[-1][0] != out:
                stacks.append((out, []))
            stacks[-1][1].append(name)
        known: dict[tuple[Any, ...], Any] = {}
        dense: list[str] = []
        found: list[list[Any]] = []
        for _, names in stacks:
            before = after = 0.0
            for name in names:
                module, call = self._modules[name], self._calls[name][0]
                M = matrices(part_of(module, name), self.form)
                kind = (type(module), module._parameters["weight"].shape, call, module.extra_repr())  # type: ignore[union-attr]
                if kind not in known:
                    known[kind] = measure(module, name, call, max(1, min(M.shape[1:]) // 4), self.form)
                before, after = before + known[kind].dense, after + known[kind].thin
            found.append([names, round(before / after, 3)])
            if before >= self.speedup * after:
                break
            dense += names
        return dense, found

    # ---- tracking

    def _record(self, now: Mapping[str, float]) -> None:
        for name, value in now.items():
            self.history.setdefault(name, []).append(int(value) if self.published else value)

    def _look(self, model: nn.Module) -> None:
        last = self.total_steps is not None and self.done >= max(1, int(self.latest * self.total_steps))
        if self.done % self.period and not last:
            return
        kept = set(self.dense or ())
        tracked = {name: m for name, m in self._modules.items() if name not in kept}
        now = agreed(lambda: stable_ranks(tracked, self.form))
        self._record(now)
        self._news = {"stable_ranks": {name: round(value, 4) for name, value in now.items()}}
        waited = self.settled_at is not None  # as published, the switch comes one look after the detection
        if not waited and self._settles(tracked):
            self.settled_at = self.done
        if not (last or waited or (self.settled_at is not None and not self.published)):
            return
        self.ranks = agreed(lambda: self._decide(tracked))
        self._news["ranks"] = dict(self.ranks)
        if self.automatic:
            self._factorize(model)

    def _tolerance(self) -> float:
        """Per look."""
        if self.published or self.total_steps is None:
            return self.tolerance
        return self.tolerance * self.period * 100 / self.total_steps

    def _settles(self, tracked: Iterable[str]) -> bool:
        """Whether all layers have settled; as published, a layer that has once stays so, and need not have moved."""
        history = {name: self.history[name] for name in tracked}
        tolerance = self._tolerance()
        self.moved += [
            name
            for name, values in history.items()
            if name not in self.moved and len(values) > self.window
            if slope(values, self.window, self.tail, not self.published) > tolerance
        ]
        if self.done < self.earliest * (self.total_steps or 0):
            return False
        if not self.published:
            self.stable = []
        while True:
            few = self.published or 2 * len(self.stable) >= len(history)
            new = settled(
                history,
                self.stable,
                window=self.window,
                tail=self.tail,
                tolerance=tolerance,
                relax=[(int(n), f) for n, f in self.relax] if few else (),
                relative=not self.published,
            )
            self.stable += new
            if self.published or not new:
                break
        if self.published or self.chosen == "energy":
            return len(self.stable) == len(history)
        return len(self.stable) == len(history) and 2 * len(self.moved) >= len(history)

    # ---- ranks

    def _decide(self, tracked: Mapping[str, nn.Module]) -> dict[str, int]:
        ranks = {}
        for name, module in tracked.items():
            part = part_of(module, name)
            rank = self._rank(name, matrices(part, self.form))
            largest = svd(form=self.form).sizes(part)[1]
            if self.guard and rank > largest:
                continue
            up = -(-rank // self.multiple) * self.multiple
            ranks[name] = up if up <= largest else rank
        return ranks

    def _rank(self, name: str, M: Tensor) -> int:
        full = min(M.shape[1:])
        first, now = self.first[name], self.history[name][-1]
        if not first or self.chosen == "energy":  # xi of a weight that starts at zero is none
            keep = self.keep if self.keep is not None and self.chosen == "energy" else ENERGY
            rank = max(rank_by_energy(s, keep) for s in torch.linalg.svdvals(M))
        else:
            rank = scaled_rank(now, int(first) if self.published else first, full)
            if self.chosen == "accumulative":
                keep = ACCUMULATIVE if self.keep is None else self.keep
                rank = max(rank, *(rank_by_sum(s, keep) for s in torch.linalg.svdvals(M)))
        return min(full, max(1, rank, math.ceil(self.floor * full - 1e-9)))

    # ---- the switch and after

    def _factorize(self, model: nn.Module) -> None:
        assert self.ranks is not None
        optimizer = self._optimizer
        if self.reset:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    optimizer.state.pop(p, None)
        factorize(model, self.ranks, svd(form=self.form), optimizer, guard=False)

    def _notice(self) -> None:
        """The model has been factorised, by whomever."""
        if self.ranks is not None and self.switched_at is None and not self.ready:
            self.switched_at = self.done

    def _structures(self) -> Iterator[Structure]:
        for name in self.ranks or ():
            module = self._modules[name]
            if isinstance(module, Structured):
                yield module.structure

    @torch.no_grad()
    def _penalise(self) -> None:
        if not self.decay:
            return
        scale = getattr(self._optimizer, "grad_scale", None)  # a fused optimizer's gradients are still scaled
        for structure in self._structures():
            if any(p.grad is None for p in structure.parameters()):
                continue
            for p, g in zip(structure.parameters(), frobenius_decay(structure), strict=True):
                p.grad.add_(g if scale is None else g * scale, alpha=self.decay)  # type: ignore[union-attr]

    def _borrow(self) -> None:
        """For this step: factors in groups without weight decay, and other learning rates. Schedules, which refuse
        groups added for good, and checkpoints never see it."""
        groups = self._optimizer.param_groups
        self._lent: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._own = len(groups)
        age = self.done - (self.switched_at or 0)
        factor = self.rate * min(1.0, (age + 1) / self.rewarm) if self.rewarm else self.rate
        if factor != 1:
            for group in groups:
                if group.get("lr") is not None:
                    self._lend(group, lr=group["lr"] * factor)
        if not self.decay:
            return
        factors = {id(p) for structure in self._structures() for p in structure.parameters()}
        for group in list(groups):
            if not group.get("weight_decay") or factors.isdisjoint(map(id, group["params"])):
                continue
            others = [p for p in group["params"] if id(p) not in factors]
            mine = [p for p in group["params"] if id(p) in factors]
            if others:
                groups.append({**group, "params": mine, "weight_decay": 0.0})
                self._lend(group, params=others)
            else:
                self._lend(group, weight_decay=0.0)

    def _lend(self, group: dict[str, Any], **values: Any) -> None:
        self._lent.append((group, {key: group[key] for key in values}))
        group.update(values)

    def _return(self) -> None:
        for group, values in reversed(vars(self).pop("_lent", [])):
            group.update(values)
        if (own := vars(self).pop("_own", None)) is not None:
            del self._optimizer.param_groups[own:]


def _heard(
    calls: dict[str, tuple[Call, tuple[int, ...]]],
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    y: Any,
) -> None:
    """A forward hook; copies of the model take it with them."""
    x = next(iter((*args, *kwargs.values())), None)
    if torch.is_tensor(x) and torch.is_tensor(y) and y.requires_grad and name not in calls:
        calls[name] = (Call.of(x), tuple(y.shape))


def _check_number(key: str, value: object, low: float, high: float = math.inf, open_: bool = False) -> None:
    """Raise StructureError unless low <= value <= high (low < value if `open_`), and finite."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (open_ and value == low):  # type: ignore[operator]
        least = f"above {low:g}" if open_ else f"at least {low:g}"
        most = "" if high == math.inf else f" and at most {high:g}"
        raise StructureError(f"Cuttlefish: {key} must be a number {least}{most}, got {value!r}")
