"""Matrices of one shape cut to their leading directions, from the eigenvectors of the smaller side's Gram matrix.

Shapes: N matrices, G blocks of a matrix that share a rank, rows x columns, K = min(rows, columns), R rank. M (N, G,
rows, columns), U (N, G, K, K), s (N, G, K).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Spectra"]


@dataclass(frozen=True)
class Spectra:
    """Left singular vectors and singular values of M = U diag(s) V^T, falling, in fp64; right ones are never made.

    They are those of the smaller side: where M has more rows than columns it is M^T that is decomposed. Values are
    right to 1e-16 s_1^2 / s_j, so those below some 1e-8 s_1 are noise, as fp32's below 1e-7 are.

    Example:
        >>> M = torch.diag(torch.tensor([3.0, -2.0, 1.0]))[None, None]
        >>> spectra = Spectra.of(M)
        >>> spectra.s.flatten().tolist(), spectra.cut(0, 2).diagonal(dim1=-2, dim2=-1).round(decimals=5).tolist()
        ([3.0, 2.0, 1.0], [[3.0, -2.0, 0.0]])
        >>> spectra.polar(0, 2).diagonal(dim1=-2, dim2=-1).round(decimals=5).tolist()
        [[1.0, -1.0, 0.0]]
    """

    M: Tensor
    U: Tensor
    s: Tensor
    turned: bool

    @classmethod
    def of(cls, M: Tensor) -> Spectra:
        """Of M (N, G, rows, columns).

        Raises:
            torch.linalg.LinAlgError: it was not found, as where an entry is not finite.
        """
        turned = M.shape[-2] > M.shape[-1]
        wide = (M.mT if turned else M).double()
        values, U = torch.linalg.eigh(wide @ wide.mT)
        return cls(wide, U.flip(-1), values.flip(-1).clamp_min(0).sqrt(), turned)

    @property
    def joint(self) -> Tensor:
        """sqrt(sum_g s_g^2), (N, K): what a rank that all blocks share keeps."""
        return self.s.square().sum(1).sqrt()

    def cut(self, n: int, rank: int, less: float = 0.0) -> Tensor:
        """U_R diag(max(s - less, 0)) V_R^T of matrix n, (G, rows, columns): with less = 0 the nearest of that rank."""
        U = self.U[n, ..., :rank]
        A = U.mT @ self.M[n]
        if less:
            s = self.s[n, :, :rank, None]
            A = A * torch.where(s > less, 1 - less / s, 0)
        return self._turned(U @ A)

    def polar(self, n: int, rank: int) -> Tensor:
        """U_R V_R^T of matrix n, (G, rows, columns); directions whose singular value is 0 are left out."""
        U, s = self.U[n, ..., :rank], self.s[n, :, :rank, None]
        return self._turned(U @ (torch.where(s > 0, 1 / s, 0) * (U.mT @ self.M[n])))

    def tangent(self, n: int, rank: int, D: Tensor) -> Tensor:
        """D - (I - U_R U_R^T) D (I - V_R V_R^T): what of D (G, rows, columns) stays at rank R, to first order."""
        U, s = self.U[n, ..., :rank], self.s[n, :, :rank, None]
        Vh = torch.where(s > 0, 1 / s, 0) * (U.mT @ self.M[n])
        wide = (D.mT if self.turned else D).double()
        rest = wide - U @ (U.mT @ wide)
        return self._turned(wide - rest + (rest @ Vh.mT) @ Vh)

    def _turned(self, X: Tensor) -> Tensor:
        return X.mT if self.turned else X
