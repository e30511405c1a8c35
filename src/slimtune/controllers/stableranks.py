"""What Cuttlefish computes of weights: stable ranks, the ranks that follow from them, and the decay of a product.

Shapes: O out, I in, R rank, K = min(O, I).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ..compress import part_of
from ..errors import DivergenceError
from ..factors.base import matrices
from ..ops.lanczos import spectral_norm
from ..structures import LowRank, Structure

__all__ = ["frobenius_decay", "random_stable_rank", "scaled_rank", "stable_ranks"]

CHUNK = 2**24  # numbers of W that are stacked at a time


def scaled_rank(now: float, first: float, full: int) -> int:
    """clip(ceil(full / first * now), 1, full), exactly: the scaled stable rank of Cuttlefish, `full` where now = first.

    Wang et al. 2023, arXiv 2305.02538, section 3: xi = full / first of a weight at random.

    Args:
        now: stable rank.
        first: stable rank at the start, above 0.
        full: K.

    Example:
        >>> scaled_rank(13, 13, 27), scaled_rank(6.5, 13.0, 27), scaled_rank(20, 13, 27)
        (27, 14, 27)
    """
    return max(1, min(full, math.ceil(Fraction(now) * full / Fraction(first))))


def stable_ranks(layers: Mapping[str, nn.Module], form: str = "channel") -> dict[str, float]:
    """|W|_F^2 / s_1(W)^2 of layers' weights, by name; 0 for a zero weight.

    Layers of one shape are done together. Of the matrices that a layer has in a form (`factorize`), one for each group
    of a convolution, the largest counts.

    Args:
        form: "channel" or "spatial", for convolutions.

    Raises:
        DivergenceError: a weight that is not finite.
        UninitializedError: a weight on the meta device.

    Example:
        >>> layer = nn.Linear(4, 3); _ = nn.init.eye_(layer.weight)
        >>> round(stable_ranks({"layer": layer})["layer"], 4)
        3.0
    """
    alike: dict[tuple[Any, ...], list[tuple[str, Tensor]]] = {}
    for name, module in layers.items():
        M = matrices(part_of(module, name), form)
        alike.setdefault((M.shape, M.dtype, M.device), []).append((name, M))
    found: dict[str, float] = {}
    for (shape, *_), rows in alike.items():
        each = max(1, CHUNK // shape.numel())
        for i in range(0, len(rows), each):
            some = rows[i : i + each]
            M = torch.cat([M for _, M in some])
            square = torch.linalg.matrix_norm(M).square()
            finite = square.isfinite().view(len(some), -1).all(1).tolist()
            if not all(finite):
                name = some[finite.index(False)][0]
                raise DivergenceError(f"stable rank of {name!r}: its weight is not finite")
            ranks = torch.where(square > 0, square / spectral_norm(M).square(), 0.0)
            found.update(zip((name for name, _ in some), ranks.view(len(some), -1).amax(1).tolist(), strict=True))
    return {name: found[name] for name in layers}


def random_stable_rank(rows: int, columns: int) -> float:
    """m n / (sqrt m + sqrt n)^2, to which the stable rank of a random matrix tends whose entries are independent and
    alike: Marchenko and Pastur 1967, the edge of its spectrum.

    Example:
        >>> round(random_stable_rank(512, 4608), 6)
        288.0
    """
    return rows * columns / (rows**0.5 + columns**0.5) ** 2


def frobenius_decay(structure: Structure) -> list[Tensor]:
    """Gradients of |dW|_F^2 / 2 in the structure's parameters, in their order: of dW = B A, B A A^T and B^T B A.

    Cuttlefish, Wang et al. 2023, arXiv 2305.02538, section 3, after Khodak et al. 2021, arXiv 2105.01029.

    Example:
        >>> import slimtune as st
        >>> structure = st.LowRank(3, 4, rank=2); _ = [nn.init.normal_(p) for p in structure.parameters()]
        >>> A, B = structure.A, structure.B
        >>> torch.allclose(frobenius_decay(structure)[0], B.T @ B @ A)
        True
    """
    if isinstance(structure, LowRank) and not structure.has_core:
        A, B = structure.A.detach(), structure.B.detach()
        return [(B.t() @ B) @ A, B @ (A @ A.t())]
    with torch.enable_grad():
        return list(torch.autograd.grad(structure.dense().square().sum() / 2, list(structure.parameters())))
