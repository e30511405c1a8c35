"""Layer 4: ranks under a budget: of adapters before training, and of layers that are compressed."""

from .adapters import (
    ALLOCATORS,
    ESTIMATES,
    MEASURES,
    Allocator,
    budget,
    check_allocation,
    eva,
    gora,
    with_ranks,
)

__all__ = [
    "ALLOCATORS",
    "ESTIMATES",
    "MEASURES",
    "Allocator",
    "budget",
    "check_allocation",
    "eva",
    "gora",
    "with_ranks",
]
