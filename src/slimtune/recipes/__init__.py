"""Layer 4: published methods, one function each. A recipe names its parts and nothing more."""

from collections.abc import Callable

from ..recipe import Recipe
from .lowrank import dora, lora, rslora

__all__ = ["dora", "lora", "rslora"]

RECIPES: dict[str, Callable[..., Recipe]] = {name: globals()[name] for name in __all__}
