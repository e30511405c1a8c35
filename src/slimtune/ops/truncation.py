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
    """Left singular vectors and singular values of M = U diag(s) V^T, falling; right ones are never made.

    They are those of the smaller side: where M has more rows than columns it is M^T that is decomposed.

    Example:
        >>> M = torch.diag(torch.tensor([3.0, -2.0, 1.0]))[None, None]
        >>> spectra = Spectra.of(M)
        >>> spectra.s.flatten().tolist(), spectra.cut(0, 2).diagonal(dim1=-2, dim2=-1).round(decimals=5).tolist()
        ([3.0, 2.0, 1.0], [[3.0, -2.0, 0.0]])
        >>> spectra.polar(0, 2).diagonal(dim1=-2, dim2=-1).round(decimals=5).tolist()
        [[1.0, -1.0, 0.0]]
    """

    M: Tensor
    """(N, G, K, columns or rows)."""
    U: Tensor
    s: Tensor
    turned: bool

    @classmethod
    def of(cls, M: Tensor, exact: bool = True) -> Spectra:
        """Of M (N, G, rows, columns).

        Args:
            exact: in fp64: squares s_j^2 are right to 1e-16 s_1^2. Otherwise in M's own type, in fp32 to some 1e-6
                s_1^2, which is as good where a share of a thousandth of the squares or more is cut, and takes half as
                long.

        Raises:
            torch.linalg.LinAlgError: it was not found, as where an entry is not finite.
        """
        turned = M.shape[-2] > M.shape[-1]
        M = M.mT if turned else M
        wide = M.double() if exact else M
        values, U = torch.linalg.eigh(wide @ wide.mT)
        return cls(M, U.flip(-1).to(M.dtype), values.flip(-1).clamp_min(0).double().sqrt(), turned)

    @property
    def joint(self) -> Tensor:
        """sqrt(sum_g s_g^2), (N, K): what a rank that all blocks share keeps."""
        return self.s.square().sum(1).sqrt()

    def cut(self, n: int, rank: int, less: float = 0.0) -> Tensor:
        """U_R diag(max(s - less, 0)) V_R^T of matrix n, (G, rows, columns): with less = 0 the nearest of that rank."""
        M, rest = self.M[n], self.U[n, ..., rank:]
        if not less and rest.shape[-1] < rank:
            return self._turned(M - rest @ (rest.mT @ M))
        s = self.s[n, :, :rank]
        return self._turned(self._weighted(n, torch.where(s > less, 1 - less / s, 0)) @ M)

    def polar(self, n: int, rank: int) -> Tensor:
        """U_R V_R^T of matrix n, (G, rows, columns); directions whose singular value is 0, up to the rounding of M, are
        left out."""
        return self._turned(self._weighted(n, self._inverse(n, rank)) @ self.M[n])

    def tangent(self, n: int, rank: int, D: Tensor) -> Tensor:
        """D - (I - U_R U_R^T) D (I - V_R V_R^T): what of D (G, rows, columns) stays at rank R, to first order."""
        M, U, rest = self.M[n], self.U[n, ..., :rank], self.U[n, ..., rank:]
        D = (D.mT if self.turned else D).to(M)
        X = rest.mT @ D  # (G, K - R, columns)
        V = self._inverse(n, rank).to(M)
        within = (((X @ M.mT) @ (U * V.square()[:, None])) @ U.mT) @ M
        return self._turned(D - rest @ (X - within))

    def _inverse(self, n: int, rank: int) -> Tensor:
        """1 / s of matrix n, (G, R), and 0 where s is 0 up to the rounding of M."""
        s = self.s[n]
        least = max(self.M.shape[-2:]) * torch.finfo(self.M.dtype).eps * s[:, :1]
        return torch.where(s > least, 1 / s, 0)[:, :rank]

    def _weighted(self, n: int, f: Tensor) -> Tensor:
        """U_R diag(f) U_R^T, (G, K, K)."""
        U = self.U[n, ..., : f.shape[-1]]
        return (U * f.to(U)[:, None]) @ U.mT

    def _turned(self, X: Tensor) -> Tensor:
        return X.mT if self.turned else X
