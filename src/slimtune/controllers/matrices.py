"""What controllers share that act on whole weights: the matrices of their targets, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DivergenceError, SlimtuneError, TargetError, UninitializedError
from ..factors import Part
from ..factors.base import assembled, in_form, matrices
from ..layouts import layout_of
from ..ops.truncation import Spectra
from ..structured import check_holdable
from ..targets import own_modules, pick, select, unwrapped

__all__ = ["CONVOLUTIONS", "Matrix", "convolutions", "layer_matrices", "named_matrices", "require_held", "spectra"]

CONVOLUTIONS = "convolutions"
CHUNK = 2**24
"""Numbers of weights that are widened at a time."""


@dataclass(frozen=True)
class Matrix:
    """A parameter seen as the matrices whose ranks count."""

    name: str
    parameter: nn.Parameter
    module: nn.Module | None
    """The layer it is the weight of; None for a bare 2-d parameter."""
    form: str

    def _part(self, t: Tensor) -> Part:
        if self.module is not None:
            layout: Any = layout_of(type(self.module))
            t = layout(self.module)._oriented(t)
        W = t.detach().flatten(1).to(torch.promote_types(t.dtype, torch.float32))
        kernel = tuple(getattr(self.module, "kernel_size", ()))
        return Part(self.name, W, None, kernel, getattr(self.module, "groups", 1))

    def of(self, t: Tensor) -> Tensor:
        """The matrices (G, rows, columns), in fp32 or wider, of a tensor shaped as the parameter."""
        return matrices(self._part(t), self.form)

    def back(self, M: Tensor) -> Tensor:
        """The tensor, shaped and typed as the parameter, whose matrices these are."""
        W = assembled(self._part(self.parameter), M, self.form).to(self.parameter.dtype)
        layout: Any = None if self.module is None else layout_of(type(self.module))
        return W.reshape(self.parameter.shape) if layout is None else layout.store(W, self.parameter)


def convolutions(model: nn.Module) -> list[str]:
    """Convolutions whose kernel is larger than one, but the first: the stem."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = [n for n, m in own_modules(model).items() if isinstance(m, kinds) and math.prod(m.kernel_size) > 1]
    return found[1:]


def layer_matrices(
    model: nn.Module, targets: str | Sequence[str], exclude: str | Sequence[str], form: str, who: str
) -> list[Matrix]:
    """The weights of layers, for a controller called `who`; `targets` as in `st.adapt`, or "convolutions".

    Raises:
        TargetError: a pattern that matches nothing, or a layer that is no linear map, carries adapters, is frozen,
            packed or sharded.
    """
    if targets == CONVOLUTIONS:
        chosen = convolutions(model)
        if exclude:
            dropped = set(pick(exclude, own_modules(model), "exclude"))
            chosen = [n for n in chosen if not any(n == d or n.startswith(d + ".") for d in dropped)]
        if not chosen:
            raise TargetError(
                f"{who}: targets 'convolutions' are those after the first whose kernel is larger than one, and the "
                "model has none; name layers, or 'all-linear'"
            )
    else:
        chosen = select(model, targets, exclude)
    own, found = own_modules(model), []
    for name in chosen:
        module = own[name]
        check_holdable(module, name)
        found.append(_checked(Matrix(name, module._parameters["weight"], module, form), who))  # type: ignore[arg-type]
    return found


def named_matrices(model: nn.Module, targets: str | Sequence[str], form: str, who: str) -> list[Matrix]:
    """The weights of layers, or 2-d parameters, each once, by their names: "all-linear", "convolutions", a list of
    names, suffixes or globs, or a regular expression.

    Raises:
        TargetError: a pattern that matches nothing, or what it matches is frozen, packed or sharded.
    """
    if targets in (CONVOLUTIONS, "all-linear"):
        return layer_matrices(model, targets, (), form, who)
    known: dict[str, Matrix] = {}
    for name, module in unwrapped(model).named_modules():
        layout = layout_of(type(module))
        weight = module._parameters.get("weight")
        if layout is not None and weight is not None and not isinstance(module, nn.Embedding):
            known[name] = Matrix(name, weight, module, form)
    weights = {id(m.parameter): m for m in known.values()}
    for name, p in unwrapped(model).named_parameters():
        if p.dim() == 2 or id(p) in weights:
            known[name] = weights.get(id(p)) or Matrix(name, p, None, form)
    chosen = pick(targets, known, f"{who}: targets")
    once = {id(known[name].parameter): known[name] for name in chosen}
    return [_checked(m, who) for m in once.values()]


def _checked(m: Matrix, who: str) -> Matrix:
    p = m.parameter
    in_form(Part("", torch.zeros(1, 1)), m.form)
    if p.is_meta:
        raise UninitializedError(f"{who}: {m.name!r} is on the meta device; load weights first")
    if hasattr(p, "full_tensor") or not p.is_floating_point():
        raise TargetError(f"{who}: {m.name!r} is sharded or packed ({p.dtype}); its singular values need all of it")
    if not p.requires_grad:
        raise TargetError(f"{who}: {m.name!r} is frozen; it acts on weights that train")
    return m


def require_held(found: Sequence[Matrix], optimizer: torch.optim.Optimizer, who: str) -> dict[int, dict[str, Any]]:
    """{id of a parameter: its group}.

    Raises:
        SlimtuneError: one that the optimizer does not hold.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for m in found:
        if id(m.parameter) not in groups:
            raise SlimtuneError(f"{who}: attach it to the optimizer that holds {m.name!r}")
    return groups


def spectra(
    found: Sequence[Matrix], who: str, exact: bool = True
) -> Iterator[tuple[Matrix, Spectra | None, int, Tensor]]:
    """(matrix, `Spectra` of those of its shape, its place there, its `joint` singular values on the CPU), shape by
    shape; without `Spectra` where none were found.

    Raises:
        DivergenceError: a weight that is not finite.
    """
    for part, M in stacked(found, who):
        made = _decomposed(M, exact)
        if made is not None:
            joint = made.joint.cpu()
            yield from ((m, made, n, joint[n]) for n, m in enumerate(part))
            continue
        for n, m in enumerate(part):  # one that fails does not take the others with it
            alone = _decomposed(M[n : n + 1], True)
            yield m, alone, 0, torch.zeros(0) if alone is None else alone.joint.cpu()[0]


def stacked(found: Sequence[Matrix], who: str) -> Iterator[tuple[list[Matrix], Tensor]]:
    """Matrices of one shape together with their numbers, (N, G, rows, columns); no more than `CHUNK` at a time.

    Raises:
        DivergenceError: a weight that is not finite.
    """
    alike: dict[Any, list[Matrix]] = {}
    for m in found:
        alike.setdefault((m.of(m.parameter).shape, m.parameter.device, m.parameter.dtype), []).append(m)
    for (shape, *_), rows in alike.items():
        size = max(1, CHUNK // math.prod(shape))
        for at in range(0, len(rows), size):
            part = rows[at : at + size]
            M = torch.stack([m.of(m.parameter) for m in part])
            finite = M.isfinite().flatten(1).all(1).tolist()
            if not all(finite):
                bad = ", ".join(m.name for m, good in zip(part, finite, strict=True) if not good)
                raise DivergenceError(f"{who}: the weights of {bad} are no longer finite")
            yield part, M


def _decomposed(M: Tensor, exact: bool) -> Spectra | None:
    try:
        return Spectra.of(M, exact)
    except torch.linalg.LinAlgError:
        return None
