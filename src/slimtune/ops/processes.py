"""Several processes: tensors that may be sharded over them, sums over them, and one decision for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ..errors import SlimtuneError

__all__ = ["agreed", "edited", "like", "local", "several", "summed", "whole"]

T = TypeVar("T")


def several() -> bool:
    """Whether more than one process takes part."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def summed(t: Tensor, device: torch.device) -> Tensor:
    """The sum over all processes; `device` is one that they can talk over."""
    if not several():
        return t
    home = t.device
    if distributed.get_backend() == "nccl" and home.type == "cpu":
        t = t.to(device)
    t = t.contiguous()
    distributed.all_reduce(t)
    return t.to(home)


def local(t: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory; any other tensor itself."""
    return t.to_local() if hasattr(t, "to_local") else t


def whole(t: Tensor) -> Tensor:
    """All of a sharded tensor, on every process, which all have to ask for it; any other tensor itself."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def like(t: Tensor, p: Tensor) -> Tensor:
    """A tensor that every process has, sharded as `p` is."""
    if not hasattr(p, "full_tensor"):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, p.device_mesh, p.placements, src_data_rank=None)  # type: ignore[attr-defined]


def edited(t: Tensor, edit: Callable[[Tensor], object]) -> None:
    """edit(t), in place, also where t is sharded."""
    if not hasattr(t, "full_tensor"):
        edit(t)
        return
    full = t.full_tensor().clone()
    edit(full)
    t.copy_(like(full, t))


def agreed(make: Callable[[], T]) -> T:
    """What process 0 makes, on every process; its error, too."""
    if not several():
        return make()
    box: list[Any] = [None, None]
    if distributed.get_rank() == 0:
        try:
            box = [make(), None]
        except SlimtuneError as error:
            box = [None, error]
    distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]
