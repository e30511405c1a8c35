"""Layer 1: how a change of a weight meets the weight."""

from .additive import Additive
from .base import Composition, LinearMap
from .magnitude import Magnitude

__all__ = ["Additive", "Composition", "LinearMap", "Magnitude"]
