"""Singular values of a folder's matrices: how many ranks matter, what each would save, and what it would cost.

Shapes: O out, I in (a convolution's I is its input channels per group times its kernel), K = min(O, I), R rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from slimtune.app.inspect import Row

ENERGIES = (0.9, 0.95, 0.99)
SHOWN = 256  # singular values of a layer in JSON, at most
CHUNK = 2**24  # numbers of a matrix that are widened at a time
HEADS = ("layer", "shape", "stable", "effective", "90 %", "95 %", "99 %", "even at", "saves at 90, 95, 99 %")


@dataclass(frozen=True)
class Cut:
    """A matrix at a lower rank.

    Attributes:
        rank: R, at least 1.
        parameters: R (O + I), the numbers of its two factors, which are also its multiply-adds per input vector.
        saved: share of the numbers that it takes now; None where the factors are not fewer.
        error: |W' - W|_F / |W|_F of the nearest W' of this rank.
    """

    rank: int
    parameters: int
    saved: float | None
    error: float


@dataclass(frozen=True)
class Spectrum:
    """Of one matrix.

    Attributes:
        shape: (O, I).
        values: singular values, falling.
        parameters: numbers that it takes now: O I, or those of an adapter or a structure.
    """

    shape: tuple[int, int]
    values: tuple[float, ...]
    parameters: int

    @cached_property
    def _tails(self) -> Tensor:
        """sum_{j > R} s_j^2 for R = 0 to K."""
        import torch

        square = torch.tensor(self.values, dtype=torch.float64).square()
        return torch.cat([square.flip(0).cumsum(0).flip(0), square.new_zeros(1)])

    @property
    def per_rank(self) -> int:
        """O + I."""
        return sum(self.shape)

    @property
    def break_even(self) -> float:
        """The rank from which on factors are not smaller."""
        return self.parameters / self.per_rank

    def at(self, rank: int) -> Cut:
        """W' of this rank."""
        rank = min(max(1, rank), len(self.values))
        total, count = float(self._tails[0]), rank * self.per_rank
        saved = 1 - count / self.parameters if count < self.parameters else None
        return Cut(rank, count, saved, math.sqrt(float(self._tails[rank]) / total) if total else 0.0)

    def cut(self, energy: float) -> Cut:
        """The smallest rank that keeps this share of sum s_j^2."""
        kept = (1 - energy) * self._tails[0] * (1 + 1e-12)
        return self.at(int((self._tails <= kept).nonzero()[0]))

    def ranks(self) -> dict[str, float]:
        """Ways to count them."""
        import torch

        from slimtune.ops.spectral import effective_rank, stable_rank

        s = torch.tensor(self.values, dtype=torch.float64)
        return {"stable_rank": stable_rank(s), "effective_rank": effective_rank(s)}

    def facts(self) -> dict[str, Any]:
        """Plain JSON data; of more than `SHOWN` singular values, those at evenly spaced places."""
        count = len(self.values)
        at = sorted({round(i * (count - 1) / (SHOWN - 1)) for i in range(SHOWN)}) if count > SHOWN else range(count)
        return {
            "shape": list(self.shape),
            **self.ranks(),
            "break_even": self.break_even,
            "energy": {f"{energy:g}": vars(self.cut(energy)) for energy in ENERGIES},
            "places": [i + 1 for i in at],
            "singular_values": [self.values[i] for i in at],
        }


def spectrum_of(matrix: Tensor, parameters: int | None = None) -> Spectrum:
    """Of a matrix of any floating dtype, from the eigenvalues of its smaller side's Gram matrix in fp64: right to 1e-16
    s_1^2 / s_j, which for values below 1e-8 s_1 is noise."""
    import torch

    W = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.t()
    gram = torch.zeros(W.shape[1], W.shape[1], dtype=torch.float64)
    for part in W.split(max(1, CHUNK // W.shape[1])):
        wide = part.double()
        gram.addmm_(wide.t(), wide)
    values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()
    shape = (matrix.shape[0], matrix.shape[1])
    return Spectrum(shape, tuple(values.tolist()), matrix.numel() if parameters is None else parameters)


@dataclass(frozen=True)
class Together:
    """All matrices, each cut where the same share of its energy is left, but only where that saves."""

    energy: float
    parameters: int
    saved: float
    error: float


def together(spectra: Sequence[Spectrum], energy: float) -> Together:
    """What that comes to: numbers, the share of them saved, and |W' - W|_F / |W|_F over all."""
    return _sum(spectra, [s.cut(energy) for s in spectra], energy)


def evenly(spectra: Sequence[Spectrum], share: float) -> Together:
    """The same with the same share of its break-even rank for each."""
    return _sum(spectra, [s.at(int(share * s.break_even)) for s in spectra], math.nan)


def cheapest(spectra: Sequence[Spectrum], worth: float) -> Together:
    """The same where every rank goes whose s_j^2 / (O + I) is below `worth`: of all choices that save as much, the
    least error, but for layers that factors would not make smaller."""
    counts = [int((-s._tails.diff() >= worth * s.per_rank).sum()) for s in spectra]
    return _sum(spectra, [s.at(count) for s, count in zip(spectra, counts, strict=True)], math.nan)


def worths(spectra: Sequence[Spectrum], count: int = 80) -> list[float]:
    """Thresholds for `cheapest`, from where most ranks stay to where few do."""
    import torch

    every = torch.cat([-s._tails.diff() / s.per_rank for s in spectra]).sort().values
    return [float(every[round(i * (len(every) - 1) / count)]) for i in range(1, count + 1)]


def _sum(spectra: Sequence[Spectrum], cuts: Sequence[Cut], energy: float) -> Together:
    before = after = 0
    lost = total = 0.0
    for s, cut in zip(spectra, cuts, strict=True):
        square = float(s._tails[0])
        before += s.parameters
        total += square
        after += s.parameters if cut.saved is None else cut.parameters
        lost += 0.0 if cut.saved is None else cut.error**2 * square
    return Together(energy, after, 1 - after / before if before else 0.0, math.sqrt(lost / total) if total else 0.0)


def cells(row: Row) -> tuple[str, ...]:
    """A line of the table."""
    s = row.spectrum
    assert s is not None
    cuts, ranks = [s.cut(energy) for energy in ENERGIES], s.ranks()
    saves = ", ".join("-" if cut.saved is None else f"{100 * cut.saved:.0f}" for cut in cuts)
    return (
        row.name,
        f"{s.shape[0]} x {s.shape[1]}",
        f"{ranks['stable_rank']:.1f}",
        f"{ranks['effective_rank']:.1f}",
        *(str(cut.rank) for cut in cuts),
        f"{s.break_even:.1f}",
        saves,
    )


def summary(spectra: Sequence[Spectrum]) -> list[str]:
    """What all of them would save together."""
    before = sum(s.parameters for s in spectra)
    lines = ["columns 90 to 99 %: the rank that keeps so much of sum s^2; saves: parameters and multiply-adds, in %"]
    for energy in ENERGIES:
        found = together(spectra, energy)
        lines.append(
            f"all at {100 * energy:.0f} %: {before:,} -> {found.parameters:,} parameters ({100 * found.saved:.0f} % "
            f"saved), relative error {found.error:.3f}"
        )
    return lines
