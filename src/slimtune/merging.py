"""Layer 3: effective weights, for a while or for good, and what storing them lost."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import AdapterNameError, SlimtuneError, TargetError, UninitializedError
from .layers import Host, SavedModule, give_weight, restore
from .layouts import is_packed
from .structured import Structured, rebind
from .structures import LowRank, Structure
from .targets import adapter_names, extended, hosts, own_modules, reactivate, saved_modules, unwrapped

__all__ = ["LayerError", "MergeReport", "check_mergeable", "merge", "merged"]


@dataclass(frozen=True)
class LayerError:
    """What storing one merged weight lost."""

    name: str
    delta_norm: float
    """|W' - W|, Frobenius, in the arithmetic of the merge."""
    error_norm: float
    """|stored - W'|, Frobenius."""

    @property
    def share(self) -> float:
        """error_norm / delta_norm: the part of the change that the cast lost; 0 when nothing changed."""
        return self.error_norm / self.delta_norm if self.delta_norm else 0.0


@dataclass
class MergeReport:
    """The measured error of a merge: per layer, and the same share over all layers together."""

    layers: list[LayerError] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    """Weights that were shared with another module and are now the layer's own."""
    densified: list[str] = field(default_factory=list)
    """Layers that held a structure and hold a weight now: factors of the sum are not known, or not smaller."""

    @property
    def share(self) -> float:
        delta = sum(e.delta_norm**2 for e in self.layers) ** 0.5
        error = sum(e.error_norm**2 for e in self.layers) ** 0.5
        return error / delta if delta else 0.0

    def __str__(self) -> str:
        worst = max(self.layers, key=lambda e: e.share, default=None)
        if worst is None:
            return "nothing merged"
        text = f"{len(self.layers)} layers merged; the cast lost {self.share:.2%} of the change"
        text += f" (worst: {worst.name}, {worst.share:.2%})"
        text += f"; dense now: {', '.join(self.densified)}" if self.densified else ""
        return text + (f"; untied: {', '.join(self.untied)}" if self.untied else "")


def check_mergeable(name: str, host: Host) -> None:
    stored = host.weight
    if is_packed(stored) or type(stored.data) is not Tensor:
        what = f"{type(stored.data).__name__}, {stored.dtype}"
        raise TargetError(f"{name!r} cannot be merged: its weight is packed ({what})")
    if host._parameters.get("weight") is None and not isinstance(host, Structured):
        raise TargetError(f"{name!r} cannot be merged: its weight is computed from other parameters (parametrized)")
    if stored.is_meta or any(t.is_meta for t in host.adapters.parameters()):
        raise UninitializedError(f"{name!r} cannot be merged: it is on the meta device")
    if not host.layout(host).is_affine():
        raise TargetError(f"{name!r} cannot be merged: {host.base_class.__name__}.forward is not W x + b")


def _merged_weight(name: str, host: Host) -> tuple[Tensor, LayerError]:
    """The effective weight in the layer's own layout and dtype, and what the cast lost."""
    stored = host.weight
    wide = torch.float32 if stored.dtype.itemsize < 4 else torch.float64
    exact = host.map().weight(wide)
    new = exact.to(stored.dtype)
    delta = exact - host.layout(host).weight(wide)
    error = LayerError(name, float(delta.norm()), float((new.to(wide) - exact).norm()))
    return host.layout.store(new, stored).clone(), error


def _merged_structure(name: str, host: Host) -> tuple[Structure, LayerError] | None:
    """For a host that holds a structure, the low-rank one that is W', exactly but for the cast, if it is smaller."""
    if not isinstance(host, Structured):
        return None
    held, stored = host.structure, next(host.structure.parameters())
    wide = torch.float32 if stored.dtype.itemsize < 4 else torch.float64
    before = pair = _widened(held.exact_factors(), wide)
    for adapter in (host.addition(n) for n in host.active_adapters):
        change = _widened(adapter.structure.exact_factors(), wide)
        if pair is None or change is None:
            return None
        pair = adapter.composition.factors(pair, (adapter.scale.to(wide) * change[0], change[1]))
    if before is None or pair is None:
        return None
    (B, A), O, I = pair, held.out_features, held.in_features
    if len(A) * (O + I) >= O * I:
        return None
    new = LowRank(O, I, rank=len(A), device=stored.device, dtype=stored.dtype)
    new.requires_grad_(False).train(host.training)
    new.A.copy_(A)
    new.B.copy_(B)
    exact = B @ A
    lost = new.B.to(wide) @ new.A.to(wide) - exact
    return new, LayerError(name, float((exact - before[0] @ before[1]).norm()), float(lost.norm()))


def _widened(pair: tuple[Tensor, Tensor] | None, wide: torch.dtype) -> tuple[Tensor, Tensor] | None:
    return None if pair is None else (pair[0].to(wide), pair[1].to(wide))


def _active_hosts(model: nn.Module) -> dict[str, Host]:
    return {n: h for n, h in hosts(model).items() if h.active_adapters}


@contextmanager
@torch.no_grad()
def merged(model: nn.Module) -> Iterator[MergeReport]:
    """Within: plain layers that hold the effective weights. Afterwards the saved tensors are put back, bit for bit.

    Computed in a wider type than the layer's and cast once; yields the report of what the casts lost. Weights tied
    to another module are replaced in the adapted layer only. A layer that holds a structure meanwhile holds what
    `merge` would leave in its place.
    """
    report = MergeReport()
    tensors: list[tuple[nn.Module, str, Any]] = []
    structured: list[tuple[Host, type[Host], dict[str, Any]]] = []
    before = [(m, m.active_adapters) for _, m in extended(model)]
    try:
        for name, host in _active_hosts(model).items():
            check_mergeable(name, host)
            if isinstance(host, Structured):
                structured.append((host, type(host), dict(host._modules)))
                _fold_structured(name, host, report)
                continue
            new, error = _merged_weight(name, host)
            report.layers.append(error)
            tensors.append((host, "weight", host.weight))
            host.weight = nn.Parameter(new, requires_grad=False)
        for saved in saved_modules(model).values():
            if saved.active_adapters:
                tensors += _replace(saved, saved.adapters[saved.active_adapters[-1]])
        for module, _ in before:
            module.active_adapters = ()
        with torch.enable_grad():
            yield report
    finally:
        for part, key, tensor in reversed(tensors):
            setattr(part, key, tensor)
        for host, cls, modules in structured:
            host._parameters.pop("weight", None)
            host._modules.clear()  # in the order they had
            host._modules.update(modules)
            host.__class__ = cls
            rebind(host)
        reactivate(before)


def _fold_structured(name: str, host: Host, report: MergeReport) -> None:
    """Put the effective weight of a layer that holds a structure in its place, as factors where that can be."""
    if found := _merged_structure(name, host):
        host.structure = found[0]
        report.layers.append(found[1])
        return
    new, error = _merged_weight(name, host)
    report.layers.append(error)
    report.densified.append(name)
    give_weight(host, nn.Parameter(new, requires_grad=False))


@torch.no_grad()
def merge(model: nn.Module) -> MergeReport:
    """Write the effective weights into the model and remove its adapters, for good.

    W' is computed in a wider type than the layer's (fp32 for bf16 and fp16, fp64 for fp32) and cast once. A layer that
    holds a structure with exact factors, under adapters that add such (and scale rows and columns), keeps the factors
    of both in a `LowRank` where that has fewer numbers than W'; otherwise it gets a weight, and `report.densified`
    names it. A weight
    shared with a module that the adapter does not change becomes the layer's own; `report.untied` names it, and a
    transformers config is set to `tie_word_embeddings = False`.

    Returns:
        The measured error per layer.

    Raises:
        AdapterNameError: no adapter, or some that are attached but not active (remove or activate them first).
        TargetError: a packed weight.
        UninitializedError: a layer on the meta device.
        SlimtuneError: a merged weight that is not finite. The model is unchanged in each case.

    Warns:
        UserWarning: an adapter whose scale starts at 0 and grows (SingLoRA) has not reached it yet.
    """
    idle = [n for n in adapter_names(model) if not any(n in m.active_adapters for _, m in extended(model))]
    if idle or not adapter_names(model):
        raise AdapterNameError(
            f"merge: adapter {idle[0]!r} is attached but not active; activate or remove it first"
            if idle
            else "merge: the model has no adapter"
        )
    report, changed = MergeReport(), _active_hosts(model)
    for name, host in changed.items():
        check_mergeable(name, host)
        for key, tensor in host.adapters.state_dict().items():
            if not tensor.isfinite().all():
                raise SlimtuneError(f"merge: {name}.adapters.{key} is not finite; nothing was merged")
    narrow = {n for n, h in changed.items() if h.weight.dtype == torch.float16}
    for name in narrow:
        if not _merged_weight(name, changed[name])[0].isfinite().all():
            raise SlimtuneError(f"merge: {name}.weight overflows float16; nothing was merged")
    _warn_of_unfinished(changed)
    shared = [g for g in _places(model).values() if len(g) > 1]
    for name, host in changed.items():
        if isinstance(host, Structured):
            _fold_structured(name, host, report)
            continue
        new, error = _merged_weight(name, host)
        report.layers.append(error)
        host.weight = nn.Parameter(new, requires_grad=False)
    for saved in saved_modules(model).values():
        if saved.active_adapters:
            _replace(saved, saved.adapters[saved.active_adapters[-1]])
    for _, module in list(extended(model)):
        module.adapters.clear()
        restore(module)
    for group in shared:
        _untie(group, report)
    config: Any = getattr(unwrapped(model), "config", None)
    if report.untied and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
    return report


def _warn_of_unfinished(changed: dict[str, Host]) -> None:
    for host in changed.values():
        for name in host.active_adapters:
            adapter = host.addition(name)
            recipe = adapter.recipe
            share = adapter.scale.item() / recipe.scale(adapter.structure.rank)
            if recipe.start_scale != 1 and share < 0.999:
                message = f"merge: {recipe.name} has reached {share:.1%} of its scale; its ramp has not ended"
                return warnings.warn(message, UserWarning, stacklevel=3)


Place = tuple[str, nn.Module, str]


def _places(model: nn.Module) -> dict[int, list[Place]]:
    """Where each of the model's own parameters is used: (full name, module, key) by the parameter's id."""
    places: dict[int, list[Place]] = {}
    for owner, module in own_modules(model).items():
        for key, p in module._parameters.items():
            if p is not None:
                places.setdefault(id(p), []).append((f"{owner}.{key}", module, key))
    return places


def _untie(group: list[Place], report: MergeReport) -> None:
    """Should some of these have changed, give each its own tensor: a file keeps only one name of a shared one."""
    kept: set[int] = set()
    if len({id(m._parameters[key]) for _, m, key in group}) == 1:
        return
    for name, module, key in group:
        p = module._parameters[key]
        if id(p) in kept:
            setattr(module, key, nn.Parameter(p.detach().clone(), requires_grad=False))  # type: ignore[union-attr]
        kept.add(id(p))
        report.untied.append(name)


def _replace(module: SavedModule, new: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Hand a copy's parameters and buffers to the module it was made of; returns (part, key, tensor) of before."""
    before = []
    for part, source in new.named_modules():
        target = module.get_submodule(part)
        for key, p in source._parameters.items():
            if p is not None:
                before.append((target, key, getattr(target, key)))
                setattr(target, key, nn.Parameter(p.detach(), requires_grad=False))
        for key, b in source._buffers.items():
            if b is not None:
                before.append((target, key, getattr(target, key)))
                setattr(target, key, b)
    return before
