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
from .compression import Foreseeing, Price, fixed, parameters, price, prices, tail, uniform
from .sweep import Sensitivity, sensitivity, type_of

__all__ = [
    "ALLOCATORS",
    "ESTIMATES",
    "MEASURES",
    "Allocator",
    "Foreseeing",
    "Price",
    "Sensitivity",
    "budget",
    "check_allocation",
    "eva",
    "fixed",
    "gora",
    "parameters",
    "price",
    "prices",
    "sensitivity",
    "tail",
    "type_of",
    "uniform",
    "with_ranks",
]
