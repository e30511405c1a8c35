"""What is fitted to an autoencoder's latents to draw new ones, and how far two sets of features are apart.

Shapes: B samples, N features, K components of a mixture, R numerical rank of a covariance.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, SlimtuneError, StructureError
from ..structures.base import check_count

__all__ = ["LatentGaussian", "LatentMixture", "frechet_distance"]

FLAT = 1e-10
"""Eigenvalues of a covariance below this share of the largest are rounding: no sample leaves the span of the others."""


class LatentGaussian:
    """N(mu, C) with C = Q diag(v) Q^T, full covariance, possibly singular: z = mu + Q diag(sqrt v) e, e ~ N(0, I_R).

    LoRAE, Tran et al. 2024 (WACV), arXiv 2310.16194, samples from it what the decoder turns into images. A low-rank
    latent has a singular covariance, for which a Cholesky factor does not exist; eigenvectors need none, and a sample
    stays in mu + span Q, where the latents are. Fit it on training data.

    Args:
        mean: mu (N,).
        values: v (R,), falling.
        directions: Q (N, R), orthonormal columns.

    Example:
        >>> z = torch.randn(1000, 2) @ torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
        >>> gaussian = LatentGaussian.fit(z)
        >>> gaussian.rank, tuple(gaussian.sample(5).shape)
        (2, (5, 3))
    """

    def __init__(self, mean: Tensor, values: Tensor, directions: Tensor) -> None:
        self.mean, self.values, self.directions = mean, values, directions

    @classmethod
    def fit(cls, z: Tensor) -> LatentGaussian:
        """Mean and covariance (divided by B - 1) of z (B, N), in fp64; eigenvalues below 1e-10 of the largest are left
        out.

        Raises:
            DataError: not two samples or more of shape (B, N), or a value that is not finite.
        """
        z = checked(z, "LatentGaussian.fit")
        mean = z.mean(0)
        _, s, Vh = torch.linalg.svd(z - mean, full_matrices=False)
        values = s.square() / (len(z) - 1)
        rank = int((values > FLAT * values.max()).sum())
        return cls(mean, values[:rank], Vh[:rank].T)

    @property
    def rank(self) -> int:
        """R."""
        return len(self.values)

    def covariance(self) -> Tensor:
        """C (N, N)."""
        return (self.directions * self.values) @ self.directions.T

    def coordinates(self, z: Tensor) -> Tensor:
        """Principal coordinates Q^T (z - mu) of z (B, N), in units of their standard deviations: (B, R)."""
        return (z.to(self.mean) - self.mean) @ self.directions / self.values.sqrt()

    def at(self, coordinates: Tensor) -> Tensor:
        """The latents (B, N) at the first R' <= R coordinates (B, R'), the others zero."""
        R = coordinates.shape[-1]
        return self.mean + coordinates.to(self.mean) * self.values[:R].sqrt() @ self.directions[:, :R].T

    def sample(self, count: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """(count, N) draws; in the default dtype unless another is given."""
        check_count(count, "LatentGaussian.sample: count")
        e = torch.randn(count, self.rank, generator=generator, dtype=torch.float64)
        return self.at(e).to(dtype or torch.get_default_dtype())

    def grid(self, steps: int = 10, sigmas: float = 2.0) -> Tensor:
        """(steps, steps, N): the plane of the two largest eigenvectors, from -sigmas to +sigmas deviations on each.

        Raises:
            StructureError: a covariance of rank below two.
        """
        check_count(steps, "LatentGaussian.grid: steps")
        if self.rank < 2:
            raise StructureError(f"LatentGaussian.grid: it needs two directions, and the covariance has {self.rank}")
        line = torch.linspace(-sigmas, sigmas, steps, dtype=torch.float64)
        return self.at(torch.cartesian_prod(line, line)).reshape(steps, steps, -1)


class LatentMixture:
    """sum_k w_k N(mu_k, C_k), full covariances, fitted by scikit-learn in the principal coordinates of the latents.

    LoRAE's second generator. In its own coordinates z = mu + Q diag(sqrt v) c a singular covariance is none: c has R
    features of variance one, directions without variance are gone, and scikit-learn's `reg_covar` is a share of each
    direction's variance, whatever the latent's scale. A draw stays in mu + span Q.

    Args:
        base: the coordinates.
        weights: w (K,).
        means: of c, (K, R).
        factors: of the covariances of c, lower triangular, (K, R, R).

    Example:
        >>> z = torch.cat([torch.randn(200, 3) - 5, torch.randn(200, 3) + 5])
        >>> mixture = LatentMixture.fit(z, components=2)
        >>> sorted(round(w, 2) for w in mixture.weights.tolist()), tuple(mixture.sample(4).shape)
        ([0.5, 0.5], (4, 3))
    """

    def __init__(self, base: LatentGaussian, weights: Tensor, means: Tensor, factors: Tensor) -> None:
        self.base, self.weights, self.means, self.factors = base, weights, means, factors

    @classmethod
    def fit(cls, z: Tensor, components: int = 4, seed: int = 0, reg_covar: float = 1e-6) -> LatentMixture:
        """Fit to z (B, N) by expectation maximisation; the paper's default is four components.

        Raises:
            DataError: as `LatentGaussian.fit`; fewer samples than components; latents that are all alike.
            SlimtuneError: scikit-learn is not installed.
        """
        check_count(components, "LatentMixture.fit: components")
        z = checked(z, "LatentMixture.fit")
        base = LatentGaussian.fit(z)
        if len(z) < components or not base.rank:
            what = f"{len(z)} samples in {base.rank} directions"
            raise DataError(f"LatentMixture.fit: expected at least {components} samples that differ, got {what}")
        found = _mixture(components, seed, reg_covar).fit(base.coordinates(z).cpu().numpy())
        tensors = (torch.as_tensor(t, dtype=torch.float64) for t in (found.weights_, found.means_, found.covariances_))
        weights, means, covariances = tensors
        return cls(base, weights, means, torch.linalg.cholesky(covariances))

    def sample(self, count: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """(count, N) draws; in the default dtype unless another is given."""
        check_count(count, "LatentMixture.sample: count")
        k = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        e = torch.randn(count, self.means.shape[1], 1, generator=generator, dtype=torch.float64)
        c = self.means[k]
        for one in range(len(self.weights)):  # no copy of a factor for every draw
            rows = k == one
            c[rows] += (self.factors[one] @ e[rows]).squeeze(-1)
        return self.base.at(c).to(dtype or torch.get_default_dtype())


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2) of the Gaussians of features a (A, N) and b (B, N).

    Heusel et al. 2017, arXiv 1706.08500, equation 6; FID where the features are Inception's. Biased upwards for few
    samples: compare only equal counts. In fp64; covariances may be singular.

    Raises:
        DataError: not two samples or more of shape (B, N), a value that is not finite, or different N.

    Example:
        >>> a = torch.randn(100, 3)
        >>> round(frechet_distance(a, a + torch.tensor([2.0, 0.0, 0.0])), 4)
        4.0
    """
    a, b = checked(a, "frechet_distance"), checked(b, "frechet_distance")
    if a.shape[1] != b.shape[1]:
        raise DataError(f"frechet_distance: expected as many features, got {a.shape[1]} and {b.shape[1]}")
    mean = (a.mean(0) - b.mean(0)).square().sum()
    # (A^T A)^1/2 (B^T B) (A^T A)^1/2 and B A^T have the same singular values: no root of a covariance is taken
    A, B = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b))
    # QR first: as small as N x N, whatever the number of samples
    cross = torch.linalg.svdvals(torch.linalg.qr(A, mode="r").R @ torch.linalg.qr(B, mode="r").R.T).sum()
    return max(0.0, float(mean + A.square().sum() + B.square().sum() - 2 * cross))


def checked(z: Tensor, where: str) -> Tensor:
    """z in fp64, on the CPU and without its graph, if it is two or more samples of finite features."""
    if z.ndim != 2 or len(z) < 2 or not z.shape[1]:
        raise DataError(f"{where}: expected two or more samples of shape (samples, features), got {tuple(z.shape)}")
    if not bool(z.isfinite().all()):
        raise DataError(f"{where}: {int((~z.isfinite()).sum())} values are not finite")
    return z.detach().cpu().double()


def _mixture(components: int, seed: int, reg_covar: float) -> Any:
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise SlimtuneError("LatentMixture.fit needs scikit-learn: pip install scikit-learn") from error
    return GaussianMixture(components, covariance_type="full", reg_covar=reg_covar, random_state=seed)
