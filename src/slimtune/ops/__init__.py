"""Layer 0: tensors in, tensors out."""

from .dropout import draw_seed, dropped, keep_probability, replayed_dropout
from .lowrank import lowrank_linear, row_square_after_update
from .patched import patched_linear
from .squares import column_square_after_update, square_rmatmul

__all__ = [
    "column_square_after_update",
    "draw_seed",
    "dropped",
    "keep_probability",
    "lowrank_linear",
    "patched_linear",
    "replayed_dropout",
    "row_square_after_update",
    "square_rmatmul",
]
