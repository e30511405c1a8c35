"""Methods that train the model itself instead of an adapter on it. Without torch, so that a mistake is told at once."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

GIVEN = ("targets", "exclude", "total_steps", "automatic")
"""Keyword arguments of controllers that are no options of a run: it knows them by other settings, or by itself."""


@dataclass(frozen=True)
class Whole:
    """One method.

    Attributes:
        about: what trains, in a few words.
        controller: the class of `slimtune.controllers` that acts around the optimizer's step, if any; the method's
            options are its keyword arguments, target_modules and exclude_modules its `targets` and `exclude`.
        everything: whether every weight trains, and not modules_to_save only.
        learning_rate: its own, for AdamW.
        defaults: of options, where a run's are others than the class's.
    """

    about: str
    controller: str | None = None
    everything: bool = True
    learning_rate: float = 5e-5
    defaults: Mapping[str, Any] = field(default_factory=dict)


WHOLE = {
    "full": Whole("every weight of the model is trained, without an adapter"),
    "head": Whole("only modules_to_save (the task head) are trained, without an adapter", None, False, 1e-3),
    "trp": Whole(
        "every weight is trained, at ranks that fall, and the layers are factorised in the end",
        "TRP",
        defaults={"factorize": True},
    ),
    "cuttlefish": Whole("every weight is trained, in layers that are factorised once their ranks stand", "Cuttlefish"),
}


def whole_options(name: str) -> tuple[str, ...] | None:
    """The method_options of a method in WHOLE; None where only its controller's class knows."""
    controller = WHOLE[name].controller
    return _constructors().get(controller) if controller else ()


@cache
def _constructors() -> dict[str, tuple[str, ...]]:
    """The options of every controller with an `__init__` of its own, read from the source: importing it would import
    torch."""
    found = {}
    for source in sorted((Path(__file__).parent.parent / "controllers").glob("*.py")):
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef):
                continue
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    names = (a.arg for a in (*item.args.args[1:], *item.args.kwonlyargs))
                    found[node.name] = tuple(name for name in names if name not in GIVEN)
    return found
