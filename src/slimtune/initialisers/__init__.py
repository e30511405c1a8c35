"""Layer 2: starting values that come from the weight below or from the data. One function each, named by paper."""

from .base import INITIALISERS, GradientStats, Initialiser, InputStats, Request, Stats, apply, check, initialiser
from .gradients import gora
from .inputs import eva
from .loraga import loraga
from .weights import olora, pissa

__all__ = [
    "INITIALISERS",
    "GradientStats",
    "Initialiser",
    "InputStats",
    "Request",
    "Stats",
    "apply",
    "check",
    "eva",
    "gora",
    "initialiser",
    "loraga",
    "olora",
    "pissa",
]
