"""Leading singular vectors, the same on every device up to rounding.

Shapes: O out, I in, R rank, L = R + oversampling. W (O, I), U (O, R), S (R,), Vh (R, I).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["positive_rows", "truncated_svd"]

CHUNK = 2**24  # numbers of W that are widened at a time


@torch.no_grad()
def truncated_svd(
    W: Tensor,  # (O, I)
    rank: int,
    iterations: int | None = None,
    oversampling: int = 10,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, Vh), the leading min(rank, O, I) terms of W = U diag(S) Vh, in at least fp32.

    Singular values fall; of each row of Vh the entry of largest magnitude is positive, so that every device and
    library settles the sign alike. U and Vh have orthonormal columns and rows.

    Args:
        iterations: None for the exact decomposition, by the eigenvectors of the smaller of W W^T and W^T W in fp64:
            singular values are right to 1e-16 S_1^2 / S_j. A number q >= 0 for the randomised one of Halko, Martinsson
            and Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1: a subspace of R + `oversampling` dimensions, q
            power iterations with a QR decomposition after every product, 2 q + 2 thin products with W. The smallest
            possible |W - U diag(S) Vh| is S_{R+1}; its own is expected within (1 + c^(1 / (2 q + 1))) times that with
            c = 1 + sqrt(R / (p - 1)) + e sqrt(L (min(O, I) - R)) / p, p = L - R (corollary 10.10 and theorem 9.3), and
            was 3 % above it at q = 4 for weights of 1024 x 1024 and 1024 x 4096 whose spectrum falls slowly.
        oversampling: L - R.
        seed: of the random subspace, drawn on the CPU.

    Example:
        >>> W = torch.diag(torch.tensor([1.0, -3.0, 2.0]))
        >>> U, S, Vh = truncated_svd(W, 2)
        >>> S.tolist(), Vh.abs().round().tolist()
        ([3.0, 2.0], [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    """
    t = torch.promote_types(W.dtype, torch.float32)
    rank = min(rank, *W.shape)
    if iterations is None or rank + oversampling >= min(W.shape):
        U, S, Vh = _exact(W, rank)
    else:
        Q = _range(W.to(t), rank + oversampling, iterations, seed)
        U, S, Vh = _exact(Q.t() @ W.to(t), rank)
        U = Q.to(U.dtype) @ U
    signs = _signs(Vh)
    return (U * signs).to(t), S.to(t), (signs[:, None] * Vh).to(t)


def positive_rows(A: Tensor) -> Tensor:
    """A (R, I) with rows multiplied by +1 or -1 so that of each the entry of largest magnitude is positive.

    Example:
        >>> positive_rows(torch.tensor([[1.0, -2.0], [3.0, 0.0]])).tolist()
        [[-1.0, 2.0], [3.0, 0.0]]
    """
    return _signs(A)[:, None] * A


def _signs(A: Tensor) -> Tensor:
    largest = A.gather(1, A.abs().argmax(1, keepdim=True))[:, 0]
    return torch.where(largest < 0, -1.0, 1.0).to(A.dtype)


def _exact(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """In fp64; the smaller side's Gram matrix costs a fraction of torch.linalg.svd."""
    if W.shape[0] < W.shape[1]:
        V, S, Uh = _exact(W.t(), rank)
        return Uh.t(), S, V.t()
    V = torch.linalg.eigh(_gram(W))[1][:, -rank:].flip(1)
    # what the square has blurred among small values is put right in the subspace found
    X = _product(W, V)
    Q, R = torch.linalg.qr(X)
    U, S, Wh = torch.linalg.svd(R)
    return Q @ U, S, Wh @ V.t()


def _gram(W: Tensor) -> Tensor:
    """W^T W in fp64."""
    total = W.new_zeros(W.shape[1], W.shape[1], dtype=torch.float64)
    for part in W.split(max(1, CHUNK // W.shape[1])):
        wide = part.double()
        total.addmm_(wide.t(), wide)
    return total


def _product(W: Tensor, V: Tensor) -> Tensor:
    """W V in fp64."""
    return torch.cat([part.double() @ V for part in W.split(max(1, CHUNK // W.shape[1]))])


def _range(W: Tensor, size: int, iterations: int, seed: int) -> Tensor:
    """Q (O, L), orthonormal columns that nearly span the leading left singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(W.shape[1], size, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(W @ start.to(W)).Q
    for _ in range(iterations):
        Z = torch.linalg.qr(W.t() @ Q).Q
        Q = torch.linalg.qr(W @ Z).Q
    return Q
