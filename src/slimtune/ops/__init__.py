"""Layer 0: tensors in, tensors out."""

from .dropout import draw_seed, dropped, keep_probability, replayed_dropout
from .ldu import diagonal_linear, ldu, pivot_rows
from .lowrank import lowrank_linear, row_square_after_update
from .patched import patched_linear
from .products import hadamard_factors, khatri_rao, kronecker_linear
from .squares import column_square_after_update, square_rmatmul

__all__ = [
    "column_square_after_update",
    "diagonal_linear",
    "draw_seed",
    "dropped",
    "hadamard_factors",
    "keep_probability",
    "khatri_rao",
    "kronecker_linear",
    "ldu",
    "lowrank_linear",
    "patched_linear",
    "pivot_rows",
    "replayed_dropout",
    "row_square_after_update",
    "square_rmatmul",
]
