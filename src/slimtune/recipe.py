"""The noun `Recipe`: a method as data."""

from __future__ import annotations

import fnmatch
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .compositions import Additive, Composition
from .errors import StructureError
from .structures import Structure

__all__ = ["Recipe", "check_part", "matches", "subclasses"]


def matches(name: str, pattern: str) -> bool:
    """Whether a module name is `pattern`, ends in `.pattern`, or fits it as a glob in one of these places."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def subclasses(cls: type) -> dict[str, type]:
    """Every class below `cls` that has been defined, by name."""
    found: dict[str, type] = {}
    children: list[type] = cls.__subclasses__()
    for child in children:
        found[child.__name__] = child
        found.update(subclasses(child))
    return found


@dataclass(frozen=True)
class Recipe:
    """A structure with its options, the composition that applies it, and the scale between them.

    The layer computes `composition(W, s dW)` with s = alpha / R**rank_power, R the structure's rank (1 where it
    has none).

    Args:
        structure: the class of dW.
        options: its keyword options.
        composition: the class that combines W and dW.
        composition_options: its keyword options.
        alpha: numerator of the scale; not 0.
        rank_power: 0 for s = alpha, 1 for LoRA's alpha / R, 0.5 for rsLoRA's alpha / sqrt(R).
        dropout: probability of dropping an input entry on the branch of the change, while training; 0 <= p < 1.
        overrides: per layer: {literal name, suffix or glob: {"alpha": ..., <structure option>: ...}}; later
            entries win.
        controllers: what acts around the optimizer's step, as {class name: its options}; `st.controllers_of` makes
            them and `st.attach` connects them, which `slimtune train` does by itself.
        init: what gives the structure other starting values than its own, as {name in `st.initialisers`: its
            options}; some need statistics of the data, which `adapt` then takes.
        allocation: what gives each layer a rank of its own before training, as {name in `st.allocate`: its options};
            `st.calibrate.fit` carries it out.
        start_scale: the scale before a controller has acted, as a multiple of s; 0 leaves the base as it is.
        name: the method's name in tables and files.
        learning_rate: what AdamW usually wants for this method's parameters.

    Raises:
        StructureError: an option the structure or composition does not have, or of another type than its own; a
            dropout outside [0, 1), an alpha that is 0 or not finite.

    Example:
        >>> import slimtune as st
        >>> recipe = st.Recipe(st.LowRank, {"rank": 4}, st.Magnitude, alpha=8.0, rank_power=1.0)
        >>> st.Recipe.from_dict(recipe.to_dict()) == recipe
        True
    """

    structure: type[Structure]
    options: Mapping[str, Any] = field(default_factory=dict)
    composition: type[Composition] = Additive
    composition_options: Mapping[str, Any] = field(default_factory=dict)
    alpha: float = 1.0
    rank_power: float = 0.0
    dropout: float = 0.0
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    controllers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    init: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    allocation: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    start_scale: float = 1.0
    name: str = "custom"
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise StructureError(f"{self.name}: dropout must be a number in [0, 1), got {self.dropout!r}")
        if not is_number(self.alpha) or not math.isfinite(self.alpha):
            raise StructureError(f"{self.name}: alpha must be a finite number, got {self.alpha!r}")
        if self.alpha == 0:
            raise StructureError(f"{self.name}: alpha must not be 0; the adapter could never change anything")
        if not is_number(self.start_scale) or not math.isfinite(self.start_scale):
            raise StructureError(f"{self.name}: start_scale must be a finite number, got {self.start_scale!r}")
        if not is_number(self.rank_power) or not abs(self.rank_power) <= 8:
            raise StructureError(f"{self.name}: rank_power must be a number of at most 8, got {self.rank_power!r}")
        _check_options(self.structure, self.options, self.name)
        _check_options(self.composition, self.composition_options, self.name)
        for pattern, changes in self.overrides.items():
            options = {k: v for k, v in changes.items() if k != "alpha"}
            _check_options(self.structure, options, f"{self.name}, override {pattern!r}")

    def for_layer(self, layer: str, module: nn.Module | None = None, model: nn.Module | None = None) -> Recipe:
        """This recipe with the overrides that match a layer's name applied and dropped, and what it leaves to the
        model filled in."""
        alpha, options = self.alpha, dict(self.options)
        for pattern, changes in self.overrides.items():
            if matches(layer, pattern):
                changes = dict(changes)
                alpha = changes.pop("alpha", alpha)
                options.update(changes)
        if module is not None and model is not None:
            options = dict(self.structure.fit(options, layer, module, model))
        return replace(self, alpha=alpha, options=options, overrides={})

    def scale(self, rank: int | None) -> float:
        """s = alpha / rank**rank_power."""
        return self.alpha / (rank or 1) ** self.rank_power

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; classes by name."""
        return {
            "name": self.name,
            "structure": self.structure.__name__,
            "options": dict(self.options),
            "composition": self.composition.__name__,
            "composition_options": dict(self.composition_options),
            "alpha": self.alpha,
            "rank_power": self.rank_power,
            "dropout": self.dropout,
            "overrides": {k: dict(v) for k, v in self.overrides.items()},
            "controllers": {k: dict(v) for k, v in self.controllers.items()},
            "init": {k: dict(v) for k, v in self.init.items()},
            "allocation": {k: dict(v) for k, v in self.allocation.items()},
            "start_scale": self.start_scale,
            "learning_rate": self.learning_rate,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`. Only classes already defined are found; nothing is imported.

        Raises:
            StructureError: an unknown class, or fields that are missing, extra or of the wrong type.
        """
        data = dict(data)
        known = inspect.signature(cls).parameters
        if extra := set(data) - set(known):
            raise StructureError(f"recipe: unknown field {sorted(extra)[0]!r}; known: {', '.join(known)}")
        for key, family in (("structure", Structure), ("composition", Composition)):
            table = {n: c for n, c in subclasses(family).items() if not inspect.isabstract(c)}
            if not isinstance(data.get(key), str) or data[key] not in table:
                raise StructureError(f"recipe: unknown {key} {data.get(key)!r}; known: {', '.join(sorted(table))}")
            data[key] = table[data[key]]
        for key in ("options", "composition_options", "overrides", *_PARTS):
            if not isinstance(data.get(key, {}), Mapping):
                raise StructureError(f"recipe: {key} must be a table, got {type(data[key]).__name__}")
        for pattern, changes in data.get("overrides", {}).items():
            if not isinstance(changes, Mapping):
                raise StructureError(f"recipe: override {pattern!r} must be a table, got {type(changes).__name__}")
        for key in _PARTS:
            for part, options in data.get(key, {}).items():
                if not isinstance(options, Mapping):
                    raise StructureError(f"recipe: {key}: {part!r} must be a table, got {type(options).__name__}")
        for key in ("alpha", "rank_power", "dropout", "start_scale", "learning_rate"):
            value = data.get(key, 0.0)
            if not is_number(value):
                raise StructureError(f"recipe: {key} must be a number, got {value!r}")
        if not isinstance(data.get("name", ""), str):
            raise StructureError(f"recipe: name must be a string, got {data['name']!r}")
        return cls(**data)


_PARTS = ("controllers", "init", "allocation")
"""Fields that name functions or classes with their options."""


def check_part(
    kind: str, name: str, options: Mapping[str, Any], table: Mapping[str, Callable[..., Any]], where: str, own: int = 0
) -> None:
    """Raise StructureError for a part that a recipe names and that is not in `table`, or for options it does not have.

    Args:
        kind: what it is, in words.
        own: how many leading parameters are not options.
    """
    if name not in table:
        raise StructureError(f"{where}: unknown {kind} {name!r}; known: {', '.join(sorted(table))}")
    known = list(inspect.signature(table[name]).parameters)[own:]
    for key in options:
        if key not in known:
            raise StructureError(f"{where}: {name} has no option {key!r}; it has {', '.join(known) or 'none'}")


def is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) < 2**1023  # JSON can hold whole numbers that no float can


def _check_options(cls: type, options: Mapping[str, Any], where: str) -> None:
    known = {
        p.name: getattr(p.annotation, "__name__", p.annotation)
        for p in inspect.signature(cls).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in ("device", "dtype")
    }
    for key, value in options.items():
        if known.get(key) == "bool" and not isinstance(value, bool):
            raise StructureError(f"{where}: {key} must be true or false, got {value!r}")
        if known.get(key) == "float" and not (is_number(value) and math.isfinite(value)):  # type: ignore[arg-type]
            raise StructureError(f"{where}: {key} must be a finite number, got {value!r}")
        if key not in known:
            raise StructureError(f"{where}: {cls.__name__} has no option {key!r}; it has {', '.join(known) or 'none'}")
