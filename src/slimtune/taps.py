"""Layer 3: what listens to layers while a loss goes backwards: products of their gradients with thin matrices.

No weight gradient is kept: of a layer's mean gradient G = dL/dW, (O, I), only products with thin matrices are, each
summed up from the layer's input x and the gradient delta of its output as the passes go by:
G A^T = sum_t delta_t (A x_t)^T.

Shapes: O out, I in, K kept directions, T rows of a batch.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ConfigError, DataError, DivergenceError, TargetError
from .layers import Host, extend, own_class, restore
from .layouts import layout_of
from .ops.processes import summed
from .structures import LowRank
from .targets import own_modules, unwrapped

__all__ = [
    "Left",
    "Listening",
    "Loss",
    "Passes",
    "Probed",
    "Product",
    "Progress",
    "Right",
    "Tap",
    "counter",
    "home",
    "length",
    "passes_over",
    "sum_dtype",
]

Loss = Callable[[nn.Module, Any], Any]
Progress = Callable[[int, int], None]
Products = dict[str, dict[str, "Product"]]


class Product(ABC):
    """One sum over all calls of a layer, linear in its mean gradient."""

    total: Tensor | None = None
    dtype: torch.dtype

    @abstractmethod
    def size(self, O: int, I: int) -> tuple[int, int]:
        """Rows and columns of the sum."""

    def keep(self, x: Tensor, host: Host) -> Tensor:
        """What the backward pass will need of the input."""
        return x

    @abstractmethod
    def of(self, kept: Tensor, delta: Tensor, host: Host) -> Tensor:
        """The share of one call."""

    def add(self, kept: Tensor, delta: Tensor, host: Host, weight: float) -> None:
        if self.total is None:
            self.start(host, delta.device)
        self.total.add_(self.of(kept, delta, host), alpha=weight)  # type: ignore[union-attr]

    def start(self, host: Host, device: torch.device) -> None:
        self.total = torch.zeros(self.size(*host.layout.sizes(host)), dtype=self.dtype, device=device)


def _rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.reshape(-1, t.shape[-1]).to(dtype)


def _factored(B: Tensor, A: Tensor) -> LowRank:
    structure = LowRank(B.shape[0], A.shape[1], rank=A.shape[0], device="meta").eval()
    structure.B, structure.A = nn.Parameter(B, requires_grad=False), nn.Parameter(A, requires_grad=False)
    return structure


def _vjp(host: Host, x: Tensor, delta: Tensor, B: Tensor, A: Tensor, wanted: str) -> Tensor:
    """The gradient of a change dW = B A in one factor: G A^T in B, B^T G in A, whatever the kind of layer."""
    structure = _factored(B, A)
    p: Tensor = getattr(structure, wanted).requires_grad_(True)
    with torch.enable_grad():
        y = host.map().change(x.to(B.dtype) if x.is_floating_point() else x, structure)
    return torch.autograd.grad(y, p, delta.to(y.dtype))[0]


class Left(Product):
    """G A^T, (O, K), for A (K, I)."""

    def __init__(self, A: Tensor) -> None:
        self.A, self.dtype = A, A.dtype

    def size(self, O: int, I: int) -> tuple[int, int]:
        return O, len(self.A)

    def keep(self, x: Tensor, host: Host) -> Tensor:
        self.A = self.A.to(x.device)
        return F.linear(x.to(self.A.dtype), self.A) if host.map().is_matrix else x  # (*T, K): x itself can go

    def of(self, kept: Tensor, delta: Tensor, host: Host) -> Tensor:
        if host.map().is_matrix:
            return _rows(delta, kept.dtype).t() @ kept.reshape(-1, kept.shape[-1])
        O = host.layout.sizes(host)[0]
        return _vjp(host, kept, delta, self.A.new_zeros(O, len(self.A)), self.A, "B")


class Right(Product):
    """Q^T G, (K, I), for Q (O, K); G itself for Q None."""

    def __init__(self, Q: Tensor | None, dtype: torch.dtype) -> None:
        self.Q, self.dtype = Q, dtype

    def size(self, O: int, I: int) -> tuple[int, int]:
        return (O if self.Q is None else self.Q.shape[1]), I

    def of(self, kept: Tensor, delta: Tensor, host: Host) -> Tensor:
        if self.Q is not None:
            self.Q = self.Q.to(kept.device)
        if host.map().is_matrix:
            g = _rows(delta, self.dtype)
            return (g if self.Q is None else g @ self.Q).t() @ _rows(kept, self.dtype)
        O, I = host.layout.sizes(host)
        Q = torch.eye(O, dtype=self.dtype, device=kept.device) if self.Q is None else self.Q
        return _vjp(host, kept, delta, Q, Q.new_zeros(Q.shape[1], I), "A")


class Probed(Product):
    """(W * G) z for random signs z, one column per probe, (O, K): |W * G|_F^2 is the mean of their squared norms."""

    def __init__(self, signs: Tensor) -> None:
        self.signs, self.dtype = signs, signs.dtype  # (K, I)

    def size(self, O: int, I: int) -> tuple[int, int]:
        return O, len(self.signs)

    def of(self, kept: Tensor, delta: Tensor, host: Host) -> Tensor:
        map, dtype = host.map(), self.dtype
        if not map.is_matrix:
            raise ConfigError("importance 'union_frobenius_probes' is for linear layers; take 'union_frobenius'")
        g, x = _rows(delta, dtype), kept.reshape(-1, kept.shape[-1])
        bias = 0 if map.bias is None else map.bias
        signs = self.signs.to(x)
        return torch.stack([(g * (map(x * z) - bias).to(dtype)).sum(0) for z in signs], 1)


class _Kept(torch.autograd.Function):
    """A node that saves tensors and computes nothing, so that checkpointing and offloading see what is kept."""

    @staticmethod
    def forward(ctx: Any, zero: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return zero.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # nothing that is kept gets a gradient
        return (None,) * (1 + len(ctx.saved_tensors))


class Listening:
    """Whom taps report to."""

    weight = 1.0
    """Of the batch that goes by."""

    def __init__(self) -> None:
        self._zeros: dict[Any, Tensor] = {}

    def zero(self, like: Tensor) -> Tensor:
        """A 0 to add that makes a gradient flow where every weight is frozen."""
        key = (like.device, like.dtype)
        if key not in self._zeros:
            self._zeros[key] = torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=True)
        return self._zeros[key]


class Tap:
    """What listens to one layer: registered as its forward hook, it adds to each product as gradients come by."""

    def __init__(self, host: Host, products: Sequence[Product], run: Listening) -> None:
        self.host, self.products, self.run, self.calls = host, products, run, 0

    def forward(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
        # the first pass of a reentrant checkpoint; a layer whose adapters were merged or removed meanwhile
        if not (torch.is_grad_enabled() and isinstance(self.host, Host)):
            return None
        x = (args[0] if args else kwargs["input"]).detach()
        if not y.requires_grad:
            y = y + self.run.zero(y)  # not a leaf: what follows may work in place
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            kept = [p.keep(x, self.host) for p in self.products]
        node = _Kept.apply(self.run.zero(y), *kept).grad_fn
        y.register_hook(lambda delta: self.backward(node, delta))
        return y

    @torch.no_grad()
    def backward(self, node: Any, delta: Tensor) -> None:
        self.calls += 1
        with torch.autocast(delta.device.type, enabled=False):
            for product, kept in zip(self.products, node.saved_tensors, strict=True):
                product.add(kept, delta.detach(), self.host, self.run.weight)


# ---------------------------------------------------------------- passes that leave no trace


class Passes(Listening):
    """Passes over batches of a model that is afterwards as it was."""

    def __init__(
        self, model: nn.Module, layers: dict[str, Host], loss: Loss | None, seed: int, devices: list[torch.device]
    ) -> None:
        super().__init__()
        self.model, self.layers, self.loss, self.seed = model, layers, loss or _own_loss, seed
        self.devices = devices

    @property
    def device(self) -> torch.device:
        """That of the first layer."""
        return next(iter(self.layers.values())).weight.device

    def each(self, batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """(number, batch on the model's device), random numbers fixed by the number."""
        device = next((t.device for t in self.model.parameters() if not t.is_meta), torch.device("cpu"))
        for number, batch in enumerate(batches):
            torch.default_generator.manual_seed(self.seed + number)
            for other in self.devices:  # not torch.manual_seed, which reaches devices that are not put back
                module = torch.get_device_module(other)
                with getattr(module, "device", lambda _: nullcontext())(other):
                    module.manual_seed(self.seed + number)
            yield number, _moved(batch, device)

    def gradients(self, batches: Iterable[Any], products: Products, done: Callable[[], None]) -> int:
        """Make every product's total the mean over the batches of all processes; the number of this one's."""
        taps = {n: Tap(self.layers[n], list(p.values()), self) for n, p in products.items() if p}
        handles = [
            self.layers[n].register_forward_hook(tap.forward, with_kwargs=True, prepend=True) for n, tap in taps.items()
        ]
        weights, number = 0.0, -1
        try:
            for number, batch in self.each(batches):
                with torch.enable_grad():
                    value = self.loss(self.model, batch)
                value, self.weight = value if isinstance(value, tuple) else (value, 1.0)
                self.weight = float(self.weight)
                _check_loss(value, self.weight, number, list(taps))
                weights += self.weight
                value.backward()
                done()
        finally:
            for handle in handles:
                handle.remove()
        self._finish(taps, weights)
        return number + 1

    def _finish(self, taps: dict[str, Tap], weights: float) -> None:
        reached = torch.tensor([float(tap.calls) for tap in taps.values()] + [weights], dtype=torch.float64)
        reached = summed(reached, self.device)
        weights = reached[-1].item()
        if weights <= 0:
            raise DataError("calibrate: no batches; expected at least one")
        silent = [n for n, calls in zip(taps, reached[:-1].tolist(), strict=True) if not calls]
        if silent:
            warnings.warn(
                f"calibrate: the loss does not reach {len(silent)} of {len(taps)} layers, whose gradient counts as 0: "
                f"{', '.join(silent[:5])}{', ...' if len(silent) > 5 else ''}",
                UserWarning,
                stacklevel=5,
            )
        for layer, tap in taps.items():
            host = self.layers[layer]
            for product in tap.products:
                if product.total is None:
                    product.start(host, home(host))
                assert product.total is not None
                product.total = summed(product.total, self.device).div_(weights)
                if not product.total.isfinite().all():
                    raise DivergenceError(f"calibrate: the gradient of {layer!r} is not finite")


def home(host: Host) -> torch.device:
    """Where a layer's statistics are kept: beside its weight."""
    return torch.device("cpu") if host.weight.is_meta else host.weight.device


def _check_loss(value: Any, weight: float, number: int, layers: list[str]) -> None:
    if not isinstance(value, Tensor) or value.dim():
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"calibrate: loss(model, batch) must return a 0-d tensor or (tensor, weight), got {got}")
    if not value.requires_grad:
        raise TargetError(f"calibrate: the loss depends on none of the {len(layers)} layers, such as {layers[0]!r}")
    if not value.isfinite():
        raise DivergenceError(f"calibrate: the loss of batch {number} is {value.item()}")
    if not 0 < weight < math.inf:
        raise DataError(f"calibrate: the weight of batch {number} must be positive and finite, got {weight}")


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise DataError(
            f"calibrate: a batch is a {type(batch).__name__}; expected a mapping with labels, for model(**batch).loss. "
            "Give loss=lambda model, batch: ..."
        )
    value = getattr(model(**batch), "loss", None)
    if value is None:
        raise DataError("calibrate: model(**batch) has no loss; put labels into the batches, or give loss")
    return value


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)) and type(batch) in (tuple, list):
        return type(batch)(_moved(value, device) for value in batch)
    return batch


@contextmanager
def passes_over(model: nn.Module, names: Sequence[str], loss: Loss | None, seed: int) -> Iterator[Passes]:
    """Within: every parameter frozen, evaluation mode, the layers able to say what they compute."""
    model = unwrapped(model)
    own = own_modules(model)
    trained = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    fresh = [own[n] for n in names if not isinstance(own[n], Host)]
    devices = sorted({p.device for p, _ in trained if p.device.type not in ("cpu", "meta")}, key=str)
    kind = devices[0].type if devices else "cuda"
    devices = [d for d in devices if d.type == kind]
    with torch.random.fork_rng([d.index for d in devices], device_type=kind):
        try:
            for p, _ in trained:
                p.requires_grad_(False)
            for m, training in modes:
                # transformers checkpoints in training mode only; the layers inside are in evaluation mode all the same
                m.training = training and getattr(m, "gradient_checkpointing", False) is True
            layers = {n: extend(own[n], layout_of(own_class(own[n]))) for n in names}
            yield Passes(model, layers, loss, seed, devices)  # type: ignore[arg-type]
        finally:
            for module in fresh:
                if isinstance(module, Host):
                    restore(module)
            for p, needed in trained:
                p.requires_grad_(needed)
            for m, training in modes:
                m.training = training


def sum_dtype(host: nn.Module) -> torch.dtype:
    """The dtype of sums over batches: fp32, or fp64 on an fp64 base."""
    return torch.float64 if host.weight.dtype == torch.float64 else torch.float32


def length(batches: Iterable[Any]) -> int:
    """How many batches there are; 0 if that cannot be told."""
    return len(batches) if isinstance(batches, Sized) else 0


def counter(progress: Progress | None, total: int) -> Callable[[], None]:
    """A function that tells `progress` of one batch more, of `total`."""
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    return count
