"""Layer 3: the verbs that put adapters on a model, switch them and take them off."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from .errors import AdapterNameError, SlimtuneError, StructureError, TargetError
from .initialisers import Stats
from .layers import Adapter, Host, SavedModule, check_extendable, check_host, extend, own_class, restore
from .layouts import layout_of
from .recipe import Recipe, matches
from .targets import (
    check_free,
    extended,
    hosts,
    own_modules,
    pick,
    reactivate,
    require_adapter,
    saved_modules,
    select,
    trainable_parameters,
)

__all__ = [
    "Summary",
    "SummaryRow",
    "activate",
    "adapt",
    "attach_adapters",
    "build_adapter",
    "disabled",
    "initialize",
    "remove",
    "summary",
]


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


def adapt(
    model: nn.Module,
    recipe: Recipe,
    targets: str | Sequence[str] = "all-linear",
    name: str = "default",
    *,
    exclude: str | Sequence[str] = (),
    modules_to_save: str | Sequence[str] = (),
    stats: Mapping[str, Stats] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Attach an adapter to a model in place; freeze everything else.

    The new adapter goes on top of the active ones: with W1 = adapter1(W), the layer computes adapter2(W1).
    Adapter parameters are fp32 (fp64 on an fp64 base) whatever the base; nothing of the base is edited, and it stays
    frozen when the adapter is removed. On a meta model the adapter stays on meta until `initialize`. Resize token
    embeddings before, not after.

    Args:
        targets: which layers; "all-linear" (every Linear and transformers Conv1D but the output head), a list of
            module names, suffixes or globs, or one regular expression searched in the full name.
        exclude: the same forms; what they match is left out.
        name: the adapter's name; 1 to 64 letters, digits, '_' or '-'.
        modules_to_save: modules (names, suffixes, globs, or a regular expression) to train in full as a private
            copy that is saved with the adapter, such as a new classification head.
        stats: {layer: statistics of the data} for recipes that start from them, as `st.calibrate.fit` returns.
        progress: progress(layers initialised, layers), for recipes that take long to start, such as by a decomposition
            of every weight.

    Returns:
        The names of the adapted layers.

    Raises:
        TargetError, AdapterNameError, StructureError: nothing has been changed then.

    Warns:
        UserWarning: statistics with a recipe that shares ranks out by them, but lacks the ranks that
            `st.calibrate.fit` has found.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> st.adapt(model, st.lora(rank=2), ["0"])
        ['0']
    """
    if not isinstance(recipe, Recipe):
        raise StructureError(f"adapt: expected a Recipe such as st.lora(), got {recipe!r}")
    check_stats(recipe, stats)
    check_free(model, name)
    own = own_modules(model)
    saved = pick(modules_to_save, own, "modules_to_save") if modules_to_save else []
    saved = [n for n in saved if not any(n.startswith(o + ".") for o in saved if o != n)]
    chosen = [n for n in select(model, targets, exclude) if not any(n == s or n.startswith(s + ".") for s in saved)]
    if not chosen:
        raise TargetError(f"targets {targets!r} lie wholly inside modules_to_save {list(saved)!r}")
    for pattern in recipe.overrides:
        if not any(matches(n, pattern) for n in chosen):
            raise TargetError(
                f"{recipe.name}: the override {pattern!r} matches none of the {len(chosen)} layers chosen"
            )
    built = {n: build_adapter(own[n], n, recipe.for_layer(n, own[n], model)) for n in chosen}
    trained = [p for p in model.parameters() if p.requires_grad]
    attach_adapters(model, built, name, saved)
    try:
        initialize(model, name, stats, progress)
    except BaseException:
        remove(model, name)
        for p in trained:
            p.requires_grad_(True)
        raise
    return chosen


def check_stats(recipe: Recipe, stats: object) -> None:
    """Raise or warn where a recipe cannot be meant to start from `stats`."""
    if stats is not None and not isinstance(stats, Mapping):
        raise StructureError(
            "stats must be {layer: statistics}, the second of the two values that st.calibrate.fit returns, got "
            f"{type(stats).__name__}"
        )
    if stats and recipe.allocation and not recipe.overrides:
        warnings.warn(
            f"{recipe.name} shares ranks out by the data, and this recipe holds none of the ranks found: take "
            "the recipe that st.calibrate.fit returned with the statistics",
            UserWarning,
            stacklevel=3,
        )


def build_adapter(module: nn.Module, name: str, recipe: Recipe, device: torch.device | str | None = None) -> Adapter:
    """An uninitialised adapter that fits a layer, beside its weight unless `device` says otherwise.

    Raises:
        TargetError, StructureError: naming the layer and why it cannot carry this adapter.
    """
    check_host(module, name)
    layout = layout_of(own_class(module))
    dtype = torch.float64 if module.weight.dtype == torch.float64 else torch.float32
    try:
        O, I = layout.sizes(module)  # type: ignore[union-attr]
        adapter = _outline(recipe, O, I, dtype)
        if device != "meta":
            _check_size(adapter, O, I)
            adapter = Adapter(recipe, O, I, device=device or module.weight.device, dtype=dtype)
    except SlimtuneError as e:
        raise type(e)(f"{name}: {e}") from None
    if not layout.takes_dropout:  # type: ignore[union-attr]
        adapter.dropout = 0.0
    return adapter.train(module.training)


def _outline(recipe: Recipe, O: int, I: int, dtype: torch.dtype) -> Adapter:
    """An adapter on the meta device, where sizes that no memory can hold cost nothing."""
    try:
        return Adapter(recipe, O, I, device="meta", dtype=dtype)
    except (OverflowError, RuntimeError, TypeError) as e:
        raise StructureError(f"{recipe.name} cannot be built for {O} x {I}: {str(e).splitlines()[0]}") from e


def _check_size(adapter: Adapter, O: int, I: int) -> None:
    """Refuse a mistyped rank before it fills the memory."""
    numbers, most = sum(p.numel() for p in adapter.parameters()), 2**24 + 16 * O * I
    if numbers > most:
        raise StructureError(
            f"{adapter.recipe.name} would hold {numbers:,} numbers for a weight of {O} x {I}, expected at most "
            f"{most:,}; lower its rank or block"
        )


def attach_adapters(model: nn.Module, built: dict[str, Adapter], name: str, saved: Sequence[str] = ()) -> None:
    """Attach adapters built for these layers, on top of the active ones; they alone are trainable afterwards.

    `saved` modules get a trainable copy. Errors come before the first layer is touched.
    """
    own = own_modules(model)
    _check_fast_path(model, [*built, *saved])
    copies: dict[str, nn.Module] = {}
    for layer in saved:
        if isinstance(own[layer], Host) or any(isinstance(m, Host) for m in own[layer].modules()):
            raise TargetError(f"modules_to_save: {layer!r} holds layers that another adapter changes")
        check_extendable(own[layer], layer)
        copies[layer] = _copy_of(own[layer])
    model.requires_grad_(False)
    for layer, adapter in built.items():
        module = own[layer]
        host = extend(module, layout_of(own_class(module)))
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
def initialize(
    model: nn.Module,
    name: str = "default",
    stats: Mapping[str, Stats] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Give an adapter its starting values: dW = 0, magnitudes read from the weights below it.

    `adapt` calls it. Call it yourself after loading weights into a model that was adapted on the meta device: an
    adapter still on meta is first allocated beside its layer's weight. Layers on meta are left alone.

    Raises:
        StructureError: naming the layer whose recipe starts from statistics of the data that `stats` lacks.
    """
    require_adapter(model, name)
    awaited: set[str] = set()
    layers = hosts(model, name)
    for number, (layer, host) in enumerate(layers.items(), 1):
        device = host.weight.device
        if device.type == "meta":
            continue
        adapter = host.addition(name)
        if adapter.scale.is_meta:
            adapter.to_empty(device=device)
        try:
            adapter.initialize(host.map(below=name), (stats or {}).get(layer))
        except StructureError as e:
            raise StructureError(f"{layer}: {e}") from None
        awaited.update(adapter.recipe.controllers)
        adapter.awaited = awaited
        if progress:
            progress(number, len(layers))
    for module in saved_modules(model, name).values():
        new = module.addition(name)
        state = module.base_state()
        if any(t.is_meta for t in new.state_dict().values()) and not any(t.is_meta for t in state.values()):
            new.to_empty(device=next(iter(state.values())).device)
            new.load_state_dict(state)


@torch.no_grad()
def prepare(model: nn.Module, name: str) -> None:
    """Let an adapter's structures fill their own buffers from the weights below, after tensors have been loaded."""
    for host in hosts(model, name).values():
        host.addition(name).structure.prepare(host.map(below=name).weight)


def activate(model: nn.Module, names: str | Sequence[str]) -> None:
    """Make these adapters, in this order from the base up, the active ones.

    Which parameters train is unchanged: only the adapter attached last does, until you set `requires_grad` yourself.

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
        reactivate(before)


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
