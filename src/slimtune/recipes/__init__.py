"""Layer 4: published methods, one function each. A recipe names its parts and nothing more."""

from collections.abc import Callable

from ..recipe import Recipe
from .adaptive import adalora, elalora
from .ard import ardlora
from .blocks import bone, gralora
from .bora import bora
from .circulant import c3a, circulant, ldr, toeplitz
from .gora import gora
from .initialised import eva, loraga, olora, pissa
from .ldu import loldu
from .lorapro import lorapro
from .lowrank import dora, lora, rslora
from .products import kronecker, loha, lokh, lokr
from .symmetric import singlora

__all__ = [
    "adalora",
    "ardlora",
    "bone",
    "bora",
    "c3a",
    "circulant",
    "dora",
    "elalora",
    "eva",
    "gora",
    "gralora",
    "kronecker",
    "ldr",
    "loha",
    "lokh",
    "lokr",
    "loldu",
    "lora",
    "loraga",
    "lorapro",
    "olora",
    "pissa",
    "rslora",
    "singlora",
    "toeplitz",
]

RECIPES: dict[str, Callable[..., Recipe]] = {name: globals()[name] for name in __all__}
