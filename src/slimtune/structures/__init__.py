"""Layer 1: what a change of a weight looks like. One file per family, named by mathematics."""

from .base import Factored, Structure
from .blockcirculant import BlockCirculant
from .blocklowrank import BlockLowRank
from .centred import CentredLowRank
from .circulant import LDR, Circulant
from .gated import GatedHeads
from .hadamard import Hadamard
from .interpolative import Interpolative
from .kernels import GroupedLowRank, SeparableKernel
from .khatrirao import KhatriRao
from .kronecker import Kronecker
from .kroneckersum import KroneckerSum
from .ldu import LDU
from .lowrank import LowRank
from .sum import Sum
from .symmetric import Symmetric
from .tiled import BlockTiled, Tiled
from .toeplitz import Toeplitz, ToeplitzProduct

__all__ = [
    "LDR",
    "LDU",
    "BlockCirculant",
    "BlockLowRank",
    "BlockTiled",
    "CentredLowRank",
    "Circulant",
    "Factored",
    "GatedHeads",
    "GroupedLowRank",
    "Hadamard",
    "Interpolative",
    "KhatriRao",
    "Kronecker",
    "KroneckerSum",
    "LowRank",
    "SeparableKernel",
    "Structure",
    "Sum",
    "Symmetric",
    "Tiled",
    "Toeplitz",
    "ToeplitzProduct",
]
