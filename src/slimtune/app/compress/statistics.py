"""What a compression knows of its layers: of their weights alone, or of what they compute on data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimtune.allocate import Price, Sensitivity, price, sensitivity, tail, uniform
from slimtune.app.compress.config import CALIBRATED, CompressConfig
from slimtune.app.compress.plan import Layer, hash_of, make_factors
from slimtune.calibrate import fisher
from slimtune.compress import part_of
from slimtune.errors import ConfigError
from slimtune.factors import Factors, LayerMoments, Part, Principal, afm
from slimtune.factors.base import in_form
from slimtune.ops.moments import Moments
from slimtune.ranks import seeded
from slimtune.structures import Structure

if TYPE_CHECKING:
    from slimtune.app.compress.command import _Compression


def allocated(
    cfg: CompressConfig, prices: Mapping[str, Price], keep: float, weights: Mapping[str, float] | None = None
) -> dict[str, int]:
    """Ranks by the configured allocation, for `keep` of these layers' parameters.

    Raises:
        ConfigError: a method whose errors are not known beforehand, and an allocation that rests on them.
    """
    if not prices:
        return {}
    if cfg.allocation == "uniform":
        return uniform(prices, keep, multiple=cfg.multiple)
    if any(p.errors is None for p in prices.values()):
        raise ConfigError(f"allocation: {cfg.method} does not foretell its errors, so only uniform is possible")
    return tail(prices, keep, weights=weights, multiple=cfg.multiple)


def sensitivities(found: Sensitivity, prices: Mapping[str, Price], share: float) -> dict[str, float]:
    """{layer: what its type costs the loss, per unit of the squared errors of its layers}: the weights for `tail`.

    A type that costs nothing, within what one batch more or less would change, counts a hundredth of the mean.
    """
    costs: dict[str, float] = {}
    for kind, values in found.metric.items():
        ranks = uniform({n: prices[n] for n in found.layers[kind]}, share)
        error = sum(_error(prices[n], r) for n, r in ranks.items())
        costs[kind] = max(0.0, values[share] - found.base) / error if share in values and error > 0 else 0.0
    known = [cost for cost in costs.values() if cost > 0]
    least = 0.01 * sum(known) / len(known) if known else 1.0
    return {name: max(least, costs[kind]) for kind, layers in found.layers.items() for name in layers}


def _error(p: Price, rank: int) -> float:
    assert p.errors is not None
    return float(p.errors[min(rank, len(p.errors) - 1)])


@contextmanager
def reproducible(seed: int, name: str) -> Iterator[None]:
    """Within: random numbers by a seed and a layer's name alone; afterwards as if none had been drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seeded(seed, name).initial_seed())
        yield


class _Sized:
    """Factors of which only the sizes are asked."""

    def __init__(self, factors: Factors) -> None:
        self.sizes = factors.sizes


class Statistics:
    """The factors of a compression and what they rest on."""

    def __init__(self, job: _Compression) -> None:
        self.job, self.cfg = job, job.cfg
        self.calibrated = self.cfg.method in CALIBRATED
        self.known: dict[str, LayerMoments | Principal] = {}
        self.factors: Factors = self._afm({}) if self.calibrated else make_factors(self.cfg)

    def _afm(self, known: dict[str, LayerMoments | Principal]) -> afm:
        options = dict(self.cfg.method_options)
        try:
            return afm(known, form=self.cfg.form, **options)
        except TypeError as error:
            raise ConfigError(f"method_options: {self.cfg.method}: {error}") from error

    def part(self, name: str) -> Part:
        return part_of(self.job.dense.get(name) or self.job.model.get_submodule(name), name)

    # ---- statistics

    def collect(self, names: Sequence[str]) -> None:
        """Know the layers' statistics: from the state, or from the data."""
        if not self.calibrated:
            return
        missing = [name for name in names if not self._take(name)]
        if missing:
            self._calibrate(missing, True)
        self.factors = self._afm(self.known)

    def renew(self, names: Sequence[str]) -> None:
        """Take the layers' statistics anew, behind what has been compressed by now."""
        for name in names:
            self.known.pop(name, None)
        self._calibrate(names, False)
        self.factors = self._afm(self.known)

    def _calibrate(self, names: Sequence[str], keep: bool) -> None:
        """One pass over the data for every group of layers whose moments fit into `memory`."""
        from slimtune.app.compress.command import going
        from slimtune.calibrate import moments

        job, source = self.job, self.job.source
        found: dict[str, LayerMoments | Principal] = {}
        made = self._afm(found)

        def take(name: str, entry: LayerMoments) -> None:
            part = self.part(name)
            found[name] = entry
            if in_form(part, made.form) == "channel":
                found[name] = made.principal(part)
            self.known[name] = found[name]
            if keep:
                self._keep(name, found[name])

        with going(job.stop, "calibrating") as progress:
            moments(
                source.model,
                job.calibration(),
                list(names),
                side="auto" if made.form == "channel" else "input",
                keep=take,
                memory=self.cfg.memory,
                forward=source.forward,
                progress=progress,
            )

    def _keep(self, name: str, entry: LayerMoments | Principal) -> None:
        module: Any = self.job.model.get_submodule(name)
        note: dict[str, Any] = {"weight": hash_of(module.weight)}
        if isinstance(entry, Principal):
            tensors = {"U": entry.U, "errors": entry.errors, "mean": entry.mean}
            note |= {"energy": entry.energy, "mark": entry.mark}
        else:
            tensors = {"mean": entry.moments.mean, "M2": entry.moments.M2}
            note |= {"side": entry.side, "count": entry.moments.count}
        self.job.state.keep(f"statistics/{name}", tensors, note)

    def _take(self, name: str) -> bool:
        state = self.job.state
        note = state.note(f"statistics/{name}")
        if note is None:
            return False
        module: Any = self.job.model.get_submodule(name)
        if note["weight"] != hash_of(module.weight):
            raise ConfigError(
                f"cannot continue in {state.run}: the weights of the model have changed ({name}); resume=false starts "
                "afresh"
            )
        held = state.tensors(f"statistics/{name}")
        if held is None:
            return False
        device = module.weight.device
        if "U" in held:
            on = {key: t.to(device) for key, t in held.items()}
            self.known[name] = Principal(on["U"], held["errors"], note["energy"], on["mean"], tuple(note["mark"]))
        else:
            found = Moments(note["count"], held["mean"], held["M2"])
            self.known[name] = LayerMoments(note["side"], found.to(device))
        return True

    # ---- what follows from them

    def price(self, name: str) -> tuple[str, Part, Price]:
        """A layer's kind, weight and price."""
        part = self.part(name)
        factors: Any = self.factors
        if self.calibrated and name not in self.known:
            factors = _Sized(factors)  # it stays dense: nobody asks for its errors
        return type(self.job.model.get_submodule(name)).__name__, part, price(part, factors)

    def weights(self, prices: Mapping[str, Price], keep: float) -> dict[str, float] | None:
        """Weights of the layers' errors, measured on the calibration examples; None where none are asked for."""
        measure = {"fisher": self._fisher, "sensitivity": self._sensitivity}.get(self.cfg.allocation)
        if measure is None or not prices or any(p.errors is None for p in prices.values()):
            return None
        state = self.job.state
        if (known := state.value(self.cfg.allocation)) is None or set(known) != set(prices):
            known = measure(prices, keep)
            state.keep_value(self.cfg.allocation, known)
        return dict(known)

    def _fisher(self, prices: Mapping[str, Price], keep: float) -> dict[str, float]:
        from slimtune.app.compress.command import going
        from slimtune.app.compress.measure import loss_of

        job, task = self.job, self.job.source.task
        assert task is not None
        with going(job.stop, "weighing layers") as progress:
            found = fisher(
                job.model,
                job.calibration(),
                lambda _, batch: loss_of(task, batch)[0],
                list(prices),
                seed=self.cfg.seed,
                progress=progress,
            )
        return {name: found[name] * p.energy for name, p in prices.items()}

    def _sensitivity(self, prices: Mapping[str, Price], keep: float) -> dict[str, float]:
        from slimtune.app.compress.command import going
        from slimtune.app.compress.measure import mean_loss

        job = self.job
        task, device = job.source.task, job.source.device
        assert task is not None
        with going(job.stop, "trying layers") as progress:
            found = sensitivity(
                job.model,
                lambda _: mean_loss(task, job.calibration(), device),
                self.factors,
                list(prices),
                keeps=[keep],
                progress=progress,
            )
        return sensitivities(found, prices, keep)

    def predicted(self, layer: Layer) -> float | None:
        """The error at the layer's rank by the present statistics."""
        errors = self.price(layer.name)[2].errors
        assert layer.rank is not None
        return None if errors is None else max(0.0, float(errors[min(layer.rank, len(errors) - 1)])) ** 0.5

    def replacement(self, layer: Layer, module: nn.Module) -> tuple[Structure, Tensor | None]:
        """What takes the layer's weight's place."""
        assert layer.rank is not None
        part = part_of(module, layer.name)
        with torch.no_grad(), reproducible(self.cfg.seed, layer.name):
            structure, bias = self.factors(part, layer.rank)
        return structure.requires_grad_(False), bias

    def blocks(self, layers: Sequence[Layer]) -> list[list[Layer]]:
        """Layers that are compressed together: all, or block by block, a block being what a number in a name counts."""
        if not self.cfg.sequential:
            return [list(layers)]
        found: dict[str, list[Layer]] = {}
        for layer in layers:
            match = re.match(r".*?\.\d+(?=\.|$)|\d+", layer.name)
            found.setdefault(match[0] if match else layer.name, []).append(layer)
        return list(found.values())
