"""What an initialiser is, what it may be told about the data, and how a recipe names one.

Shapes: O out, I in, R rank, K kept directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import StructureError
from ..recipe import check_part
from ..structures import Structure

__all__ = [
    "INITIALISERS",
    "GradientStats",
    "Initialiser",
    "InputStats",
    "Request",
    "Stats",
    "apply",
    "check",
    "initialiser",
    "require_structure",
]

Own = TypeVar("Own", bound=Structure)


@dataclass
class GradientStats:
    """What calibration keeps of one layer's mean gradient G = dL/dW, (O, I), which itself is never kept."""

    sketch: Tensor
    """(O, K): G A^T, with A = `projection`."""
    projection: Tensor
    """(K, I): entries U(-1/sqrt(I), 1/sqrt(I)), so that its first R rows are a start of LoRA's A."""
    left: Tensor | None = None
    """(O, K): Q, orthonormal columns that span the leading left singular vectors of G; only where asked for."""
    right: Tensor | None = None
    """(K, I): Q^T G."""
    importance: dict[str, float] = field(default_factory=dict)
    """Measures of the layer by name, such as "union_mean", mean |W * G|."""
    batches: int = 0


@dataclass
class InputStats:
    """What calibration keeps of one layer's inputs X (T, I): its leading right singular vectors."""

    components: Tensor
    """(K, I): orthonormal rows, the most important first."""
    singular_values: Tensor
    """(K,): of X."""
    total: float
    """|X|_F^2."""
    rows: int = 0


Stats = GradientStats | InputStats


@dataclass(frozen=True)
class Request:
    """How much calibration is to keep of each layer; 0 and () for nothing."""

    sketch: int = 0
    """K of `GradientStats.sketch`."""
    directions: int = 0
    """K of `GradientStats.left` and `right`; costs a second pass over the batches."""
    power: int = 0
    """Rounds of power iteration for them; two more passes each."""
    importance: tuple[str, ...] = ()
    """Measures wanted in `GradientStats.importance`."""
    components: int = 0
    """K of `InputStats.components`."""

    def __or__(self, other: Request) -> Request:
        """Enough for both."""
        return Request(
            max(self.sketch, other.sketch),
            max(self.directions, other.directions),
            max(self.power, other.power),
            tuple(dict.fromkeys(self.importance + other.importance)),
            max(self.components, other.components),
        )


@dataclass(frozen=True)
class Initialiser:
    """A function `(structure, weight, stats, scale, **options) -> None` that fills a structure's tensors.

    `weight(dtype)` gives the (O, I) weight below, `scale` is the adapter's full scale s. It is called after
    `reset_parameters` and draws random numbers, if any, from torch's global generator.
    """

    function: Callable[..., None]
    needs: type[GradientStats] | type[InputStats] | None = None
    asks: Callable[..., Request] | None = None
    """asks(rank, **options): what it needs of the statistics for an adapter of that rank."""
    tries: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """{option: values}: where a recipe has None, calibration takes the value of least loss on the first batch."""


INITIALISERS: dict[str, Initialiser] = {}


def initialiser(
    needs: type[GradientStats] | type[InputStats] | None = None,
    asks: Callable[..., Request] | None = None,
    tries: Mapping[str, Sequence[Any]] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: recipes can name the function by its own name."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        INITIALISERS[function.__name__] = Initialiser(function, needs, asks, tries or {})
        return function

    return register


def require_structure(structure: Structure, kind: type[Own], where: str) -> Own:
    """The structure itself, if it is of the kind that an initialiser fills.

    Raises:
        StructureError: it is of another kind.
    """
    if not isinstance(structure, kind):
        raise StructureError(f"{where}: fills a {kind.__name__}, not a {type(structure).__name__}")
    return structure


def check(init: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Raise StructureError for an initialiser that does not exist or an option it does not have."""
    functions = {name: entry.function for name, entry in INITIALISERS.items()}
    for name, options in init.items():
        check_part("initialiser", name, options, functions, where, own=4)


@torch.no_grad()
def apply(
    init: Mapping[str, Mapping[str, Any]],
    structure: Structure,
    weight: Callable[[torch.dtype | None], Tensor],
    stats: Stats | None,
    scale: float,
) -> None:
    """Call what a recipe names, in its order.

    Raises:
        StructureError: statistics are missing or of the wrong kind.
    """
    for name, options in init.items():
        wanted = INITIALISERS[name]
        if wanted.needs and not isinstance(stats, wanted.needs):
            raise StructureError(
                f"{name} starts from the data: calibrate first, recipe, stats = st.calibrate.fit(recipe, model, "
                "batches, ...), then st.adapt(model, recipe, ..., stats=stats)"
            )
        wanted.function(structure, weight, stats, scale, **options)
