"""Factors by the principal directions of a layer's outputs on calibration data.

Shapes: O out, I in, R rank, G groups, K = min(O / G, I). x the inputs of a layer (patches of a convolution), C their
covariance, y = W x + b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import StructureError
from ..ops.moments import Moments
from ..ops.svd import truncated_svd
from ..structures import Structure
from .base import Part, Replacement, factors, in_form, matrices, thin, thin_sizes

__all__ = ["LayerMoments", "Principal", "afm"]


@dataclass(frozen=True)
class LayerMoments:
    """What calibration keeps of a layer.

    Attributes:
        side: "input", the moments of x: (I,), or (G, I) of a convolution; or "output", those of y with its bias: (O,),
            or (G, O / G) of a convolution.
        moments: count, mean, M2.
    """

    side: str
    moments: Moments

    def to(self, device: torch.device | str) -> LayerMoments:
        """The same on another device."""
        return LayerMoments(self.side, self.moments.to(device))


@dataclass(frozen=True)
class Principal:
    """A layer's principal output directions, which is all that AFM needs of its moments.

    Attributes:
        U: (G, O / G, K), orthonormal columns, the most energetic first.
        errors: (K + 1,), in fp64: E|y - y'|^2 a row at ranks 0 to K, exact and without a forward pass.
        energy: E|y - E y|^2, of which they are shares.
        mean: (O,): E[W x].
        mark: of the weight, by which a stale one is found.
    """

    U: Tensor
    errors: Tensor
    energy: float
    mean: Tensor
    mark: tuple[float, ...]


@factors
@dataclass(frozen=True)
class afm:
    """The rank-R affine map nearest to a layer on calibration data, in the output: LORD, one-shot, no training.

    B = U_R, A = U_R^T W and b' = b + (1 - U_R U_R^T) E[W x], U_R the leading eigenvectors of Cov(y) = W C W^T. No map
    of rank R has less E|y - y'|^2, which is the sum of the eigenvalues beyond R; the mean output is met exactly.
    Kaushal et al. 2023, "LORD", arXiv 2309.14021, after Yu and Wu 2023, "Compressing transformers: features are
    low-rank, but weights are not". From moments of the inputs U_R are left singular vectors of W Q sqrt(omega),
    C = Q diag(omega) Q^T: the same projector, nothing is inverted, and C may be singular.

    Args:
        moments: {layer: what `st.calibrate.moments` keeps}.
        centred: False for the second moment in the place of the covariance, b' = b: needs no bias, and is what
            SVD-LLM, Wang et al. 2024, arXiv 2403.07378, computes by a Cholesky factor. Never better on the
            calibration data.
        add_bias: False for layers without a bias to stay so, by the uncentred form.
        form: of convolutions: "channel", a thinner convolution and a pointwise one; "spatial", a vertical and a
            horizontal one (our reading, not the least possible error): A by the principal directions of the outputs
            that each kernel column alone gives, or by the SVD of the weight where that is better, B by least squares
            on whole patches; needs moments of the inputs.

    Raises:
        StructureError: an unknown form; a layer without moments, or with moments of the output for the spatial form.

    Example:
        >>> x = torch.randn(100, 3) * torch.tensor([3.0, 1.0, 0.0]) + 5
        >>> part = Part("layer", torch.eye(3), torch.zeros(3))
        >>> make = afm({"layer": LayerMoments("input", Moments.of(x))})
        >>> structure, bias = make(part, 2)
        >>> torch.allclose(structure(x) + bias, x, atol=1e-4), make.predicted(part, 2) < 1e-6
        (True, True)
    """

    moments: Mapping[str, LayerMoments | Principal] = field(default_factory=dict)
    centred: bool = True
    add_bias: bool = True
    form: str = "channel"
    _found: dict[str, Principal] = field(default_factory=dict, init=False, repr=False, compare=False)
    _root: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        in_form(Part("", torch.zeros(1, 1)), self.form)

    def __call__(self, part: Part, rank: int) -> Replacement:
        if in_form(part, self.form) == "spatial":
            structure, mean = self._spatial(part, rank)
        else:
            found = self.principal(part, rank)
            U = found.U[..., :rank].to(part.W)
            structure, mean = thin(part, U, U.mT @ matrices(part)), found.mean
            mean = mean - (found.U[..., :rank] @ (found.U[..., :rank].mT @ _split(mean, part))).flatten()
        if not self.is_centred(part):
            return Replacement(structure)
        b = part.W.new_zeros(len(part.W)) if part.bias is None else part.bias
        return Replacement(structure, (b + mean).to(b))

    def sizes(self, part: Part) -> tuple[float, int]:
        """(numbers that one rank takes, the largest rank below the break-even), a bias that is added counted."""
        per_rank, largest = thin_sizes(part, self.form)
        room = part.W.numel() - self.added(part)
        return per_rank, min(largest, max(0, int(-(-room // per_rank)) - 1))

    def added(self, part: Part) -> int:
        """Numbers of a bias that the layer does not have yet."""
        return len(part.W) if part.bias is None and self.is_centred(part) else 0

    def is_centred(self, part: Part) -> bool:
        """Whether this layer's mean is put into its bias."""
        return self.centred and (self.add_bias or part.bias is not None)

    def errors(self, part: Part) -> Tensor:
        """E|y - y'|^2 a row at ranks 0, 1, ..., in fp64: the tails of the eigenvalues."""
        return self._spatial_errors(part) if in_form(part, self.form) == "spatial" else self.principal(part).errors

    def predicted(self, part: Part, rank: int) -> float:
        """E|y - y'|^2 a row at this rank, before any forward pass; over `energy`, a share of the output's variance."""
        errors = self.errors(part)
        if rank >= len(errors) and in_form(part, self.form) == "channel":
            errors = self.principal(part, rank).errors
        return float(errors[min(rank, len(errors) - 1)])

    def energy(self, part: Part) -> float:
        """E|y - E y|^2 a row."""
        if in_form(part, self.form) == "channel":
            return self.principal(part).energy
        W, m = part.W.double(), self._input(part)
        return float(((W @ m.covariance()) * W).sum())

    # ------------------------------------------------------------ channel

    def principal(self, part: Part, rank: int = 0) -> Principal:
        """The directions of a layer, at least `rank` of them and as many as can help; kept, for they are dear."""
        rank = min(max(rank, self.sizes(part)[1], 1), *matrices(part).shape[1:])
        mark = (float(part.W.double().sum()), float(part.W.double().square().sum()), float(self.is_centred(part)))
        known: Any = self._found.get(part.name) or self.moments.get(part.name)
        if isinstance(known, Principal) and known.mark == mark and known.U.shape[-1] >= rank:
            return known
        entry = self.moments.get(part.name)
        if isinstance(entry, Principal):
            raise StructureError(
                f"afm: the directions of {part.name!r} were found for another weight, or {entry.U.shape[-1]} of them "
                f"where {rank} are wanted; calibrate again"
            )
        found = self._found[part.name] = self._principal(part, self._entry(part), rank, mark)
        return found

    def _principal(self, part: Part, entry: LayerMoments, rank: int, mark: tuple[float, ...]) -> Principal:
        W, m, centred = matrices(part).double(), entry.moments.to(part.W.device), self.is_centred(part)
        b = 0 if part.bias is None else part.bias.double()
        m2 = m.covariance()
        mean = m.mean.flatten() - b if entry.side == "output" else (W @ _split(m.mean, part)).flatten()
        if entry.side == "output":
            energy = float(m2.diagonal(dim1=-2, dim2=-1).sum())
            out = m2.view(len(W), *m2.shape[-2:])
            if not centred:
                shift = _split(mean, part)
                out = out + shift @ shift.mT
            values, U = torch.linalg.eigh(out)
            values, U = values.flip(-1).clamp(min=0), U.flip(-1)
            errors = _tails(values.sum(0))[: rank + 1]
        else:
            energy = float(((W @ m2.view(len(W), *m2.shape[-2:])) * W).sum())
            parts = [truncated_svd(M @ root, rank)[:2] for M, root in zip(W, self._roots(m, centred), strict=True)]
            U = torch.stack([u for u, _ in parts])
            values = torch.stack([s for _, s in parts]).square()
            total = energy if centred else energy + float(mean.square().sum())
            left = max(0.0, total - float(values.sum())) if rank < min(W.shape[1:]) else 0.0
            errors = _tails(values.sum(0)) + left
        return Principal(U[..., :rank].to(part.W).contiguous(), errors, energy, mean.to(part.W), mark)

    def _entry(self, part: Part) -> LayerMoments:
        entry = self.moments.get(part.name)
        if not isinstance(entry, LayerMoments):
            raise StructureError(f"afm: no moments of layer {part.name!r}; st.calibrate.moments keeps those of targets")
        O, I = part.W.shape
        want = I if entry.side == "input" else O // part.groups
        if entry.moments.mean.shape[-1] != want:
            raise StructureError(
                f"afm: moments of the {entry.side} of {part.name!r} are of {entry.moments.mean.shape[-1]} numbers, "
                f"expected {want}"
            )
        return entry

    def _roots(self, m: Moments, centred: bool) -> Tensor:
        """Q sqrt(omega), (G, I, I), of the moments; the last is kept, for layers that share them come together."""
        if not (self._root and self._root[0] is m.M2 and self._root[1] == centred):
            self._root[:] = [m.M2, centred, _root(m.covariance() if centred else m.second())]
        root = self._root[2]
        return root.view(-1, *root.shape[-2:])

    # ------------------------------------------------------------ spatial

    def _input(self, part: Part) -> Moments:
        entry = self._entry(part)
        if entry.side != "input":
            raise StructureError(
                f"afm: the spatial form of {part.name!r} needs moments of its input; calibrate with side='input'"
            )
        return entry.moments.to(part.W.device)

    def _vertical(self, part: Part) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Candidates, [A (K, C h), the features Z sqrt(C) that its rows give, (K, w, I)], and W sqrt(C), (O, I).

        The second A is that of the plain SVD, so that the error is never above that one's.
        """
        m, I, w = self._input(part), part.W.shape[1], part.kernel[1]
        C = (m.covariance() if self.is_centred(part) else m.second()).view(I, I)
        column = C.view(I // w, w, I // w, w).diagonal(dim1=1, dim2=3).sum(-1)
        M, root = matrices(part, "spatial")[0].double(), _root(C)
        U = truncated_svd(M.t() @ _root(column), min(M.shape))[0]
        rows = (U.t() @ M.t(), truncated_svd(M, min(M.shape))[0].t())
        features = root.view(I // w, w, I)
        return [(A, torch.einsum("kc,cjd->kjd", A, features)) for A in rows], part.W.double() @ root

    def _spatial(self, part: Part, rank: int) -> tuple[Structure, Tensor]:
        """The structure, and (W - W') E[x]."""
        (O, I), w = part.W.shape, part.kernel[1]
        candidates, target = self._vertical(part)
        best: tuple[float, Tensor, Tensor] | None = None
        for A, Z in candidates:
            Z = Z[:rank].reshape(-1, I)
            B = target @ torch.linalg.pinv(Z, rtol=1e-10)  # (O, R w)
            error = float((target - B @ Z).square().sum())
            if best is None or error < best[0]:
                best = error, A[:rank], B
        assert best is not None
        _, A, B = best
        right = B.view(O, len(A), w).permute(1, 0, 2).reshape(1, len(A), O * w)
        structure = thin(part, A.t()[None].to(part.W), right.to(part.W), "spatial")
        mean = self._input(part).mean.flatten()
        return structure, (part.W.double() - structure.dense().double()) @ mean

    def _spatial_errors(self, part: Part) -> Tensor:
        candidates, target = self._vertical(part)
        return torch.stack([_left_over(Z, target) for _, Z in candidates]).amin(0).cpu()


def _left_over(Z: Tensor, target: Tensor) -> Tensor:
    """|.|^2 of what is left of target (O, I) when the features Z (K, w, I) are projected out, one k after another."""
    errors, Q = [target.square().sum()], Z.new_zeros(0, Z.shape[-1])
    least = 1e-10 * float(Z.norm())
    for block in Z:
        for _ in range(2):  # once more for what rounding left
            block = block - (block @ Q.t()) @ Q
        _, s, V = torch.linalg.svd(block, full_matrices=False)
        new = V[s > least]
        Q = torch.cat([Q, new])
        target = target - (target @ new.t()) @ new
        errors.append(target.square().sum())
    return torch.stack(errors)


def _split(v: Tensor, part: Part) -> Tensor:
    """(G, D, 1) of a vector of all groups."""
    return v.reshape(part.groups, -1, 1)


def _tails(values: Tensor) -> Tensor:
    """(K + 1,): sum_{j > R} of falling values (K,), R from 0 to K."""
    return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)]).cpu()


def _root(C: Tensor) -> Tensor:
    """Q sqrt(omega) of C = Q diag(omega) Q^T, rounding's negative values being 0."""
    omega, Q = torch.linalg.eigh(C)
    return Q * omega.clamp(min=0).sqrt()[..., None, :]
