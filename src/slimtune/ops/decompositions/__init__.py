"""Matrices as products of smaller ones, each usable alone: tensors in, a small record of factors out.

Everything is computed in fp64 and comes back in the dtype of A, or fp32 if that is narrower, on A's device. Starts are
drawn on the CPU from a seed, so that it means the same on every device. Leading dimensions `*` are a batch unless a
function says otherwise. A record's `dense()` is the approximation, `trace` the objective on the way (S, *), and
`converged` whether the last sweep lowered it by no more than `tolerance` of |A|_F^2 in every matrix of the batch; a
direct method has always converged.

Lu 2024, arXiv 2408.05883, treats the alternating and the gradient methods together.
"""

from ..svd import truncated_svd
from .descent import (
    BiasedFactorization,
    factor_gradients,
    gradient_descent,
    stochastic_descent,
)
from .hadamard import HadamardFactors, hadamard_als, hadamard_descent, hadamard_gradients
from .khatrirao import KhatriRaoFactors, khatri_rao_als, khatri_rao_svd
from .kronecker import KroneckerFactors, kronecker_als, kronecker_arrangement, kronecker_svd
from .leastsquares import Factorization, als
from .nonnegative import nmf
from .skeleton import CUR, Interpolation, cur, interpolative
from .triangular import PivotedQR, Triangular, pivoted_qr, qlp, strong_qr

__all__ = [
    "CUR",
    "BiasedFactorization",
    "Factorization",
    "HadamardFactors",
    "Interpolation",
    "KhatriRaoFactors",
    "KroneckerFactors",
    "PivotedQR",
    "Triangular",
    "als",
    "cur",
    "factor_gradients",
    "gradient_descent",
    "hadamard_als",
    "hadamard_descent",
    "hadamard_gradients",
    "interpolative",
    "khatri_rao_als",
    "khatri_rao_svd",
    "kronecker_als",
    "kronecker_arrangement",
    "kronecker_svd",
    "nmf",
    "pivoted_qr",
    "qlp",
    "stochastic_descent",
    "strong_qr",
    "truncated_svd",
]
