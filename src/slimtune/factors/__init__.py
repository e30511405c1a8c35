"""Layer 2: what can take a weight's place. One file per family; `st.factorize` uses them."""

from .activations import LayerMoments, Principal, afm
from .base import FACTORS, Factors, Part, Replacement, factors
from .leastsquares import als
from .products import hadamard, khatri_rao, kronecker
from .skeletons import cur, interpolative, qr
from .spectral import svd

__all__ = [
    "FACTORS",
    "Factors",
    "LayerMoments",
    "Part",
    "Principal",
    "Replacement",
    "afm",
    "als",
    "cur",
    "factors",
    "hadamard",
    "interpolative",
    "khatri_rao",
    "kronecker",
    "qr",
    "svd",
]
