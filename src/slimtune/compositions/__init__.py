"""Layer 1: how a change of a weight meets the weight."""

from .additive import Additive
from .base import Composition, LinearMap
from .bimagnitude import BiMagnitude, ColumnMagnitude
from .blockaffine import BlockAffine
from .magnitude import Magnitude

__all__ = ["Additive", "BiMagnitude", "BlockAffine", "ColumnMagnitude", "Composition", "LinearMap", "Magnitude"]
