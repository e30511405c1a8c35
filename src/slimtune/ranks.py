"""Layer 3: ranks taken away and added in place, the optimizer's rows with them.

Shapes: O out, I in, R rank.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .errors import SlimtuneError, StructureError, TargetError, UninitializedError
from .structures import Factored, Structure
from .structures.base import check_count
from .targets import hosts, require_adapter

__all__ = ["change_ranks", "compact", "optimizers_of", "rank_sizes", "resize", "seeded", "starts_at_mean"]

SECOND_MOMENTS = frozenset(
    (
        *("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum", "variance", "step_size"),
        "state2",  # bitsandbytes
    )
)
"""State that the length of an optimizer's step comes from; a new rank starts at the mean of the kept ones."""

FACTORED = {"row_var": -1, "col_var": -2, "exp_avg_sq_row": -1, "exp_avg_sq_col": -2}
"""Adafactor's second moments, torch's and transformers': the dimension of the parameter they are means over."""


def seeded(*key: object) -> torch.Generator:
    """A generator on the CPU whose seed is a hash of `key`: the same on every process, device and run."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@torch.no_grad()
def change_ranks(
    structure: Structure,
    keep: Sequence[int],
    new: Mapping[str, Tensor] | None = None,
    optimizers: Sequence[torch.optim.Optimizer] = (),
) -> None:
    """Keep these ranks of a structure, in this order, and put `new` ones behind them.

    A parameter stays the same object, so groups, learning rates and schedules hold; its gradient and every tensor of
    its optimizer state that has its shape are cut and extended with it. The momentum of a new rank starts at 0, its
    second moment at the mean of the kept ones: at 0 its first step would be up to 3.2 learning rates long.

    Args:
        keep: indices of present ranks.
        new: {name in `structure.rank_dims`: values of the new ranks}; none when None.
        optimizers: those that hold the parameters. One whose state of a parameter is of a shape unknown here (8-bit
            blocks) starts that parameter's state afresh. Adafactor's means over ranks stay as they are.

    Raises:
        StructureError: a structure whose ranks cannot change, indices of ranks it does not have or twice the same,
            new ranks of other names or shapes than its own, or none would be left.
        UninitializedError: it is on the meta device.
        SlimtuneError: a sharded parameter. Nothing has been changed in each case.

    Warns:
        UserWarning: an optimizer's state of a parameter starts afresh.
    """
    _check(structure, keep, new)
    for name, dim in structure.rank_dims.items():
        t: Tensor = getattr(structure, name)
        index = torch.as_tensor(keep, dtype=torch.long, device=t.device)
        extra = new[name].to(t) if new else None
        if isinstance(t, nn.Parameter):
            _change(t, index, dim, extra, optimizers)
        else:
            setattr(structure, name, _joined(t, index, dim, extra))


def _check(structure: Structure, keep: Sequence[int], new: Mapping[str, Tensor] | None) -> None:
    kind, dims = type(structure).__name__, structure.rank_dims
    _check_resizable(structure, kind)
    have = min(getattr(structure, name).shape[dim] for name, dim in dims.items())
    if len(set(keep)) < len(keep) or not all(0 <= j < have for j in keep):
        raise StructureError(f"{kind}: ranks to keep must be different ones of 0 .. {have - 1}, got {list(keep)}")
    if new and new.keys() != dims.keys():
        raise StructureError(f"{kind}: new ranks need {', '.join(dims)}, got {', '.join(new)}")
    counts = set()
    for name, t in (new or {}).items():
        own, dim = getattr(structure, name).shape, dims[name]
        if t.shape[:dim] + t.shape[dim + 1 :] != own[:dim] + own[dim + 1 :] or t.dim() != len(own):
            raise StructureError(f"{kind}: new ranks of {name} have shape {tuple(t.shape)}, its own is {tuple(own)}")
        counts.add(t.shape[dim])
    if len(counts) > 1:
        raise StructureError(f"{kind}: new ranks of different number: {sorted(counts)}")
    if len(keep) + sum(counts) < 1:
        raise StructureError(f"{kind}: at least one rank must be left")


def _check_resizable(structure: Structure, where: str) -> None:
    """Raise unless the shapes of a structure's parameters can change."""
    if not structure.rank_dims:
        raise StructureError(f"{where}: the ranks of {type(structure).__name__} cannot change")
    for name in structure.rank_dims:
        t = getattr(structure, name)
        if t.is_meta:
            raise UninitializedError(f"{where}: {name} is still on the meta device; load weights, then initialize")
        if hasattr(t, "full_tensor"):
            raise SlimtuneError(f"{where}: {name} is sharded, so its shape cannot change; mask its ranks instead")


def _joined(t: Tensor, index: Tensor, dim: int, extra: Tensor | None) -> Tensor:
    kept = t.index_select(dim, index)
    return kept if extra is None else torch.cat([kept, extra], dim)


def _change(
    p: nn.Parameter, index: Tensor, dim: int, extra: Tensor | None, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    shape, grad, value = p.shape, p.grad, p.data
    p.grad = None
    # another dtype in between makes autograd forget the old shape, which a loss still alive would keep
    p.data = value.new_empty(0, dtype=torch.bfloat16 if p.dtype == torch.float16 else torch.float16)
    p.data = _joined(value, index, dim, extra)
    torch.autograd.graph.increment_version(p)  # that loss can no longer be differentiated, and caches must notice
    zeros = None if extra is None else torch.zeros_like(extra)
    if grad is not None:
        p.grad = _joined(grad, index, dim, zeros)
    for optimizer in optimizers:
        for key, at in rank_states(optimizer, p, shape, dim).items():
            v = optimizer.state[p][key]
            fill = None
            if extra is not None:
                fill = v.new_zeros([*v.shape[:at], extra.shape[dim], *v.shape[at + 1 :]])
                if starts_at_mean(key):
                    fill += (v.index_select(at, index) if len(index) else v).mean(at, keepdim=True)
            optimizer.state[p][key] = _joined(v, index, at, fill)


def starts_at_mean(key: str) -> bool:
    """Whether a new rank's part of this state of an optimizer is the mean of the others', rather than zero."""
    return key in SECOND_MOMENTS or key in FACTORED


def rank_states(optimizer: torch.optim.Optimizer, p: Tensor, shape: torch.Size, dim: int) -> dict[str, int]:
    """{key: the dimension that counts ranks} of what an optimizer keeps of a parameter of this shape with ranks in
    `dim`. State that cannot be told apart, such as 8-bit blocks, is dropped to start afresh, with a warning."""
    places = {key: _rank_dim(key, v, shape, dim) for key, v in optimizer.state.get(p, {}).items()}
    if None in places.values():
        warnings.warn(
            f"{type(optimizer).__name__} keeps state of another shape than its parameters; the moments of a "
            "parameter whose rank changes start afresh",
            UserWarning,
            stacklevel=2,
        )
        del optimizer.state[p]
        return {}
    return {key: at for key, at in places.items() if at is not None and at >= 0}


def _rank_dim(key: str, v: object, shape: torch.Size, dim: int) -> int | None:
    """The dimension of an optimizer's state that counts the ranks of a parameter of this shape, with ranks in `dim`; -1
    if it does not count them, None if that cannot be told."""
    if not torch.is_tensor(v) or not v.dim():
        return -1
    if key in FACTORED and len(shape) > 1:
        gone = len(shape) + FACTORED[key]
        return -1 if gone == dim else dim - (gone < dim and v.dim() < len(shape))
    if v.shape == shape:
        return dim
    return -1 if v.numel() == 1 else None


def rank_sizes(structure: Structure) -> Tensor:
    """The Frobenius norm of every rank's share of dW, (R,): |B[:, j]| |A[j]| where dW = B A.

    Raises:
        StructureError: not a product of two factors.
    """
    if not isinstance(structure, Factored):
        raise StructureError(f"{type(structure).__name__}: not a product of two thin factors")
    return structure.rank_sizes().detach()


def resize(
    model: nn.Module,
    ranks: Mapping[str, int],
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
    name: str = "default",
    *,
    seed: int = 0,
) -> dict[str, int]:
    """Give layers other ranks, in place, between two steps; the rest of training goes on as it was.

    A layer that shrinks keeps its largest ranks (`rank_sizes`), so dW changes by what it loses; one that grows
    computes the same as before. The scale stays what it was: alpha / R of the rank at the start. Under DDP every
    process does so and wraps the model anew, whose buckets hold the old shapes.

    Args:
        ranks: {layer: R}; layers not named keep theirs.
        optimizer: the one, or ones, that hold the parameters, for their moments to go along.
        name: the adapter.
        seed: of the directions of new ranks, with the layer's name.

    Returns:
        The layers whose rank changed, with the new one.

    Raises:
        TargetError: a layer that does not carry the adapter.
        AdapterNameError: no such adapter.
        StructureError: a rank below 1, or a structure whose ranks cannot change or grow.
        UninitializedError: a layer on the meta device.
        SlimtuneError: a sharded layer, or something else than a torch optimizer. Nothing has been changed in each case.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(8, 8)); _ = st.adapt(model, st.lora(rank=4))
        >>> optimizer = torch.optim.AdamW(st.param_groups(model))
        >>> st.resize(model, {"0": 6}, optimizer), st.summary(model).rows[0].rank
        ({'0': 6}, 6)
    """
    require_adapter(model, name)
    optimizers, known = optimizers_of(optimizer), hosts(model, name)
    plans = {}
    for layer, rank in ranks.items():
        if layer not in known:
            raise TargetError(f"resize: no layer {layer!r} carries adapter {name!r}; it has {', '.join(known)}")
        check_count(rank, f"resize: rank of {layer!r}")
        structure: Structure = known[layer].addition(name).structure
        _check_resizable(structure, f"resize: {layer}")
        now = rank_sizes(structure)
        if rank == len(now):
            continue
        keep = sorted(now.argsort(descending=True, stable=True)[:rank].tolist())
        more = rank - len(now)
        new = structure.new_ranks(more, seeded(seed, layer, rank)) if more > 0 else None
        plans[layer] = (structure, keep, new)
    for plan in plans.values():
        change_ranks(*plan, optimizers)
    return {layer: ranks[layer] for layer in plans}


def compact(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
    name: str = "default",
) -> dict[str, int]:
    """Take away every rank that contributes nothing, such as those a controller has masked; at least one is left.

    The model computes the same afterwards; parameters, gradients and optimizer state shrink.

    Returns:
        The rank of every layer whose ranks can change.

    Raises:
        AdapterNameError: no such adapter.
        UninitializedError: a layer on the meta device.
        SlimtuneError: a sharded layer, or something else than a torch optimizer. Nothing has been changed in each case.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(8, 8)); _ = st.adapt(model, st.lora(rank=4))
        >>> _ = nn.init.ones_(model[0].adapters["default"].structure.B[:, :3])
        >>> st.compact(model)
        {'0': 3}
    """
    require_adapter(model, name)
    optimizers, plans = optimizers_of(optimizer), {}
    for layer, host in hosts(model, name).items():
        structure: Structure = host.addition(name).structure
        if structure.rank_dims:
            _check_resizable(structure, f"compact: {layer}")
            sizes = rank_sizes(structure)
            plans[layer] = (structure, sizes.nonzero().flatten().tolist() or [0], len(sizes))
    for structure, keep, now in plans.values():
        if len(keep) < now:
            change_ranks(structure, keep, None, optimizers)
    return {layer: len(keep) for layer, (_, keep, _) in plans.items()}


def optimizers_of(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
) -> Sequence[torch.optim.Optimizer]:
    """The torch optimizers meant by one or several, which may be wrapped.

    Raises:
        SlimtuneError: something else.
    """
    several = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    inner = [getattr(o, "optimizer", o) for o in several]  # an accelerate wrapper is looked through
    for o in inner:
        if not isinstance(o, torch.optim.Optimizer):
            raise SlimtuneError(f"expected a torch optimizer or several, got {type(o).__name__}")
    return list(dict.fromkeys(inner))
