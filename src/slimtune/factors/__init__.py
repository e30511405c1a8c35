"""Layer 2: what can take a weight's place. One file per family; `st.factorize` uses them."""

from .activations import LayerMoments, Principal, afm
from .base import FACTORS, Factors, Part, Replacement, factors
from .spectral import svd

__all__ = ["FACTORS", "Factors", "LayerMoments", "Part", "Principal", "Replacement", "afm", "factors", "svd"]
