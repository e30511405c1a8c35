"""Layer 3: ranks taken away and added in place, the optimizer's rows with them.

Shapes: O out, I in, R rank.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .errors import SlimtuneError, StructureError, TargetError
from .structures import Factored, Structure
from .structures.base import check_count
from .targets import hosts, require_adapter

__all__ = ["change_ranks", "compact", "rank_sizes", "resize", "seeded"]

SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
"""State whose square root an optimizer divides by; a new rank starts at the mean of the kept ones."""


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
        optimizers: those that hold the parameters.

    Raises:
        StructureError: a structure whose ranks cannot change, or none would be left.
        SlimtuneError: a sharded parameter.
    """
    if not structure.rank_dims:
        raise StructureError(f"{type(structure).__name__}: its ranks cannot change")
    added = next(iter(new.values())).shape[structure.rank_dims[next(iter(new))]] if new else 0
    if len(keep) + added < 1:
        raise StructureError(f"{type(structure).__name__}: at least one rank must be left")
    for name in structure.rank_dims:
        if hasattr(getattr(structure, name), "full_tensor"):
            raise SlimtuneError(f"{name} is sharded, so its shape cannot change; mask its ranks instead")
    for name, dim in structure.rank_dims.items():
        t: Tensor = getattr(structure, name)
        index = torch.as_tensor(keep, dtype=torch.long, device=t.device)
        extra = new[name].to(t) if new else None
        if isinstance(t, nn.Parameter):
            _change(t, index, dim, extra, optimizers)
        else:
            setattr(structure, name, _joined(t, index, dim, extra))


def _joined(t: Tensor, index: Tensor, dim: int, extra: Tensor | None) -> Tensor:
    kept = t.index_select(dim, index)
    return kept if extra is None else torch.cat([kept, extra], dim)


def _change(
    p: nn.Parameter, index: Tensor, dim: int, extra: Tensor | None, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    shape, grad, value = p.shape, p.grad, p.data
    p.grad = None
    # another dtype in between makes autograd forget the old shape, which a loss still alive would keep
    p.data = value.new_empty(0, dtype=torch.float16)
    p.data = _joined(value, index, dim, extra)
    zeros = None if extra is None else torch.zeros_like(extra)
    if grad is not None:
        p.grad = _joined(grad, index, dim, zeros)
    for optimizer in optimizers:
        state = optimizer.state.get(p)
        if not state:
            continue
        if any(torch.is_tensor(v) and v.numel() > 1 and v.shape != shape for v in state.values()):
            warnings.warn(
                f"{type(optimizer).__name__} keeps state of another shape than its parameters; the moments of a "
                "parameter whose rank changes start afresh",
                UserWarning,
                stacklevel=2,
            )
            del optimizer.state[p]
            continue
        for key, v in state.items():
            if torch.is_tensor(v) and v.shape == shape:
                fill = zeros
                if zeros is not None and key in SECOND_MOMENTS and len(index):
                    fill = v.index_select(dim, index).mean(dim, keepdim=True).expand_as(zeros)
                state[key] = _joined(v, index, dim, None if fill is None else fill.to(v))


def rank_sizes(structure: Structure) -> Tensor:
    """|B[:, j]| |A[j]| of every rank j, (R,): the Frobenius norm of its share of dW.

    Raises:
        StructureError: not a product of two factors.
    """
    if not isinstance(structure, Factored):
        raise StructureError(f"{type(structure).__name__}: not a product of two thin factors")
    B, A = structure.factors()
    return B.detach().norm(dim=0) * A.detach().norm(dim=1)


def resize(
    model: nn.Module,
    ranks: Mapping[str, int],
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
    name: str = "default",
    *,
    seed: int = 0,
) -> dict[str, int]:
    """Give layers other ranks, in place, between two steps; the rest of training goes on as it was.

    A layer that shrinks keeps its largest ranks by |B[:, j]| |A[j]|, so dW changes by what it loses; one that grows
    computes the same as before. The scale stays what it was: alpha / R of the rank at the start.

    Args:
        ranks: {layer: R}; layers not named keep theirs.
        optimizer: the one, or ones, that hold the parameters, for their moments to go along.
        name: the adapter.
        seed: of the directions of new ranks, with the layer's name.

    Returns:
        The layers whose rank changed, with the new one.

    Raises:
        TargetError: a layer that does not carry the adapter.
        StructureError: a rank below 1, or a structure whose ranks cannot change. Nothing has been changed then.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(8, 8)); _ = st.adapt(model, st.lora(rank=4))
        >>> optimizer = torch.optim.AdamW(st.param_groups(model))
        >>> st.resize(model, {"0": 6}, optimizer), st.summary(model).rows[0].rank
        ({'0': 6}, 6)
    """
    require_adapter(model, name)
    known = hosts(model, name)
    for layer, rank in ranks.items():
        if layer not in known:
            raise TargetError(f"resize: no layer {layer!r} carries adapter {name!r}; it has {', '.join(known)}")
        check_count(rank, f"resize: rank of {layer!r}")
        if not known[layer].addition(name).structure.rank_dims:
            kind = type(known[layer].addition(name).structure).__name__
            raise StructureError(f"resize: {layer}: the ranks of {kind} cannot change")
    changed = {}
    for layer, rank in ranks.items():
        structure: Structure = known[layer].addition(name).structure
        now = rank_sizes(structure)
        if rank == len(now):
            continue
        keep = sorted(now.argsort(descending=True, stable=True)[:rank].tolist())
        more = rank - len(now)
        new = structure.new_ranks(more, seeded(seed, layer, rank)) if more > 0 else None
        change_ranks(structure, keep, new, _several(optimizer))
        changed[layer] = rank
    return changed


def compact(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
    name: str = "default",
) -> dict[str, int]:
    """Take away every rank that contributes nothing, such as those a controller has masked; at least one is left.

    The model computes the same afterwards; parameters, gradients and optimizer state shrink.

    Returns:
        The rank of every layer whose ranks can change.
    """
    require_adapter(model, name)
    ranks = {}
    for layer, host in hosts(model, name).items():
        structure: Structure = host.addition(name).structure
        if not structure.rank_dims:
            continue
        keep = rank_sizes(structure).nonzero().flatten().tolist() or [0]
        ranks[layer] = len(keep)
        if structure.rank != len(keep):
            change_ranks(structure, keep, None, _several(optimizer))
    return ranks


def _several(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
) -> Sequence[torch.optim.Optimizer]:
    return (
        [getattr(optimizer, "optimizer", optimizer)]  # type: ignore[list-item]
        if not isinstance(optimizer, Sequence)
        else [getattr(o, "optimizer", o) for o in optimizer]
    )
