"""What one of PEFT's adapter types says about itself: its tensors, its config, and which recipes it can hold."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ..errors import FileFormatError, StructureError
from ..io import LayerEntry
from ..layers import own_class
from ..layouts import layout_of
from ..recipe import Recipe
from ..structured import Structured
from .names import lookup

__all__ = ["Codec", "Fields", "Layer", "Unfit", "common", "layout", "same", "tidy"]


class Unfit(StructureError):
    """PEFT has no such adapter; the words say why."""


class Layer(NamedTuple):
    """One layer of an adapter that is to be written: what it carries, and the module that carries it."""

    entry: LayerEntry
    module: Any


class Fields:
    """The config of a folder, its fields checked as they are read."""

    def __init__(self, data: Mapping[str, Any], where: Path) -> None:
        self.data, self.where = data, where

    def get(self, key: str, default: Any = None) -> Any:
        """The field, or `default` where it is missing or null."""
        value = self.data.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int, what: str, layer: str, table: str = "") -> int:
        """A whole number of at least 1 for a layer; entries of the pattern table `table` come first."""
        value = self._value(key, default, layer, table)
        if isinstance(value, bool) or not isinstance(value, int):
            raise FileFormatError(f"{self.where}: the {what} of {layer} must be a whole number, got {value!r}")
        if value < 1:
            raise FileFormatError(f"{self.where}: the {what} of {layer} must be at least 1, got {value}")
        return value

    def number(self, key: str, default: float, what: str, layer: str, table: str = "") -> float:
        """A number for a layer, likewise."""
        value = self._value(key, default, layer, table)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise FileFormatError(f"{self.where}: the {what} of {layer} must be a number, got {value!r}")
        return float(value)

    def _value(self, key: str, default: Any, layer: str, table: str) -> Any:
        value = self.get(key, default)
        return lookup(self.get(table), layer, value, f"{self.where}: {table}") if table else value


class Codec(ABC):
    """One `peft_type`.

    A tensor's *column* is the end of its key in PEFT's file, behind the module's name; its *own* key is the one in
    slimtune's adapter, such as `structure.A`.
    """

    peft_type: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    """Ends of the keys of all tensors it has in a file."""
    read: ClassVar[frozenset[str]]
    """Config fields that `entry` and `check` read."""
    harmless: ClassVar[frozenset[str]] = frozenset()
    """Config fields that say how it was trained, or what the tensors tell; those of all types are `frame.HARMLESS`."""

    @abstractmethod
    def claims(self, recipe: Recipe) -> bool:
        """Whether a recipe's structure and composition are this type's, whatever their sizes."""

    @abstractmethod
    def config(self, layers: Mapping[str, Layer]) -> dict[str, Any]:
        """The type's own fields of the config.

        Raises:
            Unfit: PEFT's type does not hold these layers.
        """

    @abstractmethod
    def theirs(self, own: Mapping[str, Tensor], layer: Layer) -> dict[str, Tensor]:
        """Own key -> tensor of one layer as column -> tensor. Never changes a number."""

    @abstractmethod
    def ours(self, columns: Mapping[str, Tensor], recipe: Recipe, where: str) -> dict[str, Tensor]:
        """The inverse of `theirs`, shapes not checked yet; FileFormatError for a tensor that comes twice."""

    @abstractmethod
    def entry(self, fields: Fields, layer: str, columns: Mapping[str, Tensor]) -> LayerEntry:
        """A layer's recipe and scale from the config and its tensors.

        Raises:
            FileFormatError: a field of the wrong kind, or tensors that tell no sizes.
            StructureError: what the recipe itself refuses.
        """

    def check(self, fields: Fields) -> None:  # noqa: B027 - most types have nothing to check
        """Raise FileFormatError for a config whose adapter is another than slimtune would compute."""

    def converted(self, entry: LayerEntry, own: dict[str, Tensor]) -> tuple[LayerEntry, dict[str, Tensor]]:
        """The layer that computes the same in PEFT's normalisation, where `config` refuses ours only for that."""
        return entry, own


def layout(module: nn.Module) -> type:
    """The kind of a layer, extended or not, with a weight of its own or a structure in its place."""
    cls = own_class(module)
    return layout_of(cls.dense_class if issubclass(cls, Structured) else cls)  # type: ignore[return-value]


def common(values: Iterable[Any]) -> Any:
    """The value that comes most often."""
    return Counter(values).most_common(1)[0][0]


def same(values: Mapping[str, Any], what: str) -> Any:
    """The value that all layers share.

    Raises:
        Unfit: they differ.
    """
    (first, value), *rest = values.items()
    for name, other in rest:
        if other != value:
            raise Unfit(f"it has one {what} for all layers, but {first} has {value} and {name} has {other}")
    return value


def tidy(value: float) -> float | int:
    """alpha back from an fp32 scale: the nearby short number if there is one."""
    short = float(f"{value:.6g}")
    value = short if math.isclose(short, value, rel_tol=1e-6) else value
    return int(value) if value == int(value) else value
