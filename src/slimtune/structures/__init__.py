"""Layer 1: what a change of a weight looks like. One file per family, named by mathematics."""

from .base import Factored, Structure
from .lowrank import LowRank

__all__ = ["Factored", "LowRank", "Structure"]
