"""What takes the place of a weight: functions from a weight and a rank to a structure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import DivergenceError, StructureError
from ..structures import GroupedLowRank, LowRank, SeparableKernel, Structure

__all__ = [
    "FACTORS",
    "FORMS",
    "Factors",
    "Part",
    "Replacement",
    "assembled",
    "check_finite",
    "factors",
    "in_form",
    "matrices",
    "thin",
    "thin_sizes",
]

FORMS = ("channel", "spatial")


@dataclass(frozen=True)
class Part:
    """One weight to be replaced.

    Attributes:
        name: of the layer.
        W: the weight, (O, I), in fp32 or wider. A convolution's is its kernel flattened, I = C h w.
        bias: (O,) or None.
        kernel: (h, w) of a convolution, () of a linear layer.
        groups: of a convolution.
    """

    name: str
    W: Tensor
    bias: Tensor | None = None
    kernel: tuple[int, ...] = ()
    groups: int = 1


class Replacement(NamedTuple):
    """What takes a weight's place: a structure in the weight's dtype or wider, and a bias (O,) if the layer is to have
    another one than before."""

    structure: Structure
    bias: Tensor | None = None


class Factors(Protocol):
    """A function that replaces weights: `__call__` says by what, `sizes` how large that would be."""

    def __call__(self, part: Part, rank: int) -> Replacement:
        """What takes the weight's place at this rank."""
        ...

    def sizes(self, part: Part) -> tuple[float, int]:
        """(numbers that one rank takes, the largest rank that can help) for a weight like that of `part`."""
        ...


FACTORS: dict[str, Callable[..., Factors]] = {}
"""By the name that configurations use: what makes them of its options."""


def factors(make: Any) -> Any:
    """A decorator: configurations can name the function or class by its own name."""
    FACTORS[make.__name__] = make
    return make


def check_finite(part: Part) -> Part:
    """The part itself.

    Raises:
        DivergenceError: its weight is not finite.
    """
    if not part.W.isfinite().all():
        raise DivergenceError(f"the weight of {part.name!r} is not finite")
    return part


def in_form(part: Part, form: str) -> str:
    """The form that a weight can take: "spatial" only fits 2-d kernels without groups that are not 1 x 1.

    Raises:
        StructureError: an unknown form.
    """
    if form not in FORMS:
        raise StructureError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    fits = len(part.kernel) == 2 and part.groups == 1 and math.prod(part.kernel) > 1
    return "spatial" if form == "spatial" and fits else "channel"


def matrices(part: Part, form: str = "channel") -> Tensor:
    """The matrices whose rank counts, (G, rows, columns): W itself; one for each group of a convolution; for "spatial"
    the kernel as (C h, O w).

    Example:
        >>> part = Part("conv", torch.arange(36.0).view(2, 18), kernel=(3, 3))
        >>> matrices(part).shape, matrices(part, "spatial").shape
        (torch.Size([1, 2, 18]), torch.Size([1, 6, 6]))
    """
    O, I = part.W.shape
    if in_form(part, form) == "spatial":
        h, w = part.kernel
        return part.W.view(O, -1, h, w).permute(1, 2, 0, 3).reshape(1, I // w, O * w)
    return part.W.view(part.groups, O // part.groups, I)


def assembled(part: Part, M: Tensor, form: str = "channel") -> Tensor:
    """The W (O, I) whose `matrices` are M (G, rows, columns).

    Example:
        >>> part = Part("conv", torch.randn(4, 18), kernel=(3, 3))
        >>> torch.equal(assembled(part, matrices(part, "spatial"), "spatial"), part.W)
        True
    """
    O, I = part.W.shape
    if in_form(part, form) == "spatial":
        h, w = part.kernel
        return M.reshape(I // (h * w), h, O, w).permute(2, 0, 1, 3).reshape(O, I)
    return M.reshape(O, I)


def thin(part: Part, left: Tensor, right: Tensor, form: str = "channel") -> Structure:
    """The structure whose `matrices` are left right: left (G, rows, R), right (G, R, columns).

    Example:
        >>> part = Part("conv", torch.randn(2, 18), kernel=(3, 3))
        >>> U, s, Vh = torch.linalg.svd(matrices(part, "spatial"), full_matrices=False)
        >>> torch.allclose(thin(part, U * s[:, None], Vh, "spatial").dense(), part.W, atol=1e-5)
        True
    """
    O, I = part.W.shape
    rank = left.shape[-1]
    made: dict[str, Any] = {"device": left.device, "dtype": left.dtype}
    structure: Any
    if in_form(part, form) == "spatial":
        h, w = part.kernel
        structure = SeparableKernel(O, I, rank=rank, kernel=part.kernel, **made)
        A, B = left[0].view(-1, h, rank).permute(2, 0, 1), right[0].view(rank, O, w).permute(1, 0, 2)
    elif part.groups > 1:
        structure, A, B = GroupedLowRank(O, I, rank=rank, groups=part.groups, **made), right, left
    else:
        structure, A, B = LowRank(O, I, rank=rank, **made), right[0], left[0]
    with torch.no_grad():
        structure.A.copy_(A)
        structure.B.copy_(B)
    return structure


def thin_sizes(part: Part, form: str = "channel") -> tuple[float, int]:
    """`Factors.sizes` of what `thin` makes: G (rows + columns) numbers a rank, and the largest rank below the
    break-even."""
    O, I = part.W.shape
    groups, rows, columns = part.groups, O // part.groups, I
    if in_form(part, form) == "spatial":
        rows, columns = I // part.kernel[1], O * part.kernel[1]
    per_rank = groups * (rows + columns)
    return per_rank, min(rows, columns, math.ceil(O * I / per_rank) - 1)
