"""Methods whose change is applied by fast Fourier transforms."""

from __future__ import annotations

from typing import Any

from ..errors import StructureError
from ..recipe import Recipe
from ..structures import LDR, BlockCirculant, Circulant, Toeplitz, ToeplitzProduct

__all__ = ["c3a", "circulant", "ldr", "toeplitz"]


def circulant(hadamard: bool = True, alpha: float = 1.0, dropout: float = 0.0) -> Recipe:
    """W + alpha C(a * b) with one circulant matrix C of order max(O, I), its first column a product of two vectors.

    SURM (circulant), Sehanobish et al. 2024, arXiv 2406.17740. Published for square layers; others take the corner of
    the square matrix. a is drawn from N(0, 1) and b starts at zero, as in the published code.

    Args:
        hadamard: False trains the first column itself, from zero.
        alpha: the scale.
        dropout: of the adapter's input, while training; rounded to 1/256.
    """
    return Recipe(Circulant, {"hadamard": hadamard}, alpha=alpha, dropout=dropout, name="circulant", learning_rate=2e-3)


def toeplitz(form: str = "product", alpha: float = 1.0, dropout: float = 0.0) -> Recipe:
    """W + alpha T(b) T(a) with symmetric Toeplitz matrices T of order max(O, I).

    SURM (symmetric Toeplitz), Sehanobish et al. 2024, arXiv 2406.17740. Published for square layers; others take the
    corner of the square matrix. a is drawn from N(0, 0.02^2) and b starts at zero, as in the published code.

    Args:
        form: "product", as published; or "general", one Toeplitz matrix of any shape with O + I - 1 numbers.
        alpha: the scale.
        dropout: of the adapter's input, while training; rounded to 1/256.

    Raises:
        StructureError: another form.
    """
    if form not in ("product", "general"):
        raise StructureError(f"toeplitz: form must be 'product' or 'general', got {form!r}")
    structure = ToeplitzProduct if form == "product" else Toeplitz
    rate = 1e-3 if form == "product" else 2e-3
    return Recipe(structure, {}, alpha=alpha, dropout=dropout, name="toeplitz", learning_rate=rate)


def ldr(terms: int = 2, alpha: float = 1.0, dropout: float = 0.0) -> Recipe:
    """W + alpha sum_k C(g_k) S(h_k) with circulant C and skew-circulant S of order max(O, I).

    SURM (low displacement rank), Sehanobish et al. 2024, arXiv 2406.17740. The published code has this for square
    layers and cannot reach it: its root of -1 is one of order N + 1, and it must be supplied by the caller.

    Args:
        terms: how many products.
        alpha: the scale.
        dropout: of the adapter's input, while training; rounded to 1/256.
    """
    return Recipe(LDR, {"terms": terms}, alpha=alpha, dropout=dropout, name="ldr", learning_rate=1e-3)


def c3a(block: int | None = None, normalization: str = "unit", dropout: float = 0.0) -> Recipe:
    """W + f C(w) with C(w) a matrix of circulant N x N blocks given by their first rows, f = 1, or 1 / I as published.

    C3A, Chen et al. 2024, arXiv 2407.19342, eq. 1. With f = 1 the usual learning rates do; published ones (0.1 and
    above) belong to normalization "published", which is also what PEFT has. Any shape: where N does not divide a
    side, the input is padded with zeros. The gradient in x is the true one; the paper's algorithm and PEFT have a
    reflected one. The kernel starts at zero.

    Args:
        block: N; None takes the common divisor of O and I near sqrt(O I) / 8, or pads (see `BlockCirculant`).
        normalization: "unit" or "published".
        dropout: of the adapter's input, while training; rounded to 1/256.
    """
    options: dict[str, Any] = {"normalization": normalization}
    if block is not None:
        options["block"] = block
    rate = 5e-4 if normalization == "unit" else 0.3
    return Recipe(BlockCirculant, options, dropout=dropout, name="c3a", learning_rate=rate)
