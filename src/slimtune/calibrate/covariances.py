"""Means and covariances of what goes into layers or comes out of them, streamed; and what a replacement gets wrong.

Shapes: O out, I in (a convolution's I is its input channels per group times its kernel), G groups, *T batch dims.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError, DivergenceError, TargetError
from ..factors import LayerMoments
from ..layers import Host, own_class
from ..layouts import ConvLayout, EmbeddingLayout
from ..ops import Moments
from ..ops.convolution import Convolution
from ..ops.processes import several, summed
from ..structures.base import check_count
from ..taps import Loss, Passes, Product, Progress, counter, length, passes_over, sum_dtype
from ..targets import own_modules, select
from .adapters import own_forward, own_mask

__all__ = ["errors", "fisher", "moments"]

T = TypeVar("T")
CHUNK = 2**24  # numbers of patches that are unfolded at a time
SIDES = ("auto", "input", "output")


def moments(
    model: nn.Module,
    batches: Iterable[Any],
    targets: str | Sequence[str] = "all-linear",
    *,
    exclude: str | Sequence[str] = (),
    side: str = "auto",
    keep: Callable[[str, LayerMoments], Any] | None = None,
    memory: int = 2**31,
    dtype: torch.dtype | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Mean and covariance of every layer's inputs or outputs, streamed: no gradient, forward passes only.

    A convolution's inputs are its patches, of I numbers, one for each place of its output, or its output's channels.
    Rows that a batch's "attention_mask" marks as padding do not count; of a mask of pairs, true or 0.0 (added to
    scores) where one token looks at another, those that none looks at. Layers that are handed one and the same tensor
    (q, k and v; gate and up) share one covariance. With torch.distributed initialised each process gives its own
    batches, and the rows of all count. The model is left as it was, as by `gradients`.

    Args:
        targets, exclude: as for `adapt`, and convolutions.
        side: "input", "output", or "auto" for the smaller of I and O, of each group.
        keep: keep(layer, moments), called at the end of a layer's pass: what to keep in their place, such as
            lambda name, m: m.to("cpu").
        memory: bytes of covariances gathered at once; more of them, counted as if none were shared, take further
            passes. One layer's at least.
        dtype: of covariances; fp32, or fp64 on an fp64 layer, when None.
        forward: forward(model, batch); model(**batch) for a mapping and model(batch) otherwise when None.
        progress: progress(batches done, batches of all passes), 0 for a number not known.

    Returns:
        {layer: its `LayerMoments`, or what `keep` made of them}, in the model's order.

    Raises:
        ConfigError: an unknown side. StructureError: a memory that is none.
        TargetError: as `adapt`, or an embedding.
        DataError: no batches, or a layer that no row reaches.
        DivergenceError: numbers that are not finite.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> found = st.calibrate.moments(model, [torch.randn(8, 6) for _ in range(3)], ["0", "2"])
        >>> [(m.side, m.moments.count, tuple(m.moments.M2.shape)) for m in found.values()]
        [('output', 24, (4, 4)), ('output', 24, (2, 2))]
    """
    if side not in SIDES:
        raise ConfigError(f"calibrate: side must be one of {', '.join(SIDES)}, got {side!r}")
    check_count(memory, "calibrate: memory", 0)
    names = select(model, targets, exclude)
    found: dict[str, Any] = {}
    with passes_over(model, names, None, seed) as run:
        watches = {n: _Watch(n, host, side, dtype) for n, host in run.layers.items()}
        groups = list(_groups(watches, memory))
        if len(groups) > 1 and not isinstance(batches, (list, tuple)):
            batches = list(batches)
        done = counter(progress, len(groups) * length(batches))
        for group in groups:
            _watch(run, group, batches, forward, done)
            _over_processes(group, run.device)
            for watch in group:
                entry = watch.found()
                found[watch.name] = entry if keep is None else keep(watch.name, entry)
                watch.moments = None
    return found


class _Watch:
    """The moments of one layer."""

    def __init__(self, name: str, host: Host, side: str, dtype: torch.dtype | None) -> None:
        layout = host.layout
        if issubclass(layout, EmbeddingLayout):
            raise TargetError(
                f"{name!r} ({own_class(host).__name__}): moments are kept of linear layers and convolutions"
            )
        self.name, self.host, self.dtype = name, host, dtype or sum_dtype(host)
        O, I = layout.sizes(host)
        self.by = Convolution.of(host) if issubclass(layout, ConvLayout) else None
        self.groups = 1 if self.by is None else self.by.groups
        self.side = side if side != "auto" else "input" if self.groups * I <= O else "output"
        self.size = I if self.side == "input" else O // self.groups
        self.moments: Moments | None = None
        self.mask: Tensor | None = None
        self.seen: list[Any] = []

    @property
    def bytes(self) -> int:
        return self.groups * self.size**2 * self.dtype.itemsize

    @torch.no_grad()
    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Fold in an input at once, before anything changes it in place, unless a layer with the same past was given
        the same."""
        x = args[0] if args else kwargs["input"]
        version = None if x.is_inference() else x._version
        past = self.moments
        for of, was, before, by, after in self.seen:
            if of() is x and was == version and before is past and by == self.by and after.M2.dtype == self.dtype:
                self.moments = after
                return
        self._fold(x.detach())
        if self.moments is not None:
            self.seen.append((weakref.ref(x), version, past, self.by, self.moments))

    @torch.no_grad()
    def after(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        """Fold in an output."""
        self._fold(y.detach())

    def _fold(self, t: Tensor) -> None:
        with torch.autocast(t.device.type, enabled=False):
            for rows in self._rows(t):
                new = Moments.of(rows, groups=rows.dim() - 2, dtype=self.dtype)
                self.moments = new if self.moments is None else self.moments + new

    def _rows(self, t: Tensor) -> Iterator[Tensor]:
        """(N, D), or (N, G, D) with groups, in parts."""
        if self.by is None:
            rows = t.reshape(-1, t.shape[-1])
            if self.mask is not None and (self.mask.shape == t.shape[:-1] or self.mask.numel() == len(rows)):
                rows = rows[self.mask.reshape(-1).bool()]
            yield rows
            return
        if self.side == "output":
            t = t.movedim(-1 - len(self.by.kernel), -1)
            yield self._grouped(t.reshape(-1, self.groups, self.size))
            return
        t = t.reshape(-1, *t.shape[-1 - len(self.by.kernel) :])
        for part in t.split(max(1, CHUNK // max(1, math.prod(self.by.kernel) * t[:1].numel()))):
            yield self._grouped(self.by.patches(part))

    def _grouped(self, rows: Tensor) -> Tensor:
        return rows if self.groups > 1 else rows[:, 0]

    def found(self) -> LayerMoments:
        m = self.moments
        if m is None or not m.count:
            raise DataError(f"calibrate: no row reaches {self.name!r}; were there batches?")
        if not (m.mean.isfinite().all() and m.M2.isfinite().all()):
            raise DivergenceError(f"calibrate: the {self.side}s of {self.name!r} are not finite")
        return LayerMoments(self.side, m)


def _groups(watches: Mapping[str, _Watch], memory: int) -> Iterator[list[_Watch]]:
    """Layers whose covariances fit into memory together."""
    group: list[_Watch] = []
    for watch in watches.values():
        if group and sum(w.bytes for w in group) + watch.bytes > memory:
            yield group
            group = []
        group.append(watch)
    yield group


def _watch(
    run: Passes,
    watches: Sequence[_Watch],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
    done: Callable[[], None],
) -> None:
    """One pass."""
    handles = [
        w.host.register_forward_pre_hook(w.before, with_kwargs=True)
        if w.side == "input"
        else w.host.register_forward_hook(w.after, with_kwargs=True, prepend=True)
        for w in watches
    ]
    try:
        for _, batch in run.each(batches):
            seen: list[Any] = []
            for watch in watches:
                watch.mask, watch.seen = own_mask(batch), seen
            with torch.no_grad():
                (forward or own_forward)(run.model, batch)
            done()
    finally:
        for handle in handles:
            handle.remove()


def _over_processes(watches: Sequence[_Watch], device: torch.device) -> None:
    """Join what the processes have seen; layers that share moments in all of them go on to."""
    if not several():
        return
    own = {id(m): i for i, m in enumerate(w.moments for w in watches)}
    box: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(box, [own[id(w.moments)] for w in watches])
    joined: dict[Any, Moments] = {}
    for watch, key in zip(watches, zip(*box, strict=True), strict=True):
        if key not in joined:
            shape = (watch.groups, watch.size) if watch.groups > 1 else (watch.size,)
            m = watch.moments or Moments.none(*shape, dtype=watch.dtype, device=watch.host.weight.device)
            joined[key] = m.over_processes(device)
        watch.moments = joined[key]


# ---------------------------------------------------------------- what an error costs


def fisher(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    targets: str | Sequence[str] = "all-linear",
    *,
    exclude: str | Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """(1/O) sum_t |dL/dy_t|^2 of every layer's outputs y_t, (O,), the mean over batches: Fisher information a number.

    Outputs that are wrong by e_t raise the loss by about half of sum_t (dL/dy_t . e_t)^2 (its Gauss-Newton form with
    the data's own labels), so by half of this times E|e|^2 where errors and gradients point nowhere in common: what
    a squared error costs in one layer and in another, for `allocate.tail` and `st.lord`. One pass, forward and
    backward; the model is left as it was, as by `gradients`.

    Args:
        batches, loss, targets, exclude, seed, progress: of `gradients`.

    Raises:
        TargetError, DataError, DivergenceError: as `gradients`.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
        >>> found = st.calibrate.fisher(model, [torch.randn(8, 6)], lambda m, x: m(x).sum(), ["1"])
        >>> found["1"]
        8.0
    """
    names = select(model, targets, exclude)
    with passes_over(model, names, loss, seed) as run:
        products: dict[str, dict[str, Product]] = {n: {"square": _Square()} for n in names}
        run.gradients(batches, products, counter(progress, length(batches)))
        found = {n: p["square"].total for n, p in products.items()}
        return {n: float(t) / run.layers[n].layout.sizes(run.layers[n])[0] for n, t in found.items() if t is not None}


class _Square(Product):
    """|dL/dy|^2, which is not linear in the gradient: a sum over the calls of a layer."""

    dtype = torch.float32

    def size(self, O: int, I: int) -> tuple[int, int]:
        return 1, 1

    def keep(self, x: Tensor, host: Host) -> Tensor:
        return x.new_empty(0)

    def of(self, kept: Tensor, delta: Tensor, host: Host) -> Tensor:
        return delta.float().square().sum().view(1, 1)


# ---------------------------------------------------------------- measured


@torch.no_grad()
def errors(
    model: nn.Module,
    others: Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, tuple[float, float]]:
    """What other modules get wrong in the places of layers, each on the inputs that the model itself gives the layer.

    Args:
        others: {layer: a module that takes what the layer takes}.
        batches, forward, seed, progress: of `moments`; padding does not count.

    Returns:
        {layer: (E|y - y'|^2, E|y - E y|^2)}, a row of the output; the root of their ratio is a relative error.

    Raises:
        TargetError: a layer that is not there.
        DataError: no batches, or a layer that no row reaches.

    Example:
        >>> import slimtune as st
        >>> model, other = nn.Sequential(nn.Linear(6, 4, bias=False)), nn.Linear(6, 4, bias=False)
        >>> _ = other.weight.data.copy_(model[0].weight * 0.9)
        >>> x = torch.randn(1000, 6); x -= x.mean(0)
        >>> wrong, energy = st.calibrate.errors(model, {"0": other}, [x])["0"]
        >>> round(wrong / energy, 4)
        0.01
    """
    own = own_modules(model)
    for name in others:
        if name not in own:
            raise TargetError(f"calibrate: the model has no layer {name!r}")
    modes = [(m, m.training) for other in others.values() for m in other.modules()]
    with passes_over(model, list(others), None, seed) as run:
        watches = {n: _Compared(n, run.layers[n], other.eval()) for n, other in others.items()}
        handles = [
            run.layers[n].register_forward_hook(w.compare, with_kwargs=True, prepend=True) for n, w in watches.items()
        ]
        done = counter(progress, length(batches))
        try:
            for _, batch in run.each(batches):
                for watch in watches.values():
                    watch.mask = own_mask(batch)
                (forward or own_forward)(run.model, batch)
                done()
        finally:
            for handle in handles:
                handle.remove()
            for module, training in modes:
                module.training = training
        return {n: watch.result(run.device) for n, watch in watches.items()}


class _Compared(_Watch):
    """A layer's output beside that of another module."""

    def __init__(self, name: str, host: Host, other: nn.Module) -> None:
        super().__init__(name, host, "output", None)
        self.other, self.wrong = other, 0.0
        self.groups, self.size = 1, host.layout.sizes(host)[0]

    def compare(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        z = self.other(*args, **kwargs)
        for a, b in zip(self._rows(y), self._rows(z), strict=True):
            a, b = a.double(), b.double()
            mean = a.mean(0) if len(a) else a.new_zeros(self.size)
            part = Moments(len(a), mean[:, None].cpu(), (a - mean).square().sum(0)[:, None, None].cpu())
            self.moments = part if self.moments is None else self.moments + part
            self.wrong += float((a - b).square().sum())

    def result(self, device: torch.device) -> tuple[float, float]:
        m = (self.moments or Moments.none(self.size, 1, dtype=torch.float64)).over_processes(device)
        wrong = float(summed(torch.tensor(self.wrong, dtype=torch.float64), device))
        if not m.count:
            raise DataError(f"calibrate: no row reaches {self.name!r}; were there batches?")
        return wrong / m.count, float(m.M2.sum()) / m.count
