"""The methods there are, read from the recipes and controllers themselves."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimtune.app.whole import GIVEN, WHOLE

if TYPE_CHECKING:
    from slimtune.recipe import Recipe

MODEL = "; the run folder holds model/"


@dataclass(frozen=True)
class MethodInfo:
    """One recipe or controller: `formula` and `source` are the first two paragraphs of its docstring.

    Attributes:
        options: (name, default, meaning) of every option.
        learning_rate: its own default for AdamW.
        parts: (what, names) of the parts beyond a structure and a composition that it is made of at its defaults.
    """

    name: str
    formula: str
    source: str
    options: list[tuple[str, str, str]]
    learning_rate: float
    parts: list[tuple[str, str]]


def methods() -> list[MethodInfo]:
    """Every recipe, by name."""
    from slimtune.recipes import RECIPES

    found = []
    for name, recipe in sorted(RECIPES.items()):
        formula, source, options = _documented(recipe)
        made = recipe()
        found.append(MethodInfo(name, formula.rstrip("."), source, options, made.learning_rate, _parts(made)))
    return found


def whole_methods() -> list[MethodInfo]:
    """Every method that trains the model itself, with the options of its controller, if it has one."""
    from slimtune.controllers import Controller
    from slimtune.recipe import subclasses

    classes, found = subclasses(Controller), []
    for name, kind in WHOLE.items():
        text = kind.about + MODEL
        if kind.controller is None:
            found.append(MethodInfo(name, text, "", [], kind.learning_rate, []))
            continue
        formula, source, options = _documented(classes[kind.controller])
        own = [(n, str(kind.defaults.get(n, default)), what) for n, default, what in options if n not in GIVEN]
        parts = [("controllers", kind.controller), ("trains", text)]
        found.append(MethodInfo(name, formula.rstrip("."), source, own, kind.learning_rate, parts))
    return found


def _documented(part: Callable[..., Any]) -> tuple[str, str, list[tuple[str, str, str]]]:
    """Formula, source and options as the docstring of a recipe or class tells them."""
    text = inspect.getdoc(part) or ""
    formula, source, *_ = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)] + ["", ""]
    entries = re.finditer(r"(?ms)^    (\w+): (.*?)(?=^    \w+: |^\S|\Z)", text)
    meanings = {entry[1]: " ".join(entry[2].split()) for entry in entries}
    options = [
        (p.name, "-" if p.default is None else str(p.default), meanings.get(p.name, ""))
        for p in inspect.signature(part).parameters.values()
    ]
    return formula, source, options


def _parts(recipe: Recipe) -> list[tuple[str, str]]:
    """What acts around the optimizer's step, what gives the starting values, what shares ranks out."""
    data = " (from calibration_batches of training data)" if needs_data(recipe) else ""
    return [
        (what, ", ".join(names) + more)
        for what, names, more in (
            ("controllers", recipe.controllers, ""),
            ("starting values", recipe.init, data),
            ("ranks before training", recipe.allocation, data),
        )
        if names
    ]


def needs_data(recipe: Recipe) -> bool:
    """Whether a recipe cannot start without having seen the data."""
    from slimtune.initialisers import INITIALISERS

    return bool(recipe.allocation) or any(INITIALISERS[name].needs for name in recipe.init if name in INITIALISERS)


def text(name: str | None = None) -> str:
    """One line per method; with `name` that method in full.

    Raises:
        ConfigError: no such method (with the nearest).
    """
    from slimtune.app.rules import suggest
    from slimtune.errors import ConfigError

    known = {info.name: info for info in (*methods(), *whole_methods())}
    if name is None:
        width = max(map(len, known))
        lines = [f"{info.name:<{width}}  {info.formula.removesuffix(MODEL)}" for info in known.values()]
        return "\n".join([*lines, "", "slimtune methods NAME: its options and source"])
    if name not in known:
        raise ConfigError(f"no method '{name}'{suggest(name, known)} (known: {', '.join(known)})")
    info = known[name]
    if not info.options:
        return f"{name}: {info.formula}.\nNo method_options."
    widths = [max(len(option[i]) for option in info.options) for i in (0, 1)]
    lines = [f"  {n:<{widths[0]}}  {default:<{widths[1]}}  {meaning}".rstrip() for n, default, meaning in info.options]
    head = [f"{info.name}: {info.formula}", info.source, "", f"learning_rate {info.learning_rate:g} (AdamW)"]
    parts = [f"{what}: {names}" for what, names in info.parts]
    return "\n".join([*head, *parts, "method_options:", *lines])
