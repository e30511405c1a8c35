"""Layer 0: tensors in, tensors out."""

from . import decompositions
from .centred import centred_factors, centred_linear
from .circulant import (
    block_circulant_gradient,
    block_circulant_matrix,
    block_circulant_product,
    circulant_gradient,
    circulant_matrix,
    circulant_product,
    ldr_product,
    skew_circulant_matrix,
    skew_product,
)
from .dropout import draw_seed, dropped, keep_probability, replayed_dropout
from .heads import heads_linear
from .ldu import diagonal_linear, ldu, pivot_rows
from .lorapro import adjusted_gradients, carried, retracted, tangent
from .lowrank import lowrank_linear, row_square_after_update
from .moments import Moments
from .patched import patched_linear
from .products import hadamard_factors, khatri_rao, kronecker_linear
from .recomputed import recomputed
from .spectral import (
    break_even,
    effective_rank,
    nuclear_norm,
    nuclear_subgradient,
    participation_rank,
    rank_by_budget,
    rank_by_energy,
    rank_by_sum,
    rank_by_tail,
    rank_by_value,
    singular_threshold,
    stable_rank,
)
from .squares import column_square_after_update, square_rmatmul
from .svd import positive_rows, truncated_svd
from .toeplitz import (
    diagonal_totals,
    displaced_matrix,
    fft_length,
    spectral_dtype,
    toeplitz_gradient,
    toeplitz_matrix,
    toeplitz_product,
)

__all__ = [
    "Moments",
    "adjusted_gradients",
    "block_circulant_gradient",
    "block_circulant_matrix",
    "block_circulant_product",
    "break_even",
    "carried",
    "centred_factors",
    "centred_linear",
    "circulant_gradient",
    "circulant_matrix",
    "circulant_product",
    "column_square_after_update",
    "decompositions",
    "diagonal_linear",
    "diagonal_totals",
    "displaced_matrix",
    "draw_seed",
    "dropped",
    "effective_rank",
    "fft_length",
    "hadamard_factors",
    "heads_linear",
    "keep_probability",
    "khatri_rao",
    "kronecker_linear",
    "ldr_product",
    "ldu",
    "lowrank_linear",
    "nuclear_norm",
    "nuclear_subgradient",
    "participation_rank",
    "patched_linear",
    "pivot_rows",
    "positive_rows",
    "rank_by_budget",
    "rank_by_energy",
    "rank_by_sum",
    "rank_by_tail",
    "rank_by_value",
    "recomputed",
    "replayed_dropout",
    "retracted",
    "row_square_after_update",
    "singular_threshold",
    "skew_circulant_matrix",
    "skew_product",
    "spectral_dtype",
    "square_rmatmul",
    "stable_rank",
    "tangent",
    "toeplitz_gradient",
    "toeplitz_matrix",
    "toeplitz_product",
    "truncated_svd",
]
