"""Layer 3: the verbs on a model in memory."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import AdapterNameError, SlimtuneError, TargetError
from .layers import Adapter, Extended, Host, SavedModule, check_host, extend, layout_of, restore
from .recipe import Recipe, matches

__all__ = [
    "LayerError",
    "MergeReport",
    "Summary",
    "SummaryRow",
    "activate",
    "adapt",
    "adapter_names",
    "attach_adapters",
    "build_adapter",
    "check_name",
    "disabled",
    "hosts",
    "initialize",
    "merge",
    "merged",
    "remove",
    "saved_modules",
    "select",
    "summary",
    "trainable_parameters",
]

HEADS = ("lm_head", "classifier", "score", "qa_outputs", "head")


# ---------------------------------------------------------------- what is where


def extended(model: nn.Module) -> Iterator[tuple[str, Extended]]:
    """(name, module) of everything adapted or saved, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, Extended):
            yield name, module


def hosts(model: nn.Module, adapter: str | None = None) -> dict[str, Host]:
    """Adapted layers by name; only those that carry `adapter` if one is named."""
    return {n: m for n, m in extended(model) if isinstance(m, Host) and (adapter is None or adapter in m.adapters)}


def saved_modules(model: nn.Module, adapter: str | None = None) -> dict[str, SavedModule]:
    """Modules with a trainable copy, by name; likewise."""
    return {
        n: m for n, m in extended(model) if isinstance(m, SavedModule) and (adapter is None or adapter in m.adapters)
    }


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters attached to a model, in the order of attaching."""
    return list(dict.fromkeys(a for _, m in extended(model) for a in m.adapters))


def check_name(name: object) -> str:
    """Return `name` if it is a plain adapter name: letters, digits, '_' and '-', at most 64.

    Raises:
        AdapterNameError: anything else; names become attribute names and folder names.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise AdapterNameError(f"adapter name {name!r}: expected 1 to 64 letters, digits, '_' or '-' (no path, no dot)")
    if hasattr(nn.ModuleDict, name):
        raise AdapterNameError(f"adapter name {name!r} is reserved by torch.nn.ModuleDict")
    return name


def require_adapter(model: nn.Module, name: str) -> None:
    """Raise AdapterNameError, listing the names there are, unless `name` is attached."""
    if name not in (names := adapter_names(model)):
        raise AdapterNameError(f"no adapter named {name!r}; attached: {', '.join(names) or 'none'}")


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of everything that receives a gradient."""
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad)


# ---------------------------------------------------------------- choosing layers


def _nearest(wanted: str, names: Iterable[str], count: int = 5) -> list[str]:
    names = [n for n in names if n]
    by_tail: dict[str, str] = {}
    for n in names:
        by_tail.setdefault(n.rsplit(".", 1)[-1], n)
    tails = difflib.get_close_matches(wanted.rsplit(".", 1)[-1], by_tail, count, 0.0)
    close = difflib.get_close_matches(wanted, names, count, 0.6)
    return list(dict.fromkeys(close + [by_tail[t] for t in tails]))[:count]


def _head(model: nn.Module) -> set[nn.Module]:
    """The output head: what the model says it is, else a top-level module with a usual name."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is not None:
        return set(head.modules())
    heads = [h for n in HEADS if isinstance(h := getattr(model, n, None), nn.Module)]
    return {m for h in heads for m in h.modules()}


def _is_linear(module: nn.Module) -> bool:
    cls = module.base_class if isinstance(module, Extended) else type(module)
    layout = layout_of(cls)
    return (
        layout is not None
        and layout.__name__ in ("LinearLayout", "Conv1DLayout")
        and not issubclass(cls, nn.modules.linear.NonDynamicallyQuantizableLinear)
    )


def _own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of the model itself by name, without those that adapters added."""
    return {n: m for n, m in model.named_modules() if n and not re.search(r"(^|\.)adapters(\.|$)", n)}


def _pick(patterns: str | Sequence[str], modules: Iterable[str], what: str) -> list[str]:
    """Names that fit a regular expression (a string) or any of several names, suffixes or globs (a list)."""
    modules = list(modules)
    if isinstance(patterns, str):
        try:
            chosen = [n for n in modules if re.search(patterns, n)]
        except re.error as e:
            raise TargetError(f"{what}: {patterns!r} is not a regular expression: {e}") from None
        missing = [] if chosen else [patterns]
    else:
        found = {p: [n for n in modules if matches(n, p)] for p in patterns}
        missing = [p for p, names in found.items() if not names]
        wanted = {n for names in found.values() for n in names}
        chosen = [n for n in modules if n in wanted]
    if missing:
        near = ", ".join(_nearest(missing[0], modules))
        raise TargetError(f"{what}: {missing[0]!r} matches nothing; nearest: {near or 'the model has no layers'}")
    return chosen


def select(
    model: nn.Module, targets: str | Sequence[str] = "all-linear", exclude: str | Sequence[str] = ()
) -> list[str]:
    """Names of the layers that `targets` mean.

    Args:
        targets: "all-linear" (every Linear and transformers Conv1D but the output head), a list of module names,
            suffixes or globs, or one regular expression searched in the full name.
        exclude: the same forms; what they match is left out.

    Raises:
        TargetError: a pattern that matches nothing (with the five nearest names), or a layer no adapter fits.
    """
    own = _own_modules(model)
    fitting = {n: m for n, m in own.items() if layout_of(getattr(m, "base_class", type(m)))}
    if targets == "all-linear":
        head = _head(model)
        chosen = [n for n, m in fitting.items() if _is_linear(m) and m not in head]
        if not chosen:
            raise TargetError("targets 'all-linear': the model has no linear layer apart from its output head")
    else:
        try:
            chosen = _pick(targets, fitting, "targets")
        except TargetError:
            # a pattern may name a layer that exists but that no adapter fits: say that instead
            for name in _pick(targets, own, "targets"):
                if not any(n.startswith(name + ".") for n in own):
                    check_host(own[name], name)
            raise
    if exclude:
        dropped = set(_pick(exclude, own, "exclude"))
        chosen = [n for n in chosen if not any(n == d or n.startswith(d + ".") for d in dropped)]
        if not chosen:
            raise TargetError(f"exclude {exclude!r} leaves nothing of targets {targets!r}")
    for name in chosen:
        check_host(own[name], name)
    return chosen


def _check_fast_path(model: nn.Module, names: Sequence[str]) -> None:
    if not torch.backends.mha.get_fastpath_enabled():
        return
    for parent, module in model.named_modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.MultiheadAttention)):
            inside = [n for n in names if n.startswith(parent + ".")]
            if inside:
                raise TargetError(
                    f"{inside[0]!r} lies in a {type(module).__name__}, whose inference fast path would bypass the "
                    "adapter; call torch.backends.mha.set_fastpath_enabled(False) first"
                )


# ---------------------------------------------------------------- attaching


def adapt(
    model: nn.Module,
    recipe: Recipe,
    targets: str | Sequence[str] = "all-linear",
    name: str = "default",
    *,
    exclude: str | Sequence[str] = (),
    modules_to_save: str | Sequence[str] = (),
) -> list[str]:
    """Attach an adapter to a model in place; freeze everything else.

    The new adapter goes on top of the active ones: with W1 = adapter1(W), the layer computes adapter2(W1).
    Adapter parameters are fp32 (fp64 on an fp64 base) whatever the base; nothing of the base is edited. On a meta
    model the adapter stays on meta until `initialize`.

    Args:
        targets: which layers; "all-linear" (every Linear and transformers Conv1D but the output head), a list of
            module names, suffixes or globs, or one regular expression searched in the full name.
        exclude: the same forms; what they match is left out.
        name: the adapter's name; 1 to 64 letters, digits, '_' or '-'.
        modules_to_save: modules (names, suffixes, globs, or a regular expression) to train in full as a private
            copy that is saved with the adapter, such as a new classification head.

    Returns:
        The names of the adapted layers.

    Raises:
        TargetError, AdapterNameError, StructureError: nothing has been changed then.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> st.adapt(model, st.lora(rank=2), ["0"])
        ['0']
    """
    check_name(name)
    if name in adapter_names(model):
        raise AdapterNameError(f"adapter name {name!r} is taken; attached: {', '.join(adapter_names(model))}")
    own = _own_modules(model)
    saved = _pick(modules_to_save, own, "modules_to_save") if modules_to_save else []
    saved = [n for n in saved if not any(n.startswith(o + ".") for o in saved if o != n)]
    chosen = [n for n in select(model, targets, exclude) if not any(n == s or n.startswith(s + ".") for s in saved)]
    if not chosen:
        raise TargetError(f"targets {targets!r} lie wholly inside modules_to_save {list(saved)!r}")
    own_layers = {n: own[n] for n in chosen}
    built = {n: build_adapter(m, n, recipe.for_layer(n)) for n, m in own_layers.items()}
    attach_adapters(model, built, name, saved)
    initialize(model, name)
    return chosen


def build_adapter(module: nn.Module, name: str, recipe: Recipe, device: torch.device | str | None = None) -> Adapter:
    """An uninitialised adapter that fits a layer, beside its weight unless `device` says otherwise.

    Raises:
        TargetError, StructureError: naming the layer and why it cannot carry this adapter.
    """
    check_host(module, name)
    layout = layout_of(module.base_class if isinstance(module, Extended) else type(module))
    dtype = torch.float64 if module.weight.dtype == torch.float64 else torch.float32
    try:
        sizes = layout.sizes(module)  # type: ignore[union-attr]
        adapter = Adapter(recipe, *sizes, device=device or module.weight.device, dtype=dtype)
    except SlimtuneError as e:
        raise type(e)(f"{name}: {e}") from None
    if not layout.takes_dropout:  # type: ignore[union-attr]
        adapter.dropout = 0.0
    return adapter.train(module.training)


def attach_adapters(model: nn.Module, built: dict[str, Adapter], name: str, saved: Sequence[str] = ()) -> None:
    """Attach adapters built for these layers, on top of the active ones; they alone are trainable afterwards.

    `saved` modules get a trainable copy. Errors come before the first layer is touched.
    """
    own = _own_modules(model)
    _check_fast_path(model, list(built))
    copies: dict[str, nn.Module] = {}
    for layer in saved:
        if isinstance(own[layer], Host) or any(isinstance(m, Host) for m in own[layer].modules()):
            raise TargetError(f"modules_to_save: {layer!r} holds layers that another adapter changes")
        copies[layer] = _copy_of(own[layer])
    model.requires_grad_(False)
    for layer, adapter in built.items():
        module = own[layer]
        host = extend(module, layout_of(getattr(module, "base_class", type(module))))
        host.adapters[name] = adapter
        host.active_adapters += (name,)
    for layer, new in copies.items():
        saved_module = extend(own[layer], None)
        saved_module.adapters[name] = new.requires_grad_(True)
        saved_module.active_adapters += (name,)


def _copy_of(module: nn.Module) -> nn.Module:
    if not isinstance(module, SavedModule):
        return copy.deepcopy(module)
    bare = copy.deepcopy(module)
    bare.adapters.clear()
    restore(bare)
    return bare


@torch.no_grad()
def initialize(model: nn.Module, name: str = "default") -> None:
    """Give an adapter its starting values: dW = 0, magnitudes read from the weights below it.

    `adapt` calls it. Call it yourself after loading weights into a model that was adapted on the meta device: an
    adapter still on meta is first allocated beside its layer's weight. Layers on meta are left alone.
    """
    require_adapter(model, name)
    for host in hosts(model, name).values():
        device = host.weight.device
        if device.type == "meta":
            continue
        adapter = host.adapter(name)
        if adapter.scale.is_meta:
            adapter.to_empty(device=device)
        adapter.initialize(host.map(below=name))
    for module in saved_modules(model, name).values():
        new = module.adapter(name)
        state = module.base_state()
        if any(t.is_meta for t in new.state_dict().values()) and not any(t.is_meta for t in state.values()):
            new.to_empty(device=next(iter(state.values())).device)
            new.load_state_dict(state)


def activate(model: nn.Module, names: str | Sequence[str]) -> None:
    """Make these adapters, in this order from the base up, the active ones. Which parameters train is unchanged.

    Raises:
        AdapterNameError: a name that is not attached, or twice the same.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        require_adapter(model, name)
    if len(set(names)) < len(names):
        raise AdapterNameError(f"activate: a name comes twice in {list(names)}")
    for _, module in extended(model):
        module.active_adapters = tuple(n for n in names if n in module.adapters)


def remove(model: nn.Module, name: str) -> None:
    """Detach an adapter; layers left without any get their own class back."""
    require_adapter(model, name)
    for _, module in list(extended(model)):
        if name in module.adapters:
            module.active_adapters = tuple(n for n in module.active_adapters if n != name)
            del module.adapters[name]
            if not module.adapters:
                restore(module)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within: the base model, bit for bit. Afterwards the same adapters are active as before."""
    before = [(m, m.active_adapters) for _, m in extended(model)]
    try:
        for module, _ in before:
            module.active_adapters = ()
        yield
    finally:
        for module, active in before:
            module.active_adapters = active


# ---------------------------------------------------------------- merging


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
        return text + (f"; untied: {', '.join(self.untied)}" if self.untied else "")


def _check_mergeable(name: str, host: Host) -> None:
    stored = host.weight
    if not stored.is_floating_point() or type(stored.data) is not Tensor:
        raise TargetError(f"{name!r} cannot be merged: its weight is packed ({type(stored.data).__name__})")
    if stored.is_meta or any(t.is_meta for t in host.adapters.parameters()):
        raise TargetError(f"{name!r} cannot be merged: it is on the meta device")


def _merged_weight(name: str, host: Host) -> tuple[Tensor, LayerError]:
    """The effective weight in the layer's own layout and dtype, and what the cast lost."""
    stored = host.weight
    wide = torch.float32 if stored.dtype.itemsize < 4 else torch.float64
    exact = host.map().weight(wide)
    new = exact.to(stored.dtype)
    delta = exact - host.layout(host).weight(wide)
    error = LayerError(name, float(delta.norm()), float((new.to(wide) - exact).norm()))
    return host.layout.store(new, stored).clone(), error


def _active_hosts(model: nn.Module) -> dict[str, Host]:
    return {n: h for n, h in hosts(model).items() if h.active_adapters}


@contextmanager
@torch.no_grad()
def merged(model: nn.Module) -> Iterator[MergeReport]:
    """Within: plain layers that hold the effective weights. Afterwards the saved tensors are put back, bit for bit.

    Computed in a wider type than the layer's and cast once; yields the report of what the casts lost. Weights tied
    to another module are replaced in the adapted layer only.
    """
    report, before = MergeReport(), []
    changed = _active_hosts(model)
    try:
        for name, host in changed.items():
            _check_mergeable(name, host)
            new, error = _merged_weight(name, host)
            report.layers.append(error)
            before.append((host, host.weight, host.active_adapters))
            host.weight = nn.Parameter(new, requires_grad=False)
            host.active_adapters = ()
        with torch.enable_grad():
            yield report
    finally:
        for host, weight, active in before:
            host.weight, host.active_adapters = weight, active


@torch.no_grad()
def merge(model: nn.Module) -> MergeReport:
    """Write the effective weights into the model and remove its adapters, for good.

    W' is computed in a wider type than the layer's (fp32 for bf16 and fp16, fp64 for fp32) and cast once. A weight
    shared with a module that the adapter does not change becomes the layer's own; `report.untied` names it, and a
    transformers config is set to `tie_word_embeddings = False`.

    Returns:
        The measured error per layer.

    Raises:
        AdapterNameError: no adapter, or some that are attached but not active (remove or activate them first).
        TargetError: a packed weight.
        SlimtuneError: a merged weight that is not finite. The model is unchanged in each case.
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
        _check_mergeable(name, host)
        for key, tensor in host.adapters.state_dict().items():
            if not tensor.isfinite().all():
                raise SlimtuneError(f"merge: {name}.adapters.{key} is not finite; nothing was merged")
    narrow = {n for n, h in changed.items() if h.weight.dtype == torch.float16}
    for name in narrow:
        if not _merged_weight(name, changed[name])[0].isfinite().all():
            raise SlimtuneError(f"merge: {name}.weight overflows float16; nothing was merged")
    owners: dict[int, list[str]] = {}
    for owner, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is not None:
                owners.setdefault(id(p), []).append(f"{owner}.{key}" if owner else key)
    for name, host in changed.items():
        new, error = _merged_weight(name, host)
        others = [o for o in owners[id(host.weight)] if o != f"{name}.weight"]
        report.layers.append(error)
        if others:
            report.untied.append(f"{name}.weight (was {', '.join(others)})")
        host.weight = nn.Parameter(new, requires_grad=False)
    for module in saved_modules(model).values():
        if module.active_adapters:
            _replace(module, module.adapters[module.active_adapters[-1]])
    for _, module in list(extended(model)):
        module.adapters.clear()
        restore(module)
    config: Any = getattr(model, "config", None)
    if report.untied and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
    return report


def _replace(module: SavedModule, new: nn.Module) -> None:
    """Hand a copy's parameters and buffers to the module it was made of."""
    for part, source in new.named_modules():
        target = module.get_submodule(part)
        for key, p in source._parameters.items():
            if p is not None:
                setattr(target, key, nn.Parameter(p.detach(), requires_grad=False))
        for key, b in source._buffers.items():
            if b is not None:
                setattr(target, key, b)


# ---------------------------------------------------------------- counting


@dataclass(frozen=True)
class SummaryRow:
    """One adapter on one layer, or one module trained in full."""

    name: str
    adapter: str
    method: str
    rank: int | None
    parameters: int
    bytes: int


@dataclass
class Summary:
    """What was added to a model. `str()` is a table."""

    rows: list[SummaryRow]
    trainable: int
    """Parameters that receive a gradient."""
    total: int
    """Parameters of the model, adapters included."""

    def __str__(self) -> str:
        table = [("layer", "adapter", "method", "rank", "parameters", "bytes")]
        table += [
            (
                r.name,
                r.adapter,
                r.method,
                "-" if r.rank is None else str(r.rank),
                f"{r.parameters:,}",
                f"{r.bytes:,}",
            )
            for r in self.rows
        ]
        widths = [max(len(row[i]) for row in table) for i in range(6)]
        lines = [
            "  ".join(
                c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        share = self.trainable / self.total if self.total else 0.0
        return "\n".join([*lines, f"trainable {self.trainable:,} of {self.total:,} ({share:.2%})"])


def summary(model: nn.Module) -> Summary:
    """Per layer: adapter, method, rank, parameters and bytes; and the model's trainable share."""
    rows = []
    for name, module in extended(model):
        for adapter, part in module.adapters.items():
            count = sum(p.numel() for p in part.parameters())
            size = sum(p.numel() * p.element_size() for p in part.parameters())
            if isinstance(part, Adapter):
                rows.append(SummaryRow(name, adapter, part.recipe.name, part.structure.rank, count, size))
            else:
                rows.append(SummaryRow(name, adapter, "full", None, count, size))
    return Summary(
        rows,
        sum(p.numel() for _, p in trainable_parameters(model)),
        sum(p.numel() for p in model.parameters()),
    )
