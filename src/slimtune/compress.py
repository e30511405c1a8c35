"""Layer 3: weights replaced by structures, in place, the optimizer's moments with them; and back.

Shapes: O out, I in (a convolution's I is its input channels per group times its kernel), R rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import FileFormatError, SlimtuneError, StructureError, TargetError, UninitializedError
from .factors import Factors, Part, svd
from .factors.base import check_finite
from .layouts import layout_of
from .ranks import optimizers_of, starts_at_mean
from .recipe import subclasses
from .structured import Structured, check_holdable, densify, hold
from .structures import Structure
from .structures.base import check_count
from .targets import own_modules, unwrapped

__all__ = [
    "FactorizeReport",
    "Factorized",
    "SizeReport",
    "describe_structures",
    "expand",
    "factorize",
    "part_of",
    "shape_as",
    "structured_layers",
]


@dataclass(frozen=True)
class Factorized:
    """What became of one layer."""

    name: str
    kind: str
    """The layer's class."""
    shape: tuple[int, int]
    """(O, I)."""
    rank: int
    """As asked for."""
    largest: int
    """The largest rank that makes the layer smaller."""
    before: int
    """Numbers in the weight, and in the bias if there was one."""
    after: int
    """Numbers that hold the layer now; `before` if it was kept."""
    error: float | None
    """|W' - W|_F / |W|_F; None for a layer that was kept dense."""

    @property
    def kept(self) -> bool:
        """Whether it was left dense, because it would not have become smaller."""
        return self.error is None


class SizeReport:
    """What the reports of compressed layers have in common: numbers before and after."""

    layers: list[Any]

    @property
    def before(self) -> int:
        """Numbers in these layers before."""
        return sum(layer.before for layer in self.layers)

    @property
    def after(self) -> int:
        """Numbers in these layers after."""
        return sum(layer.after for layer in self.layers)


@dataclass
class FactorizeReport(SizeReport):
    """What `factorize` did, layer by layer."""

    layers: list[Factorized] = field(default_factory=list)

    def __str__(self) -> str:
        kept = sum(layer.kept for layer in self.layers)
        told = f", {kept} kept dense (not smaller)" if kept else ""
        return f"{len(self.layers) - kept} layers factorised{told}: {self.before:,} -> {self.after:,} parameters"


@torch.no_grad()
def factorize(
    model: nn.Module,
    ranks: Mapping[str, int],
    factors: Factors | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
    *,
    guard: bool = True,
) -> FactorizeReport:
    """Replace weights by structures of fewer numbers, in place; by default W by the nearest B A of rank R.

    A layer's tensors are then `<layer>.structure.*`, in its weight's dtype and on its device, and `<layer>.bias`; what
    was trainable stays so. Adapters go on top of such a layer as of any other, under the same names.

    An optimizer's parameter group gets the new parameters where the old one was, so learning rates and schedules hold.
    Momentum M of the weight is carried over as a gradient would be (of B it is M A^T, of A it is B^T M), second moments
    V likewise by the squares ((B * B)^T V for A).

    Args:
        ranks: {layer: R}.
        factors: what makes the structures, from `st.factors`; `svd()` when None.
        optimizer: the one, or ones, that hold the weights.
        guard: keep a layer dense where R would not make it smaller.

    Raises:
        TargetError: a layer that is not there, or none that can be factorised, or whose weight another module shares.
        StructureError: a rank below 1, or one that the factors cannot take.
        DivergenceError: a weight that is not finite.
        UninitializedError: a weight on the meta device. Nothing has been changed in each case.

    Warns:
        UserWarning: an optimizer's state that starts afresh, being of another shape than the weight.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> print(st.factorize(model, {"0": 8, "2": 10}))
        1 layers factorised, 1 kept dense (not smaller): 4,810 -> 1,738 parameters
        >>> type(model[0].structure).__name__, model[0].structure.rank
        ('LowRank', 8)
    """
    make, optimizers, own = factors or svd(), optimizers_of(optimizer), own_modules(model)
    if any(isinstance(o, torch.optim.LBFGS) for o in optimizers):
        raise SlimtuneError("factorize: LBFGS keeps one vector of all parameters, which cannot change; make it anew")
    shared = shared_weights(model)
    report, plans = FactorizeReport(), []
    for name, rank in ranks.items():
        check_count(rank, f"factorize: rank of {name!r}")
        if name not in own:
            raise TargetError(f"factorize: the model has no layer {name!r}")
        module = own[name]
        check_holdable(module, name)
        check_unshared(module, name, shared)
    for name, rank in ranks.items():
        module = own[name]
        part = check_finite(part_of(module, name))
        before = sum(p.numel() for p in module.parameters(recurse=False))
        largest = make.sizes(part)[1]
        entry: dict[str, Any] = {"name": name, "kind": type(module).__name__, "rank": rank, "largest": largest}
        entry |= {"shape": tuple(part.W.shape), "before": before}
        if guard and rank > largest:
            report.layers.append(Factorized(**entry, after=before, error=None))
            continue
        made = make(part, rank)
        bias = part.bias if made.bias is None else made.bias
        after = sum(p.numel() for p in made.structure.parameters()) + (0 if bias is None else bias.numel())
        error = float((made.structure.dense() - part.W).norm() / part.W.norm().clamp_min(1e-30))
        if not error < torch.inf:
            raise StructureError(f"factorize: what takes the place of {name!r} is not finite")
        report.layers.append(Factorized(**entry, after=after, error=error))
        made.structure.to(cast(Tensor, module.weight))
        plans.append((module, made))
    for module, made in plans:
        weight = module.weight
        hold(module, made.structure, made.bias)
        for o in optimizers:
            _carry(o, weight, module)  # type: ignore[arg-type]
    return report


def shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """{id of a weight: the modules that use it} of those that several do."""
    users: dict[int, list[str]] = {}
    for name, module in unwrapped(model).named_modules(remove_duplicate=False):
        for p in module._parameters.values():
            if p is not None:
                users.setdefault(id(p), []).append(name)
    return {key: names for key, names in users.items() if len(names) > 1}


def check_unshared(module: nn.Module, name: str, shared: Mapping[int, Sequence[str]]) -> None:
    """Raise TargetError for a layer whose weight is among the `shared_weights`."""
    if id(module.weight) in shared:
        others = ", ".join(n for n in shared[id(module.weight)] if n != name)
        raise TargetError(f"{name!r} shares its weight with {others}; leave it out, or untie them")


def part_of(module: nn.Module, name: str) -> Part:
    """A layer's weight as `Factors` take it, in fp32 or wider.

    Raises:
        UninitializedError: it is on the meta device.
    """
    layout: Any = layout_of(type(module))
    if module.weight.is_meta:  # type: ignore[union-attr]
        raise UninitializedError(f"{name!r} is on the meta device; load weights first")
    weight: Any = module.weight
    W = layout(module)._oriented(weight.detach())
    bias: Any = getattr(module, "bias", None)
    return Part(
        name,
        W.flatten(1).to(torch.promote_types(W.dtype, torch.float32)),
        None if bias is None else bias.detach().to(torch.promote_types(bias.dtype, torch.float32)),
        tuple(getattr(module, "kernel_size", ())),
        getattr(module, "groups", 1),
    )


# ---------------------------------------------------------------- the optimizer


def _carry(optimizer: torch.optim.Optimizer, weight: nn.Parameter, module: Structured) -> None:
    """Put a layer's new parameters where its weight was in the groups, and what is known of its moments with them."""
    new = list(module.structure.parameters())
    for group in optimizer.param_groups:
        for place, p in enumerate(group["params"]):
            if p is weight:
                group["params"][place : place + 1] = new
                if "param_names" in group:
                    own = group["param_names"][place].removesuffix("weight")
                    names = [f"{own}structure.{n}" for n, _ in module.structure.named_parameters()]
                    group["param_names"][place : place + 1] = names
                break
        else:
            continue
        break
    else:
        return
    state = optimizer.state.pop(weight, {})
    layout = module.own_layout(module)
    oriented = {key: layout._oriented(v) for key, v in state.items() if torch.is_tensor(v) and v.shape == weight.shape}
    if any(torch.is_tensor(v) and v.numel() > 1 and key not in oriented for key, v in state.items()):
        warnings.warn(
            f"{type(optimizer).__name__} keeps state of another shape than its parameters; the moments of a factorised "
            "weight start afresh",
            UserWarning,
            stacklevel=3,
        )
        return
    for key, value in state.items():
        if key == "grad_avg":  # of centred RMSprop: its square must stay below the carried mean of squares
            parts = [torch.zeros_like(p) for p in new]
        elif key in oriented:
            parts = _pulled(module.structure, oriented[key], square=starts_at_mean(key))
        else:
            parts = [value.clone() if torch.is_tensor(value) else value for _ in new]
        for p, part in zip(new, parts, strict=True):
            optimizer.state[p][key] = part
    if weight.grad is not None:
        for p, part in zip(new, _pulled(module.structure, layout._oriented(weight.grad)), strict=True):
            p.grad = part


def _pulled(structure: Structure, G: Tensor, square: bool = False) -> list[Tensor]:
    """The gradient of <dW, G> in the parameters; with `square`, of the dW that their squares would make, in these."""
    own = dict(structure.named_parameters())
    leaves = [(p.detach().square() if square else p.detach()).requires_grad_(True) for p in own.values()]
    with torch.enable_grad():
        dW = torch.func.functional_call(_Dense(structure), {f"of.{n}": t for n, t in zip(own, leaves, strict=True)})
        return list(torch.autograd.grad(dW, leaves, G.to(dW)))


class _Dense(nn.Module):
    def __init__(self, of: Structure) -> None:
        super().__init__()
        self.of = of

    def forward(self) -> Tensor:
        return self.of.dense()


# ---------------------------------------------------------------- there and back


def structured_layers(model: nn.Module) -> dict[str, Structured]:
    """Layers that hold structures, by name."""
    return {name: module for name, module in own_modules(model).items() if isinstance(module, Structured)}


def expand(model: nn.Module, layers: Sequence[str] | None = None) -> list[str]:
    """Give layers weights of their own again, W' = dW, in place; a bias that factorising added stays.

    Args:
        layers: their names; all that hold a structure when None.

    Returns:
        The layers changed.

    Raises:
        TargetError: a layer that holds no structure, or that carries adapters. Nothing has been changed.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(8, 8)); _ = st.factorize(model, {"0": 2})
        >>> st.expand(model), type(model[0]).__name__, int(torch.linalg.matrix_rank(model[0].weight))
        (['0'], 'Linear', 2)
    """
    found = structured_layers(model)
    for name in layers or ():
        if name not in found:
            raise TargetError(f"expand: {name!r} holds no structure; these do: {', '.join(found) or 'none'}")
    chosen = list(found) if layers is None else list(dict.fromkeys(layers))
    for name in chosen:
        if hasattr(found[name], "active_adapters"):
            raise TargetError(f"expand: {name!r} carries adapters; merge or remove them first")
    for name in chosen:
        densify(found[name])
    return chosen


def describe_structures(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What every layer that holds a structure has, as plain JSON data for `shape_as`."""
    return {
        name: {
            "structure": type(module.structure).__name__,
            "options": module.structure.options(),
            "bias": module._parameters.get("bias") is not None,
        }
        for name, module in structured_layers(model).items()
    }


def shape_as(model: nn.Module, description: Mapping[str, Mapping[str, Any]]) -> None:
    """Make layers hold structures of the kinds and sizes of `describe_structures`, their numbers yet to be loaded.

    Raises:
        FileFormatError: a description that is none, or of a layer that the model lacks or that cannot hold it. Nothing
            has been changed.
    """
    own, known, plans = own_modules(model), subclasses(Structure), []
    for name, entry in description.items():
        try:
            kind, options, bias = entry["structure"], dict(entry["options"]), entry["bias"]
            if kind not in known or not isinstance(bias, bool):
                raise FileFormatError(f"{name}: no structure is called {str(kind)[:40]!r}")
            module = own[name]
            check_holdable(module, name)
            O, I = layout_of(type(module)).sizes(module)  # type: ignore[union-attr]
            weight: Any = module.weight
            structure = known[kind](O, I, **options, device=weight.device, dtype=weight.dtype)
        except (KeyError, TypeError, ValueError, SlimtuneError) as error:
            raise FileFormatError(f"structure of layer {str(name)[:80]!r}: {error}") from None
        plans.append((module, structure, bias))
    for module, structure, bias in plans:
        lacks = bias and module._parameters.get("bias") is None
        weight = module.weight
        hold(module, structure, weight.new_zeros(structure.out_features) if lacks else None)
