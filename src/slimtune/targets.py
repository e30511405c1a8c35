"""Layer 3: what is where in a model, and which layers `targets` mean."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .errors import AdapterNameError, TargetError
from .layers import Extended, Host, SavedModule, check_host, own_class
from .layouts import layout_of
from .recipe import matches

__all__ = [
    "adapter_names",
    "check_free",
    "check_name",
    "extended",
    "hosts",
    "own_modules",
    "pick",
    "require_adapter",
    "saved_modules",
    "select",
    "trainable_parameters",
    "unwrapped",
]

HEADS = ("lm_head", "classifier", "score", "qa_outputs", "head", "heads", "fc", "classification_head")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel, DistributedDataParallel or a PeftModel, whose names files and
    targets use."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if hasattr(type(model), "active_peft_config"):
            inner = model.get_base_model()  # type: ignore[operator]
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def extended(model: nn.Module) -> Iterator[tuple[str, Extended]]:
    """(name, module) of everything adapted or saved, in the model's order."""
    for name, module in unwrapped(model).named_modules():
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
    """Names of the adapters attached to a model, in the order in which its layers carry them."""
    return list(dict.fromkeys(a for _, m in extended(model) for a in m.adapters))


def check_name(name: object) -> str:
    """Return `name` if it is a plain adapter name: letters, digits, '_' and '-', at most 64.

    Raises:
        AdapterNameError: anything else; names become attribute names and folder names.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise AdapterNameError(f"adapter name {name!r}: expected 1 to 64 letters, digits, '_' or '-' (no path, no dot)")
    if hasattr(nn.ModuleDict(), name):
        raise AdapterNameError(f"adapter name {name!r} is reserved by torch.nn.ModuleDict")
    return name


def check_free(model: nn.Module, name: object) -> None:
    """Raise AdapterNameError unless `name` is a plain name that no adapter of the model has."""
    if check_name(name) in (names := adapter_names(model)):
        raise AdapterNameError(f"adapter name {name!r} is taken; attached: {', '.join(names)}")


def require_adapter(model: nn.Module, name: str) -> None:
    """Raise AdapterNameError, listing the names there are, unless `name` is attached."""
    if name not in (names := adapter_names(model)):
        raise AdapterNameError(f"no adapter named {name!r}; attached: {', '.join(names) or 'none'}")


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of everything that receives a gradient."""
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad)


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
    model = unwrapped(model)
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is not None:
        return set(head.modules())
    heads = [h for n in HEADS if isinstance(h := getattr(model, n, None), nn.Module)]
    return {m for h in heads for m in h.modules()}


def _is_linear(module: nn.Module) -> bool:
    cls = own_class(module)
    layout = layout_of(cls)
    return layout is not None and layout.is_matrix and not issubclass(cls, NonDynamicallyQuantizableLinear)


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of the model itself by name, each once, without those that adapters added."""
    own: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, prefix: str) -> None:
        for key, child in module._modules.items():
            if child is None or child in seen or (key == "adapters" and isinstance(module, Extended)):
                continue
            seen.add(child)
            own[prefix + key] = child
            walk(child, f"{prefix}{key}.")

    walk(unwrapped(model), "")
    return own


def pick(patterns: str | Sequence[str], modules: Iterable[str], what: str) -> list[str]:
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
    own = own_modules(model)
    if not own and layout_of(own_class(model)):
        raise TargetError(f"the model itself is the layer ({type(model).__name__}): put it in an nn.Sequential")
    if not targets:
        raise TargetError("targets: none given; expected 'all-linear', a list of names, or a regular expression")
    fitting = {n: m for n, m in own.items() if layout_of(own_class(m))}
    if targets == "all-linear":
        head = _head(model)
        chosen = [n for n, m in fitting.items() if _is_linear(m) and m not in head]
        if not chosen:
            raise TargetError("targets 'all-linear': the model has no linear layer apart from its output head")
    else:
        try:
            chosen = pick(targets, fitting, "targets")
        except TargetError:
            # a pattern may name a layer that exists but that no adapter fits: say that instead
            for name in pick(targets, own, "targets"):
                if not any(n.startswith(name + ".") for n in own):
                    check_host(own[name], name)
            raise
    if exclude:
        dropped = set(pick(exclude, own, "exclude"))
        chosen = [n for n in chosen if not any(n == d or n.startswith(d + ".") for d in dropped)]
        if not chosen:
            raise TargetError(f"exclude {exclude!r} leaves nothing of targets {targets!r}")
    for name in chosen:
        check_host(own[name], name)
        whole = next((n for n, m in own.items() if isinstance(m, SavedModule) and name.startswith(f"{n}.")), None)
        if whole:
            raise TargetError(f"{name!r} lies in {whole!r}, which another adapter trains in full")
    return chosen


def reactivate(before: Iterable[tuple[Extended, tuple[str, ...]]]) -> None:
    """Put the active adapters back, minus those removed and plus those attached in the meantime."""
    for module, active in before:
        if isinstance(module, Extended):
            kept = tuple(n for n in active if n in module.adapters)
            module.active_adapters = kept + tuple(n for n in module.active_adapters if n not in kept)
