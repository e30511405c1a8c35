"""Entrywise products of two low-rank matrices.

Shapes: A (*, M, N), K1 and K2 inner sizes, C1 (*, M, K1), D1 (*, K1, N), C2 (*, M, K2), D2 (*, K2, N).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import StructureError
from .common import check_least, check_whole, checked, drawn, narrowed, settled, square, weighted_rows, weights_of

__all__ = ["HadamardFactors", "hadamard_als", "hadamard_descent", "hadamard_gradients"]


class HadamardFactors(NamedTuple):
    """A ~ (C1 D1) * (C2 D2), entry by entry."""

    C1: Tensor  # (*, M, K1)
    D1: Tensor  # (*, K1, N)
    C2: Tensor  # (*, M, K2)
    D2: Tensor  # (*, K2, N)
    trace: Tensor  # (S, *)
    converged: bool

    def dense(self) -> Tensor:
        """(C1 D1) * (C2 D2), (*, M, N)."""
        return (self.C1 @ self.D1) * (self.C2 @ self.D2)


Four = tuple[Tensor, Tensor, Tensor, Tensor]


class _Problem:
    """The entries, their weights, and their size (*, 1, 1), by which they are divided."""

    def __init__(self, A: Tensor, ranks: Sequence[int], weights: Tensor | None, what: str) -> None:
        o = weights_of(weights, A, what)
        X = checked(A if o is None else torch.where(o > 0, A, torch.zeros_like(A)), what)
        if len(ranks) != 2:
            raise StructureError(f"{what}: ranks must be two whole numbers, got {ranks!r}")
        for r in ranks:
            check_whole(r, f"{what}: a rank", 1, max(X.shape[-2:]))
        self.K1, self.K2 = ranks
        self.o = torch.ones_like(X) if o is None else o
        size = ((self.o * X.square()).sum((-2, -1)) / self.o.sum((-2, -1)).clamp_min(1e-300)).sqrt()[..., None, None]
        self.size = torch.where(size > 0, size, torch.ones_like(size))
        self.X = X / self.size
        self.unit = self.size[..., 0, 0].square()
        """Of the objective."""
        self.whole = (self.o * self.X.square()).sum((-2, -1)).clamp_min(1e-300)

    def loss(self, f: Four, ridge: float = 0.0) -> Tensor:
        C1, D1, C2, D2 = f
        error = (self.o * ((C1 @ D1) * (C2 @ D2) - self.X).square()).sum((-2, -1))
        return error + ridge * sum(map(square, f)) if ridge else error

    def warm(self, generator: torch.Generator) -> Four:
        """C1 D1 the truncated singular value decomposition, C2 D2 = 1: of C2 the first column is ones and the others
        0.05 N(0, 1), of D2 the first row is ones and the others zero."""
        U, s, Vh = torch.linalg.svd(self.X * (self.o > 0), full_matrices=False)
        U, Vh, root = U[..., : self.K1], Vh[..., : self.K1, :], s[..., : self.K1].sqrt()
        few = root.shape[-1]  # below K1 where that is above min(M, N): the rest is zero
        C1, D1 = (self.X.new_zeros(shape) for shape in self._shapes()[:2])
        C1[..., :few], D1[..., :few, :] = U * root[..., None, :], root[..., None] * Vh
        C2 = 0.05 * drawn(self._shapes()[2], self.X, generator)
        D2 = self.X.new_zeros(self._shapes()[3])
        C2[..., 0], D2[..., 0, :] = 1.0, 1.0
        return C1, D1, C2, D2

    def random(self, generator: torch.Generator) -> Four:
        C1, D1, C2, D2 = (drawn(s, self.X, generator) for s in self._shapes())
        return C1 / self.K1**0.5, D1, C2 / self.K2**0.5, D2

    def _shapes(self) -> list[tuple[int, ...]]:
        *batch, M, N = self.X.shape
        return [(*batch, M, self.K1), (*batch, self.K1, N), (*batch, M, self.K2), (*batch, self.K2, N)]

    def given(self, start: Sequence[Tensor], what: str) -> Four:
        shapes = self._shapes()
        if [tuple(t.shape) for t in start] != shapes:
            raise StructureError(f"{what}: a start of shapes {[tuple(t.shape) for t in start]}, expected {shapes}")
        C1, D1, C2, D2 = (t.detach().to(self.X) for t in start)
        return C1 / self.size, D1, C2, D2

    def result(self, f: Four, trace: Tensor, done: bool, A: Tensor) -> HadamardFactors:
        f = balanced((f[0] * self.size, *f[1:]))
        C1, D1, C2, D2 = (narrowed(t, A) for t in f)
        return HadamardFactors(C1, D1, C2, D2, trace * self.unit, done)


def balanced(f: Four) -> Four:
    """The same product with factors of equal norm: of all scalings the one of least sum of squares."""
    norms = torch.stack([square(t).sqrt() for t in f])
    mean = norms.clamp_min(1e-300).log().mean(0).exp()
    gain = torch.where((norms > 0).all(0), mean / norms.clamp_min(1e-300), torch.ones_like(norms))[..., None, None]
    C1, D1, C2, D2 = (t * g for t, g in zip(f, gain, strict=True))
    return C1, D1, C2, D2


@torch.no_grad()
def hadamard_als(
    A: Tensor,  # (*, M, N)
    ranks: tuple[int, int],
    weights: Tensor | None = None,  # (*, M, N)
    start: Sequence[Tensor] | None = None,
    starts: int = 1,
    ridge: float = 1e-10,
    sweeps: int = 200,
    tolerance: float = 1e-8,
    seed: int = 0,
) -> HadamardFactors:
    """Minimise sum_mn o_mn ((C1 D1)_mn (C2 D2)_mn - a_mn)^2 + l (|C1|^2 + |D1|^2 + |C2|^2 + |D2|^2) by solving for one
    factor at a time, exactly.

    With H = C2 D2 fixed, row m of C1 solves (D1 diag(o_m h_m^2) D1^T + l I) c_m = D1 (o_m * h_m * a_m), and column n of
    D1 the transposed system; then the roles change. Missing entries have weight 0. Lu 2024 and Ciaperoni et al. 2024
    descend by gradients and know no closed form; this is one, block by block. The objective never rises, from half-step
    to half-step, but sticks in local minima: take several starts, and let `hadamard_descent` polish.

    The first start is C1 D1 = the truncated singular value decomposition of rank K1 (missing entries as 0) and
    C2 D2 = 1, so that without weights the result is never worse than that of rank K1, up to the ridge. The others
    are random.

    A sweep costs 2 M N (K1^2 + K2^2) multiply-adds and (M + N) small systems for each rank.

    Args:
        ranks: (K1, K2); rank(A') <= K1 K2, with (K1 + K2) (M + N) numbers.
        weights: o_mn >= 0, broadcast to A; None for ones.
        start: (C1, D1, C2, D2) to begin with, instead of the first start.
        starts: how many; of each matrix the best is kept.
        ridge: l, of A divided by its root mean square. Above 0, since rows of zeros in H leave systems singular.
        sweeps: at most, of four half-steps each: C1, D1, D2, C2.
        tolerance: stop after a sweep that lowers the objective by no more than this share of sum_mn o_mn a_mn^2.
        seed: of the starts.

    Returns:
        The factors, of equal norms; the objective, in units of A^2, at the start and after each half-step (padded with
        its last value in a batch).

    Raises:
        StructureError: ranks that are not two whole numbers from 1 to max(M, N), weights or a start of other shapes, a
            ridge that is not above 0, counts below 1.

    Example:
        >>> A = (torch.arange(1.0, 7)[:, None] + torch.arange(5.0)) ** 2  # of rank 3, a Hadamard square of rank 2
        >>> found = hadamard_als(A, (2, 2), sweeps=500, starts=3)
        >>> bool((found.dense() - A).norm() / A.norm() < 1e-2)
        True
    """
    what = "hadamard_als"
    p = _Problem(A, ranks, weights, what)
    check_whole(starts, f"{what}: starts")
    check_whole(sweeps, f"{what}: sweeps")
    check_least(ridge, f"{what}: ridge")
    if not ridge:
        raise StructureError(f"{what}: ridge must be above 0, got {ridge!r}")
    g = torch.Generator().manual_seed(seed)
    first = p.warm(g) if start is None else p.given(start, what)
    best: tuple[Four, Tensor, Tensor] | None = None
    converged = True
    for number in range(starts):
        f, trace, done = _als(p, first if number == 0 else p.random(g), ridge, sweeps, tolerance)
        loss = trace[-1]
        if best is None:
            best, converged = (f, trace, loss), done
            continue
        longest = max(len(trace), len(best[1]))
        old, new = (torch.cat([t, t[-1:].expand(longest - len(t), *t.shape[1:])]) for t in (best[1], trace))
        better = loss < best[2]
        kept: Four = tuple(torch.where(better[..., None, None], n, o) for n, o in zip(f, best[0], strict=True))  # type: ignore[assignment]
        best = (kept, torch.where(better, new, old), torch.where(better, loss, best[2]))
        converged = done if bool(better.all()) else converged and (done or not bool(better.any()))
    assert best is not None
    return p.result(best[0], best[1], converged, A)


def _als(p: _Problem, f: Four, ridge: float, sweeps: int, tolerance: float) -> tuple[Four, Tensor, bool]:
    C1, D1, C2, D2 = balanced(f)
    trace = [p.loss((C1, D1, C2, D2), ridge)]
    done = False

    def rows(D: Tensor, H: Tensor) -> Tensor:
        return weighted_rows(D, p.o * H.square(), p.o * H * p.X, ridge)

    def columns(C: Tensor, H: Tensor) -> Tensor:
        return weighted_rows(C.mT, (p.o * H.square()).mT, (p.o * H * p.X).mT, ridge).mT

    for _ in range(sweeps):
        H = C2 @ D2
        C1 = rows(D1, H)
        trace.append(p.loss((C1, D1, C2, D2), ridge))
        D1 = columns(C1, H)
        trace.append(p.loss((C1, D1, C2, D2), ridge))
        H = C1 @ D1
        D2 = columns(C2, H)  # before C2, whose further columns the warm start leaves without rows
        trace.append(p.loss((C1, D1, C2, D2), ridge))
        C2 = rows(D2, H)
        C1, D1, C2, D2 = balanced((C1, D1, C2, D2))
        trace.append(p.loss((C1, D1, C2, D2), ridge))
        done = settled(trace, 4, p.whole, tolerance)
        if done:
            break
    return (C1, D1, C2, D2), torch.stack(trace), done


def hadamard_gradients(
    A: Tensor, C1: Tensor, D1: Tensor, C2: Tensor, D2: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of |(C1 D1) * (C2 D2) - A|^2 / 2 (weighed by entries where weights are given): with H = C2 D2 and
    E = ((C1 D1) * H - A) * H, E D1^T of C1 and C1^T E of D1, and likewise of C2 and D2.

    Example:
        >>> one = torch.ones(1, 1)
        >>> [g.item() for g in hadamard_gradients(3 * one, one, one, 2 * one, one)]
        [-2.0, -2.0, -1.0, -2.0]
    """
    H1, H2 = C1 @ D1, C2 @ D2
    E = H1 * H2 - A
    if weights is not None:
        E = weights * E
    E1, E2 = E * H2, E * H1
    return E1 @ D1.mT, C1.mT @ E1, E2 @ D2.mT, C2.mT @ E2


@torch.no_grad()
def hadamard_descent(
    A: Tensor,  # (*, M, N)
    start: Sequence[Tensor],
    weights: Tensor | None = None,  # (*, M, N)
    rate: float = 0.01,
    steps: int = 2000,
    tolerance: float = 1e-8,
) -> HadamardFactors:
    """Minimise sum_mn o_mn ((C1 D1)_mn (C2 D2)_mn - a_mn)^2 from a start: the polish after `hadamard_als`.

    Ciaperoni, Gionis and Mannila 2024: each factor moves by `rate` times its gradient divided by the gradient's norm,
    all four at once here, in units where A has root mean square 1 and the factors equal norms. A step that would raise
    the objective is not taken and halves the rate; one that is taken lengthens it by a twentieth. So the objective
    never rises.

    Args:
        start: (C1, D1, C2, D2), such as the first four of what `hadamard_als` returns.
        rate: the first length of a step, as a share of a factor's norm.
        steps: at most.
        tolerance: stop when a hundred steps lower the objective by no more than this share of sum_mn o_mn a_mn^2.

    Returns:
        The factors, of equal norms; the objective, in units of A^2, at the start and after each step.

    Raises:
        StructureError: a start or weights of other shapes, a rate that is not above 0.

    Example:
        >>> A = torch.randn(8, 8)
        >>> rough = hadamard_als(A, (2, 2), sweeps=5)
        >>> polished = hadamard_descent(A, rough[:4])
        >>> bool(polished.trace[-1] <= rough.trace[-1] + 1e-6)
        True
    """
    what = "hadamard_descent"
    if len(start) != 4 or any(t.dim() < 2 for t in start):
        raise StructureError(f"{what}: a start of four matrices, got {len(start)}")
    p = _Problem(A, (start[0].shape[-1], start[2].shape[-1]), weights, what)
    check_whole(steps, f"{what}: steps")
    check_least(rate, f"{what}: rate")
    if not rate:
        raise StructureError(f"{what}: rate must be above 0, got {rate!r}")
    f = balanced(p.given(start, what))
    loss = p.loss(f)
    trace = [loss]
    eta = torch.full_like(loss, rate)[..., None, None]
    done = False
    for step in range(steps):
        moved: list[Tensor] = []
        for t, d in zip(f, hadamard_gradients(p.X, *f, p.o), strict=True):
            length = (square(t) / square(d).clamp_min(1e-300)).sqrt()[..., None, None]
            moved.append(t - eta * length * d)
        new = p.loss(tuple(moved))  # type: ignore[arg-type]
        better = (new <= loss)[..., None, None]
        f = tuple(torch.where(better, m, t) for m, t in zip(moved, f, strict=True))  # type: ignore[assignment]
        loss, eta = torch.minimum(new, loss), torch.where(better, 1.05 * eta, 0.5 * eta)
        trace.append(loss)
        done = step % 100 == 99 and settled(trace, 100, p.whole, tolerance)
        if done:
            break
    return p.result(f, torch.stack(trace), done, A)
