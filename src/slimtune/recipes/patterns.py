"""Ranks and alphas of single layers, as PEFT's `rank_pattern` and `alpha_pattern` say them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import StructureError
from ..structures.base import check_count

__all__ = ["pattern_overrides"]


def pattern_overrides(
    method: str,
    ranks: Mapping[str, int] | None,
    alphas: Mapping[str, float] | None,
    options: Callable[[int], dict[str, Any]],
    alpha: Callable[[int], float] | None,
) -> dict[str, dict[str, Any]]:
    """A recipe's overrides: per pattern the structure's `options` at its rank, and its alpha where one is given.

    Args:
        alpha: the alpha that follows a rank where none is given for its pattern; None where it does not follow.

    Raises:
        StructureError: a table that is not a mapping, a rank that is not a whole number of at least 1.

    Example:
        >>> pattern_overrides("lora", {"up": 4}, {"down": 3}, lambda r: {"rank": r}, lambda r: 2 * r)
        {'up': {'rank': 4, 'alpha': 8}, 'down': {'alpha': 3}}
    """
    for key, table in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if table is not None and not isinstance(table, Mapping):
            raise StructureError(f"{method}: {key} must be a table {{name: value}}, got {table!r}")
    found: dict[str, dict[str, Any]] = {}
    for pattern, rank in (ranks or {}).items():
        check_count(rank, f"{method}: rank of {pattern!r}")
        found[pattern] = options(rank) | ({} if alpha is None else {"alpha": alpha(rank)})
    for pattern, value in (alphas or {}).items():
        found.setdefault(pattern, {})["alpha"] = value
    return found
