"""The methods there are, read from the recipes themselves."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimtune.recipe import Recipe

WHOLE = {
    "full": "every weight of the model is trained, without an adapter; the run folder holds model/",
    "head": "only modules_to_save (the task head) are trained, without an adapter; the run folder holds model/",
}


@dataclass(frozen=True)
class MethodInfo:
    """One recipe: `formula` and `source` are the first two paragraphs of its docstring.

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
        text = inspect.getdoc(recipe) or ""
        formula, source, *_ = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)] + ["", ""]
        entries = re.finditer(r"(?ms)^    (\w+): (.*?)(?=^    \w+: |^\S|\Z)", text)
        meanings = {entry[1]: " ".join(entry[2].split()) for entry in entries}
        options = [
            (p.name, "-" if p.default is None else str(p.default), meanings.get(p.name, ""))
            for p in inspect.signature(recipe).parameters.values()
        ]
        made = recipe()
        found.append(MethodInfo(name, formula.rstrip("."), source, options, made.learning_rate, _parts(made)))
    return found


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
    from slimtune.app.rules import WHOLE_MODEL, suggest
    from slimtune.errors import ConfigError

    known = {info.name: info for info in methods()}
    if name is None:
        width = max(map(len, [*known, *WHOLE_MODEL]))
        lines = [f"{info.name:<{width}}  {info.formula}" for info in known.values()]
        lines += [f"{'full':<{width}}  every weight", f"{'head':<{width}}  only modules_to_save (the task head)"]
        return "\n".join([*lines, "", "slimtune methods NAME: its options and source"])
    if name in WHOLE:
        return f"{name}: {WHOLE[name]}.\nNo method_options."
    if name not in known:
        everything = [*known, *WHOLE]
        raise ConfigError(f"no method '{name}'{suggest(name, everything)} (known: {', '.join(everything)})")
    info = known[name]
    widths = [max(len(option[i]) for option in info.options) for i in (0, 1)]
    lines = [f"  {n:<{widths[0]}}  {default:<{widths[1]}}  {meaning}".rstrip() for n, default, meaning in info.options]
    head = [f"{info.name}: {info.formula}", info.source, "", f"learning_rate {info.learning_rate:g} (AdamW)"]
    parts = [f"{what}: {names}" for what, names in info.parts]
    return "\n".join([*head, *parts, "method_options:", *lines])
