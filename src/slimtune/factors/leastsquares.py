"""Factors by alternating least squares, where some entries or inputs count for more.

Shapes: O out, I in, R rank, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import StructureError
from ..ops.decompositions import als as alternated
from ..ops.svd import truncated_svd
from .base import Part, Replacement, factors, matrices, thin, thin_sizes

__all__ = ["als"]


@factors
@dataclass(frozen=True)
class als:
    """W' = B A that minimises sum_oi q_oi (W' - W)_oi^2, or tr((W' - W) C (W' - W)^T), plus l (|B|^2 + |A|^2), by
    alternating least squares: `ops.decompositions.als`.

    It starts from the singular value decomposition of W, or of W with rows and columns weighed by their mean weights,
    which is the optimum where q_oi = r_o c_i; from whichever is better after a sweep. So where l = 0 the weighted error
    is at most that of `svd`. Of other weights it finds a local minimum. With C = E[x x^T] it is the mean squared error
    of the output, whose closed form is `afm` without its mean; without either it is `svd`.

    Args:
        weights: {layer: q >= 0, broadcast to (O, I)}: importance of entries, (I,) of inputs. 1 where a layer has none.
        covariance: {layer: C, (I, I), or (G, I, I) of a grouped convolution}, positive semi-definite, singular or not.
        ridge: l; with C it holds in the coordinates A C^(1/2).
        sweeps: at most.

    Raises:
        StructureError: both for one layer, another shape, negative weights or ridge, a C that is not positive
            semi-definite.

    Example:
        >>> part = Part("layer", torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        >>> als({"layer": torch.tensor([0.1, 1.0])})(part, 1).structure.dense().round(decimals=3).abs().tolist()
        [[0.0, 0.0], [0.0, 1.0]]
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    covariance: Mapping[str, Tensor] = field(default_factory=dict)
    ridge: float = 0.0
    sweeps: int = 100

    def __post_init__(self) -> None:
        both = [name for name in self.weights if name in self.covariance]
        if both:
            raise StructureError(f"als: {both[0]!r} has weights and a covariance; give one of them")

    def __call__(self, part: Part, rank: int) -> Replacement:
        M = matrices(part)
        C = self.covariance.get(part.name)
        root, back = (None, None) if C is None else _roots(C, M, part.name)
        X = M if root is None else M.double() @ root
        q = self.weights.get(part.name)
        if q is not None:
            try:
                q = q.to(M.device).expand(part.W.shape).reshape(M.shape)
            except RuntimeError:
                raise StructureError(
                    f"als: weights of shape {tuple(q.shape)} for {part.name!r}, whose weight is {tuple(part.W.shape)}"
                ) from None
        rank = min(rank, *M.shape[1:])
        ridge, start = (self.ridge, self.ridge), _leading(X, rank)
        if q is not None:
            rows, columns = q.double().mean(2, keepdim=True).sqrt(), q.double().mean(1, keepdim=True).sqrt()
            other = _leading(rows * X * columns, rank) / rows.clamp_min(1e-150)
            begun = [alternated(X, rank, ridge, q, W, 1) for W in (start, other)]
            start = min(begun, key=lambda one: float(one.trace[-1].sum())).left
        found = alternated(X, rank, ridge, q, start, self.sweeps)
        A = found.right if back is None else found.right @ back
        return Replacement(thin(part, found.left.to(M), A.to(M)))

    def sizes(self, part: Part) -> tuple[float, int]:
        return thin_sizes(part)


def _leading(X: Tensor, rank: int) -> Tensor:
    """U_R sqrt(S_R) of each matrix."""
    return torch.stack([U * s.sqrt() for U, s, _ in (truncated_svd(x, rank) for x in X)])


def _roots(C: Tensor, M: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(C^(1/2), its pseudo-inverse), (1 or G, I, I)."""
    I = M.shape[-1]
    C = C.detach().to(M.device, torch.float64)
    if tuple(C.shape) not in ((I, I), (1, I, I), (len(M), I, I)):
        raise StructureError(f"als: a covariance of shape {tuple(C.shape)} for {name!r}, expected ({I}, {I})")
    values, Q = torch.linalg.eigh(C.view(-1, I, I))
    top = values[:, -1:].clamp_min(0)
    if not bool((values >= -1e-6 * top - 1e-300).all()):
        raise StructureError(f"als: the covariance of {name!r} is not positive semi-definite")
    kept = values > top * (I * torch.finfo(values.dtype).eps)
    roots = torch.where(kept, values, 0.0).sqrt()
    inverse = torch.where(kept, 1 / torch.where(kept, roots, 1.0), 0.0)
    return (Q * roots[:, None]) @ Q.mT, (Q * inverse[:, None]) @ Q.mT
