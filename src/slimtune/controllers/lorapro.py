"""Gradients of two factors that follow the gradient of their product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DivergenceError, SlimtuneError, StructureError
from ..layers import Adapter
from ..ops.lorapro import X_CHOICES, adjusted_gradients, carried, retracted, tangent
from ..ops.processes import like, whole
from ..recipe import is_number
from ..structures import Factored
from ..structures.base import Pair
from .base import Controller, require_rates, trained_adapters

__all__ = ["LoRAPro"]

FORMS = ("factors", "full", "lean")
MOMENT, SQUARE = "lorapro_moment", "lorapro_square"
STEP = "step"  # a tensor of that name is what torch's optimizers look for in every state they load


@dataclass
class _Layer:
    """One pair of factors, and where its parameters stand in the optimizer."""

    name: str
    adapter: Adapter
    groups: tuple[int, int]  # of A and of B


@dataclass
class _Batch:
    """Layers of one shape at one step: what was stacked, (N, R, I), (N, O, R) and (N, 1, 1), and where it is from."""

    layers: list[_Layer]
    parameters: list[tuple[nn.Parameter, nn.Parameter]]
    grads: list[tuple[Tensor, Tensor]]
    A: Tensor
    B: Tensor
    gA: Tensor
    gB: Tensor
    scale: Tensor


class LoRAPro(Controller):
    """Makes the two factors of every W + s B A step where the gradient of W would go, as far as they can.

    LoRA-Pro, Wang et al. 2024, arXiv 2407.18242. Of all small changes of B and A, the adjusted gradients make the one
    whose effect on W is nearest to the gradient of W (theorem 2.1, `ops.lorapro.adjusted_gradients`); the loss goes
    down along them (theorem 2.2) and the effect does not depend on how B A is split. They follow from the gradients of
    B and A alone. Attach it to any torch optimizer; parameters that belong to no such pair are left to that optimizer.

    - `form="factors"` replaces the gradients of B and A before the optimizer's step: with SGD the paper's LoRA-Pro-SGD,
      with AdamW its published "efficient" form, whose state is LoRA's.
    - `form="full"` is the paper's AdamW: Adam's moments of the projected gradient of W, two (O, I) matrices per pair
      in fp32, and factors that follow Adam's step of W. The learning rate is in units of W, as for full fine-tuning.
    - `form="lean"` is ours, not the paper's: the same with the first moment kept as the two thin matrices that it
      shows to the factors, carried to the new factors after each step, and the second moment as the means of its rows
      and columns (as Adafactor, arXiv 1804.04235, does): R (O + I) + O + I numbers per pair, half of LoRA's state.

    In "full" and "lean" the controller takes the step itself, right after the optimizer's, with its present learning
    rate, betas, eps and weight decay (0.9, 0.999, 1e-8 and 0 where it has none); the optimizer does not see the
    pair's gradients. Weight decay multiplies B A by 1 - lr * decay, half of it on each factor; W is frozen and does not
    decay, where the paper's does. Both factors need one learning rate then. "factors" allows two (LoRA+); only
    `X="zero"` still promises descent in that case.

    B starts at zero and is of the size of one step after it, so the formula asks the second step to rewrite A whatever
    the learning rate, which with small batches ruins what it learns. `cap` holds that back: no step, learning rate
    times adjusted gradient, is longer than `cap` times the larger factor; the step still goes down. The paper's
    formula is `damping=0, cap=None`.

    Adam keeps that in mind: in "factors" its second moment of A remembers the first, long gradients for some
    1 / (1 - beta2) steps, in which A hardly moves. "full" and "lean" have no such memory, since their moments are of W.

    It acts on clipped gradients: what the clipping measures are LoRA's own. Under a Magnitude (DoRA) it is the
    gradient of W + s B A that is met, not that of the rescaled weight. Dropout of the input is fine; with
    `rank_dropout` the gradients of B and A belong to no common one and the promises hold in the mean only. Factors that
    FSDP2 shards are gathered for "factors"; the other forms refuse them.

    Args:
        form: "factors", "full" or "lean".
        X: how the step is shared between B and A: "sylvester", closest to LoRA's own gradients (theorem 2.3), "zero"
            or "symmetric". The paper finds little difference.
        damping: added to the eigenvalues of B^T B and A A^T, in units of their mean.
        absolute: damping is added as it is; the authors' code has 1e-8.
        cap: the longest step as a share of the larger factor's norm, or None.
        retract: after each step, replace B A by the nearest matrix of rank R to what the step asked for, without the
            product of the two steps; B and A change their bases with it. For optimizers that keep no momentum of B and
            A: SGD without momentum, "full" and "lean".
        adapter: name of the adapter; by default those whose recipe names LoRAPro, else all that train.

    Raises:
        StructureError: an option outside its range; when attached, a layer whose structure is no pair of factors.
        SlimtuneError: when attached, nothing to act on, a factor that the optimizer does not hold, two learning rates
            where one is needed, or sharded factors where whole ones are; in a step, an optimizer that undoes loss
            scaling inside its fused step, where that cannot be.
        DivergenceError: factors that are no longer finite.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(4, 4)); _ = st.adapt(model, st.lora(rank=2))
        >>> optimizer = torch.optim.AdamW(st.param_groups(model, lr=1e-3))
        >>> _ = st.attach(st.LoRAPro(), model, optimizer)
        >>> model(torch.randn(3, 4)).square().mean().backward(); optimizer.step()
    """

    def __init__(
        self,
        form: str = "factors",
        X: str = "sylvester",
        *,
        damping: float = 1e-6,
        absolute: bool = False,
        cap: float | None = 0.2,
        retract: bool = False,
        adapter: str | None = None,
    ) -> None:
        for key, value, known in (("form", form, FORMS), ("X", X, X_CHOICES)):
            if value not in known:
                raise StructureError(f"LoRAPro: {key} must be one of {', '.join(known)}, got {value!r}")
        for key, flag in (("absolute", absolute), ("retract", retract)):
            if not isinstance(flag, bool):
                raise StructureError(f"LoRAPro: {key} must be true or false, got {flag!r}")
        if not is_number(damping) or not 0 <= damping < float("inf"):
            raise StructureError(f"LoRAPro: damping must be a finite number of at least 0, got {damping!r}")
        if cap is not None and (not is_number(cap) or not 0 < cap < float("inf")):
            raise StructureError(f"LoRAPro: cap must be a finite number above 0, or None, got {cap!r}")
        self.form, self.X, self.damping, self.absolute = form, X, damping, absolute
        self.cap, self.retract, self.adapter = cap, retract, adapter
        self._batches: list[_Batch] = []

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer, self._batches = optimizer, []
        group = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
        self._layers = [
            self._layer(f"{layer}, adapter {name!r}", a, group)
            for layer, name, a in trained_adapters(model, "LoRAPro", self.adapter, others=True)
        ]
        require_rates((optimizer.param_groups[g] for layer in self._layers for g in layer.groups), "LoRAPro")
        self._check_rates()

    def _layer(self, name: str, adapter: Adapter, group: dict[int, int]) -> _Layer:
        structure = adapter.structure
        pair = structure.pair() if isinstance(structure, Factored) else None
        if pair is None:
            raise StructureError(
                f"{name}: LoRAPro needs dW = B A with two trained factors, and {type(structure).__name__} "
                f"({adapter.recipe.name}) is not of that form"
            )
        for key, p in (("A", pair.A_parameter), ("B", pair.B_parameter)):
            if hasattr(p, "full_tensor") and (self.form != "factors" or self.retract):
                what = "retract" if self.form == "factors" else f"form={self.form!r}"
                raise SlimtuneError(f"{name}: {key} is sharded, which LoRAPro's {what} cannot step; use form='factors'")
            if not p.requires_grad or id(p) not in group:
                where = "is not among the optimizer's parameters" if p.requires_grad else "is frozen"
                raise SlimtuneError(f"{name}: LoRAPro needs both factors trained by the optimizer, and {key} {where}")
        return _Layer(name, adapter, (group[id(pair.A_parameter)], group[id(pair.B_parameter)]))

    @torch.no_grad()
    def before_step(self, model: nn.Module) -> None:
        if self.form != "factors" and getattr(self._optimizer, "found_inf", None) is not None:
            raise SlimtuneError(
                f"LoRAPro: this {type(self._optimizer).__name__} undoes the loss scaling inside its fused step, which "
                f"form={self.form!r} does not take part in; make it with fused=False"
            )
        batches = self._stacked()
        for batch in batches if self.form == "factors" else ():
            for side, new in enumerate(self._adjusted(batch, batch.gA, batch.gB)):
                _copy([g[side] for g in batch.grads], list(new.unbind()))
        if self.form != "factors":
            self._check_rates()
            for batch in batches:
                for A, B in batch.parameters:
                    A.grad = B.grad = None
        self._batches = batches if self.form != "factors" or self.retract else []

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        batches, self._batches = self._batches, []
        for batch in batches:
            if self.form == "factors":
                A, B = _factors(batch)
                _retract(batch, (batch.A, batch.B), (A - batch.A, B - batch.B))
                continue
            self._full(batch) if self.form == "full" else self._lean(batch)
            for (A, B), (gA, gB) in zip(batch.parameters, batch.grads, strict=True):
                A.grad, B.grad = gA, gB

    def _full(self, batch: _Batch) -> None:
        """Adam on the projected gradient of W, one layer's (O, I) matrices at a time."""
        hA, hB = self._adjusted(batch, batch.gA, batch.gB, "zero", cap=False)
        lA, lB = torch.empty_like(hA), torch.empty_like(hB)
        for i, (p, _) in enumerate(batch.parameters):
            (b1, b2), eps = self._adam(batch.layers[i])
            A, B, s, state = batch.A[i], batch.B[i], batch.scale[i], self._optimizer.state[p]
            g = tangent(A, B, hA[i], hB[i], s)
            if MOMENT not in state or state[MOMENT].shape != g.shape:  # `resize` takes (O, I) for A's where R = O
                state[STEP] = torch.tensor(0.0)
                state[MOMENT], state[SQUARE] = torch.zeros_like(g), torch.zeros_like(g)
            state[STEP] += 1
            M, V, t = state[MOMENT], state[SQUARE], state[STEP].item()
            M.lerp_(g, 1 - b1)
            V.mul_(b2).addcmul_(g, g, value=1 - b2)
            # M / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps) in fewer passes
            root = (1 - b2**t) ** 0.5
            u = torch.div(M, torch.sqrt(V, out=g).add_(eps * root), out=g)
            s = s * (root / (1 - b1**t))
            lA[i], lB[i] = (s * B).mT @ u, u @ (s * A).mT
        self._step(batch, *self._adjusted(batch, lA, lB))

    def _lean(self, batch: _Batch) -> None:
        """The same without an (O, I) matrix: M as s B^T M and s M A^T, its squares as means of rows and columns."""
        A, B, s = batch.A, batch.B, batch.scale
        O, I = B.shape[-2], A.shape[-1]
        states = [tuple(self._optimizer.state[p] for p in pair) for pair in batch.parameters]
        for (a, b), (pA, pB) in zip(states, batch.parameters, strict=True):
            if MOMENT not in a:
                a[STEP], a[MOMENT], a[SQUARE] = torch.tensor(0.0), torch.zeros_like(pA), pA.new_zeros(I)
                b[STEP], b[MOMENT], b[SQUARE] = torch.tensor(0.0), torch.zeros_like(pB), pB.new_zeros(O)
            a[STEP] += 1
            b[STEP] += 1
        adam = [self._adam(layer) for layer in batch.layers]
        b1, b2 = (_column([betas[k] for betas, _ in adam], A) for k in (0, 1))
        eps = _column([e for _, e in adam], A)
        c1, c2 = (
            _column([1 - betas[k] ** a[STEP].item() for (betas, _), (a, _) in zip(adam, states, strict=True)], A)
            for k in (0, 1)
        )
        nA, nB = (
            b1 * torch.stack([state[side][MOMENT] for state in states]) + (1 - b1) * g
            for side, g in enumerate((batch.gA, batch.gB))
        )
        (hA, mA), (hB, mB) = self._adjusted(
            batch, torch.stack([batch.gA, nA]), torch.stack([batch.gB, nB]), "zero", cap=False
        )
        P, Q = s * torch.cat([B, hB], -1), torch.cat([hA, A], -2)  # the projected gradient is P Q
        rows = ((P @ (Q @ Q.mT)) * P).sum(-1, keepdim=True).clamp_min(0) / I  # (N, O, 1)
        columns = (((P.mT @ P) @ Q) * Q).sum(-2, keepdim=True).clamp_min(0) / O  # (N, 1, I)
        rows = b2 * torch.stack([b[SQUARE] for _, b in states])[:, :, None] + (1 - b2) * rows
        columns = b2 * torch.stack([a[SQUARE] for a, _ in states])[:, None] + (1 - b2) * columns
        # Adam's u = M / (sqrt(V) + eps) with V = rows columns / mean
        left = torch.where(rows > 0, rows.mean(-2, keepdim=True) / rows, 0).sqrt()
        right = 1 / ((columns / c2).sqrt() + eps)
        lA, lB = carried(A, B, mA, mB, A * right, B * left, s)
        self._step(batch, *self._adjusted(batch, lA * right / c1, lB * left / c1))
        nA, nB = carried(A, B, mA, mB, *_factors(batch), s)
        for i, (a, b) in enumerate(states):
            a[MOMENT].copy_(nA[i])
            b[MOMENT].copy_(nB[i])
            a[SQUARE].copy_(columns[i, 0])
            b[SQUARE].copy_(rows[i, :, 0])

    def _step(self, batch: _Batch, hA: Tensor, hB: Tensor) -> None:
        """Decay the factors, and move them along -(hA, hB)."""
        groups = [self._optimizer.param_groups[layer.groups[0]] for layer in batch.layers]
        lr = _column([float(g["lr"]) * (-1 if g.get("maximize") else 1) for g in groups], hA)
        decays = [float(g["lr"]) * g.get("weight_decay", 0.0) for g in groups]
        if any(decays):
            for side in zip(*batch.parameters, strict=True):
                torch._foreach_mul_(side, [max(0.0, 1 - decay) ** 0.5 for decay in decays])
        if not self.retract:
            _add(batch, -lr * hA, -lr * hB)
            return
        _retract(batch, _factors(batch), (-lr * hA, -lr * hB))

    def _adjusted(
        self, batch: _Batch, gA: Tensor, gB: Tensor, X: str | None = None, cap: bool = True
    ) -> tuple[Tensor, Tensor]:
        limits = None
        if cap and self.cap is not None:
            size = torch.maximum(*(torch.linalg.matrix_norm(t, keepdim=True) for t in (batch.A, batch.B)))
            groups = self._optimizer.param_groups
            rates = [_column([float(groups[x.groups[k]]["lr"]) for x in batch.layers], size) for k in (0, 1)]
            unscaled_later = getattr(self._optimizer, "grad_scale", None)  # inside a fused step
            size = size * self.cap * (1.0 if unscaled_later is None else unscaled_later)
            limits = size / rates[0], size / rates[1]
        try:
            return adjusted_gradients(
                batch.A, batch.B, gA, gB, batch.scale, X or self.X, self.damping, self.absolute, limits
            )
        except torch.linalg.LinAlgError:
            raise _diverged(batch, batch.A, batch.B) from None

    def _adam(self, layer: _Layer) -> tuple[tuple[float, float], float]:
        group = self._optimizer.param_groups[layer.groups[0]]
        eps = group.get("eps", 1e-8)
        return group.get("betas", (0.9, 0.999))[:2], eps if is_number(eps) else 1e-8  # Adafactor has a pair of them

    def _check_rates(self) -> None:
        for layer in self._layers if self.form != "factors" else ():
            a, b = (float(self._optimizer.param_groups[g]["lr"]) for g in layer.groups)
            if a != b:
                raise SlimtuneError(
                    f"{layer.name}: A learns at {a:g} and B at {b:g}, but form={self.form!r} takes one step of their "
                    "product: give both one learning rate (b_ratio=1)"
                )

    def _stacked(self) -> list[_Batch]:
        """The pairs that have gradients, by shape."""
        by_shape: dict[Any, list[tuple[_Layer, Pair]]] = {}
        for layer in self._layers:
            pair: Pair = layer.adapter.structure.pair()  # type: ignore[operator]
            if pair.A_parameter.grad is not None and pair.B_parameter.grad is not None:
                key = pair.A.shape, pair.B.shape, pair.A.device, pair.A.dtype
                by_shape.setdefault(key, []).append((layer, pair))
        batches = []
        for rows in by_shape.values():
            grads: list[Any] = [(p.A_parameter.grad, p.B_parameter.grad) for _, p in rows]
            batches.append(
                _Batch(
                    [layer for layer, _ in rows],
                    [(p.A_parameter, p.B_parameter) for _, p in rows],
                    grads,
                    torch.stack([whole(p.A) for _, p in rows]),
                    torch.stack([whole(p.B) for _, p in rows]),
                    torch.stack([whole(a) for a, _ in grads]),
                    torch.stack([whole(b) for _, b in grads]),
                    torch.stack([layer.adapter.scale for layer, _ in rows])[:, None, None],
                )
            )
        return batches


def _copy(grads: list[Tensor], new: list[Tensor]) -> None:
    if not any(hasattr(g, "full_tensor") for g in grads):
        torch._foreach_copy_(grads, new)
        return
    for g, h in zip(grads, new, strict=True):
        g.copy_(like(h, g))


def _factors(batch: _Batch) -> tuple[Tensor, Tensor]:
    """As they are now, stacked."""
    pairs: list[Pair] = [layer.adapter.structure.pair() for layer in batch.layers]  # type: ignore[operator]
    return torch.stack([p.A for p in pairs]), torch.stack([p.B for p in pairs])


def _retract(batch: _Batch, start: tuple[Tensor, Tensor], step: tuple[Tensor, Tensor]) -> None:
    """Put the factors where `retracted` has the step from `start` end."""
    (A, B), (dA, dB) = _factors(batch), step
    try:
        A1, B1 = retracted(*start, dA, dB)
    except torch.linalg.LinAlgError:
        raise _diverged(batch, start[0] + dA, start[1] + dB) from None
    _add(batch, A1 - A, B1 - B)


def _diverged(batch: _Batch, A: Tensor, B: Tensor) -> DivergenceError:
    rows = zip(batch.layers, A, B, strict=True)
    bad = [layer.name for layer, a, b in rows if not (a.isfinite().all() and b.isfinite().all())]
    return DivergenceError(f"LoRAPro: the factors of {', '.join(bad)} are no longer finite")


def _add(batch: _Batch, dA: Tensor, dB: Tensor) -> None:
    torch._foreach_add_([A for A, _ in batch.parameters], list(dA.unbind()))
    torch._foreach_add_([B for _, B in batch.parameters], list(dB.unbind()))


def _column(values: Sequence[float], like: Tensor) -> Tensor | float:
    """One number per layer of a batch, to be broadcast; a plain number where all are alike."""
    if len(set(values)) == 1:
        return values[0]
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
