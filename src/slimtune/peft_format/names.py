"""Names as PEFT reads them: suffixes of module names, and tables keyed by patterns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import FileFormatError

__all__ = ["literal_targets", "lookup", "pattern_table", "suffix_hits"]


def suffix_hits(suffix: str, names: list[str]) -> list[str]:
    """The names that are `suffix` or end in `.suffix`."""
    return [n for n in names if n == suffix or n.endswith(f".{suffix}")]


def literal_targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """Full names; PEFT takes them as suffixes, so a regular expression where a suffix would catch more."""
    everything = [n for n, _ in model.named_modules() if ".adapters" not in n and not n.startswith("adapters")]
    if all(set(suffix_hits(n, everything)) <= set(names) for n in names):
        return names
    return "|".join(re.escape(n) for n in names)


def pattern_table(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Entries that differ from the default. PEFT takes a key for a regular expression of a name or of its end: it is
    the plain name where that fits no layer of another value, else escaped and, if need be, anchored.

    No two keys of different values fit one layer, so their order, in which PEFT looks, does not matter.
    """
    pattern = {}
    for name, value in values.items():
        if value != default:
            tail = name.rpartition(".")[2]
            others = [n for n, v in values.items() if v != value and n.endswith(tail)]
            escaped = re.escape(name)
            keys = [name if re.fullmatch(r"[\w.-]+", name) else escaped, escaped]
            pattern[next((k for k in keys if not any(_hit(k, n) for n in others)), f"^{escaped}")] = value
    return pattern


def _hit(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None


def lookup(entries: Any, name: str, default: Any, where: str) -> Any:
    """The value of the first entry of a pattern table that fits a module's name, as PEFT looks it up."""
    if not entries:
        return default
    if not isinstance(entries, Mapping):
        raise FileFormatError(f"{where} must be a table, got {type(entries).__name__}")
    for key, value in entries.items():
        if _fits(key, name, where):
            return value
    return default


# literals, dots, `.*`, `\d+`, `[0-9]+` and one level of alternatives: enough for what PEFT users write, and no
# nested repetition, so matching a name stays cheap
_SAFE = re.compile(r"\^?(?:[\w-]|\\\W|\\d\+|\[0-9\]\+|\.\*|\.|\((?:[\w-]|\\\.)+(?:\|(?:[\w-]|\\\.)+)*\))*\$?", re.ASCII)


def _fits(key: str, name: str, where: str) -> bool:
    if len(key) > 300 or not _SAFE.fullmatch(key) or key.count(".*") + key.count("+") > 4:
        raise FileFormatError(f"{where}: {key[:80]!r} is not a name or a simple pattern")
    return _hit(key, name)
