"""Layer 2: starting values that come from the weight below or from the data. One function each, named by paper."""

from .base import INITIALISERS, GradientStats, Initialiser, InputStats, Request, Stats, apply, check, initialiser
from .gradients import gora

__all__ = [
    "INITIALISERS",
    "GradientStats",
    "Initialiser",
    "InputStats",
    "Request",
    "Stats",
    "apply",
    "check",
    "gora",
    "initialiser",
]
