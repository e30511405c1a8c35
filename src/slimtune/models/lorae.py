"""LoRAE: an autoencoder whose latent passes linear maps under a nuclear penalty, so that few directions carry it.

Shapes: B images, N latent features, R rank. M = M_l ... M_1 (N, N).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError, StructureError
from ..ops.spectral import effective_rank, nuclear_norm
from ..structures.base import check_count
from .latents import checked

__all__ = [
    "FoldReport",
    "LatentReport",
    "LoRAE",
    "LoRAELoss",
    "latent_report",
    "lorae_loss",
    "reconstruction_error",
]

STARTS: dict[str, Callable[[Tensor], Any]] = {
    "orthogonal": nn.init.orthogonal_,
    "identity": nn.init.eye_,
    "linear": lambda w: nn.init.kaiming_uniform_(w, a=5**0.5),  # torch's own for Linear
}


class LoRAE(nn.Module):
    """x -> D(M E(x)) with M = M_l ... M_1 and no bias: z = M E(x) is the latent, which `encode` returns.

    LoRAE, Tran et al. 2024 (WACV), arXiv 2310.16194: l = 1 with the penalty of `lorae_loss`. IRMAE, Jing et al. 2020,
    arXiv 2010.00679: l = 2 to 8, start="linear", no penalty. l = 0 is the plain autoencoder, to the bit.

    Args:
        encoder: E, images (B, ...) -> (B, N).
        decoder: D, (B, N) -> images (B, ...).
        latent: N.
        layers: l.
        start: what each M_j is drawn from: "orthogonal", "identity" or "linear" (torch's uniform for a Linear, that of
            both papers' code). Never zero: under M = 0 no gradient reaches the encoder.

    Raises:
        StructureError: a size that is no count; an unknown start; in the forward, an encoder that does not end in N
            features.

    Example:
        >>> model = LoRAE(nn.Linear(8, 4), nn.Linear(4, 8), latent=4)
        >>> x = torch.randn(5, 8)
        >>> torch.equal(model(x), model.decode(model.encode(x)))
        True
        >>> report = model.fold()  # M goes into the encoder
        >>> model.layers, report.rank
        (0, 4)
    """

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, latent: int, layers: int = 1, start: str = "orthogonal"
    ) -> None:
        super().__init__()
        check_count(latent, "LoRAE: latent")
        check_count(layers, "LoRAE: layers", least=0)
        if start not in STARTS:
            why = "; with M = 0 the encoder would get no gradient" if start == "zeros" else ""
            raise StructureError(f"LoRAE: no start {start!r}; there are {', '.join(STARTS)}{why}")
        self.encoder, self.decoder, self.features = encoder, decoder, latent
        self.maps = nn.ModuleList()
        like = next(encoder.parameters(), torch.empty(0))
        for _ in range(layers):
            made = nn.utils.skip_init(nn.Linear, latent, latent, bias=False, device=like.device, dtype=like.dtype)
            if not like.is_meta:
                with torch.no_grad():
                    made.weight.copy_(STARTS[start](torch.empty(latent, latent)))
            self.maps.append(made)

    @property
    def layers(self) -> int:
        """l."""
        return len(self.maps)

    @property
    def matrices(self) -> list[Tensor]:
        """M_1, ..., M_l, each (N, N), a parameter."""
        return [layer.get_parameter("weight") for layer in self.maps]

    def matrix(self) -> Tensor:
        """M = M_l ... M_1 (N, N); the identity without layers."""
        if not self.maps:
            like = next(self.encoder.parameters(), torch.empty(0))
            return torch.eye(self.features, dtype=like.dtype, device=like.device)
        M = self.matrices[0]
        for W in self.matrices[1:]:
            M = W @ M
        return M

    def encode(self, x: Tensor) -> Tensor:
        """z = M E(x): (B, N). What is decoded, and what to classify, to report on and to generate from."""
        z = self.encoder(x)
        if z.ndim != 2 or z.shape[1] != self.features:
            found = tuple(z.shape)
            raise StructureError(f"LoRAE: the encoder must return (batch, {self.features}), got {found}")
        for layer in self.maps:
            z = layer(z)
        return z

    def decode(self, z: Tensor) -> Tensor:
        """D(z)."""
        return self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:  # (B, ...) -> (B, ...)
        return self.decode(self.encode(x))

    @torch.no_grad()
    def fold(
        self,
        rank: int | None = None,
        by: str = "matrix",
        batches: Iterable[Tensor] | None = None,
        into: str | None = None,
    ) -> FoldReport:
        """Put M into the encoder's last layer, W <- M W and b <- M b, and drop the maps. Outputs stay as they are.

        With a rank, cut first: by="matrix" takes M's best approximation of rank R, P = U_R U_R^T of M's left singular
        vectors; by="pca" keeps R principal directions Q of z around its mean, z <- mean + Q Q^T (z - mean), which is
        the least change of z on those batches (the last layer needs a bias for it). N stays; arithmetic is in fp64.

        Args:
            rank: R; None folds M as it is.
            by: "matrix" or "pca".
            batches: images, for the report's errors, and for "pca".
            into: the name within the encoder of its last layer, a Linear or an ungrouped Conv2d; found by itself where
                the encoder is that layer, or Sequentials that end in it and Flatten, Identity or dropout behind it.

        Returns:
            The rank, and the mean squared error before and after where there are batches.

        Raises:
            StructureError: a rank outside 1 to N, an unknown `by`; a last layer that is not found, of another kind or
                size, or without the bias that "pca" needs. Nothing was changed.
            DataError: "pca" without batches, or batches without images.
        """
        if by not in CUTS:
            raise StructureError(f"LoRAE.fold: no cut {by!r}; there are {', '.join(CUTS)}")
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= self.features):
            raise StructureError(f"LoRAE.fold: rank must be in 1 to {self.features}, got {rank!r}")
        images = None if batches is None else list(batches)
        if rank is not None and by == "pca" and not images:
            raise DataError("LoRAE.fold: by='pca' needs batches of images")
        name, layer = self._last(into)
        before = None if images is None else reconstruction_error(self, images)
        M = self.matrix().double()
        if rank is None:
            T, shift = M, M.new_zeros(self.features)
        else:
            T, shift = CUTS[by](M, rank, None if images is None else latents(self, images).double())
        if layer.bias is None and bool(shift.any()):
            raise StructureError(f"LoRAE.fold: by='pca' needs a bias in {name}")
        W = layer.weight
        W.copy_((T @ W.double().flatten(1)).reshape(W.shape))
        if layer.bias is not None:
            layer.bias.copy_(T @ layer.bias.double() + shift)
        self.maps = nn.ModuleList()
        after = None if images is None else reconstruction_error(self, images)
        return FoldReport(self.features if rank is None else rank, before, after)

    def _last(self, into: str | None) -> tuple[str, nn.Linear | nn.Conv2d]:
        """The layer that makes the encoder's output, by name."""
        if into is None:
            name, layer = _end("encoder", self.encoder)
        elif into in (known := dict(self.encoder.named_modules())):
            name, layer = f"encoder.{into}", known[into]
        else:
            raise StructureError(f"LoRAE.fold: the encoder has no module {into!r}")
        plain = isinstance(layer, (nn.Linear, nn.Conv2d)) and isinstance(layer.weight, nn.Parameter)
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or not plain or getattr(layer, "groups", 1) != 1:
            kind = type(layer).__name__
            raise StructureError(
                f"LoRAE.fold: {name} is a {kind}; M goes into the encoder's last Linear or ungrouped Conv2d: name it "
                "with into="
            )
        if layer.weight.shape[0] != self.features:
            found = layer.weight.shape[0]
            raise StructureError(f"LoRAE.fold: {name} has {found} outputs, and the latent has {self.features}")
        return name, layer

    def extra_repr(self) -> str:
        return f"latent {self.features}, layers {self.layers}"


def _end(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The last module of nested Sequentials that does more than change the shape."""
    if not isinstance(module, nn.Sequential):
        return name, module
    passive = (nn.Flatten, nn.Identity, nn.Dropout)
    rows = [(key, child) for key, child in module.named_children() if not isinstance(child, passive)]
    if not rows:
        raise StructureError(f"LoRAE.fold: {name} holds no layer")
    key, child = rows[-1]
    return _end(f"{name}.{key}", child)


def _best(M: Tensor, rank: int, _: Tensor | None) -> tuple[Tensor, Tensor]:
    U, s, Vh = torch.linalg.svd(M)
    return (U[:, :rank] * s[:rank]) @ Vh[:rank], M.new_zeros(len(M))


def _principal(M: Tensor, rank: int, z: Tensor | None) -> tuple[Tensor, Tensor]:
    assert z is not None
    mean = z.mean(0)
    Q = torch.linalg.svd(z - mean, full_matrices=True).Vh[:rank].T if len(z) < len(M) else _axes(z - mean)[:, :rank]
    return Q @ (Q.T @ M), mean - Q @ (Q.T @ mean)


def _axes(centred: Tensor) -> Tensor:
    """Orthonormal (N, N), by falling variance."""
    return torch.linalg.svd(torch.linalg.qr(centred, mode="r").R).Vh.T


CUTS: dict[str, Callable[[Tensor, int, Tensor | None], tuple[Tensor, Tensor]]] = {"matrix": _best, "pca": _principal}


@dataclass(frozen=True)
class FoldReport:
    """What `LoRAE.fold` did: the rank kept; the mean squared error before and after, None without batches."""

    rank: int
    error_before: float | None
    error_after: float | None


Penalty = Callable[[Sequence[Tensor], Tensor], Tensor]


def _nuclear(matrices: Sequence[Tensor], z: Tensor) -> Tensor:
    return sum((nuclear_norm(M) for M in matrices), z.new_zeros(()))


def _ratio(matrices: Sequence[Tensor], z: Tensor) -> Tensor:
    return sum((_share(M) for M in matrices), z.new_zeros(()))


def _batch(_: Sequence[Tensor], z: Tensor) -> Tensor:
    return _share(z - z.mean(0))


def _share(M: Tensor) -> Tensor:
    """|M|_* / |M|_F; 0 for a zero matrix."""
    return nuclear_norm(M) / torch.linalg.matrix_norm(M).clamp_min(torch.finfo(M.dtype).tiny)


PENALTIES: dict[str, Penalty] = {"nuclear": _nuclear, "ratio": _ratio, "batch": _batch}


class LoRAELoss(NamedTuple):
    """What `lorae_loss` returns, each a scalar tensor: loss = error + weight * penalty."""

    loss: Tensor
    error: Tensor
    penalty: Tensor


def lorae_loss(
    model: LoRAE, x: Tensor, weight: float = 1e-3, penalty: str | Penalty = "nuclear", target: Tensor | None = None
) -> LoRAELoss:
    """mean (D(M E(x)) - x)^2 + lambda P, the mean over pixels and images.

    P = sum_j |M_j|_* over all l layers is LoRAE's (arXiv 2310.16194; its code penalises the first layer only).
    It has no minimiser: E -> c E, M -> M / c leaves every output as it is and divides it by c, and training uses that.
    "ratio", sum_j |M_j|_* / |M_j|_F, and "batch", |Z|_* / |Z|_F of the centred latents Z (B, N) of the batch, do not
    change under it; they lie between 1 and sqrt(N) per matrix. Without layers the first two are 0.

    The controller `NuclearNorm(["maps.*"], weight)` is the first penalty in any training loop, form="ratio" the second;
    its proximal form makes ranks that are exactly zero, which a sub-gradient does not.

    Args:
        model: the autoencoder.
        x: images, (B, ...).
        weight: lambda. At 0 the penalty is not computed, and the loss is the error to the bit.
        penalty: "nuclear", "ratio", "batch", or a function of ([M_1, ..., M_l], z (B, N)).
        target: what to reconstruct, by default x.

    Returns:
        The loss, the error and the penalty, apart: a printed error holds no penalty.

    Raises:
        StructureError: an unknown penalty; a negative weight; an output of another shape than the images'.

    Example:
        >>> model = LoRAE(nn.Linear(8, 4), nn.Linear(4, 8), latent=4, start="identity")
        >>> found = lorae_loss(model, torch.randn(5, 8), weight=0.1)
        >>> found.penalty.item(), torch.allclose(found.loss, found.error + 0.4)
        (4.0, True)
    """
    function = PENALTIES.get(penalty) if isinstance(penalty, str) else penalty
    if function is None:
        raise StructureError(f"lorae_loss: no penalty {penalty!r}; there are {', '.join(PENALTIES)}, or a function")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise StructureError(f"lorae_loss: weight must be a finite number, at least 0, got {weight!r}")
    z = model.encode(x)
    y, target = model.decode(z), x if target is None else target
    if y.shape != target.shape:
        found = f"{tuple(y.shape)} for {tuple(target.shape)}"
        raise StructureError(f"lorae_loss: the decoder must return the images' shape, got {found}")
    error = F.mse_loss(y, target)
    if not weight:
        return LoRAELoss(error, error, z.new_zeros(()))
    value = function(model.matrices, z)
    return LoRAELoss(error + weight * value, error, value)


@torch.no_grad()
def latents(model: LoRAE, batches: Iterable[Tensor]) -> Tensor:
    """z = M E(x) of all images, (B, N), in evaluation mode."""
    return torch.cat(_evaluated(model, batches, model.encode))


@torch.no_grad()
def reconstruction_error(model: LoRAE, batches: Iterable[Tensor]) -> float:
    """Mean of (D(M E(x)) - x)^2 over all pixels of all images, in evaluation mode.

    Args:
        model: the autoencoder; its mode is put back.
        batches: images, (B, ...) each.

    Raises:
        DataError: no images.

    Example:
        >>> model = LoRAE(nn.Identity(), nn.Identity(), latent=3, start="identity")
        >>> reconstruction_error(model, [torch.randn(5, 3), torch.randn(2, 3)])
        0.0
    """
    rows = _evaluated(model, batches, lambda x: ((model(x) - x).double().square().sum().item(), x.numel()))
    return sum(total for total, _ in rows) / sum(count for _, count in rows)


def _evaluated(model: nn.Module, batches: Iterable[Tensor], function: Callable[[Tensor], Any]) -> list[Any]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        rows = [function(x) for x in batches if len(x)]
    finally:
        for module, mode in modes:
            module.training = mode
    if not rows:
        raise DataError("LoRAE: expected batches of images, got none")
    return rows


@dataclass(frozen=True)
class LatentReport:
    """What `latent_report` found.

    Attributes:
        eigenvalues: of the covariance of z over the largest, falling, (N,).
        above: how many of them exceed each threshold.
        latent_rank: effective rank of the square roots of these eigenvalues, the singular values of the centred z.
        singular_values: of M, falling.
        matrix_rank: how many of those exceed `matrix_threshold` times the largest. Sub-gradients under Adam leave none
            at zero: a rank is one at a threshold.
        matrix_threshold: 1e-6 by default.
        matrix_effective_rank: effective rank of M.
        penalties: sum_j |M_j|_* and sum_j |M_j|_* / |M_j|_F.
        encoder_scale: the standard deviation of E(x) over images and features. It grows where a nuclear penalty is
            escaped by scale.
    """

    eigenvalues: list[float]
    above: dict[float, int]
    latent_rank: float
    singular_values: list[float]
    matrix_rank: int
    matrix_threshold: float
    matrix_effective_rank: float
    penalties: dict[str, float]
    encoder_scale: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON file; thresholds as text."""
        return asdict(self) | {"above": {f"{t:g}": count for t, count in self.above.items()}}

    def __str__(self) -> str:
        counts = ", ".join(f"{count} above {t:g}" for t, count in self.above.items())
        return (
            f"latent: {counts} of {len(self.eigenvalues)} eigenvalues, effective rank {self.latent_rank:.2f}; "
            f"M: rank {self.matrix_rank} at {self.matrix_threshold:g}, effective rank "
            f"{self.matrix_effective_rank:.2f}, nuclear norm {self.penalties['nuclear']:.4g}; "
            f"encoder scale {self.encoder_scale:.3g}"
        )


@torch.no_grad()
def latent_report(
    model: LoRAE,
    batches: Iterable[Tensor],
    thresholds: Sequence[float] = (1e-2, 1e-4),
    matrix_threshold: float = 1e-6,
) -> LatentReport:
    """How many directions the latent of these images uses, in numbers.

    Args:
        model: the autoencoder.
        batches: images, (B, ...) each; held-out ones.
        thresholds: shares of the largest eigenvalue of cov(z).
        matrix_threshold: share of M's largest singular value.

    Raises:
        DataError: fewer than two images, or latents that are not finite.

    Example:
        >>> model = LoRAE(nn.Identity(), nn.Identity(), latent=3, start="identity")
        >>> x = torch.randn(500, 3) * torch.tensor([1.0, 1.0, 0.02])
        >>> report = latent_report(model, [x])
        >>> report.above, report.matrix_rank
        ({0.01: 2, 0.0001: 3}, 3)
    """
    both = _evaluated(model, batches, lambda x: (model.encoder(x), model.encode(x)))
    raw, z = (checked(torch.cat(part), "latent_report") for part in zip(*both, strict=True))
    s = torch.linalg.svdvals(z - z.mean(0))
    values = F.pad(s, (0, max(0, model.features - len(s)))).square()
    shares = values / values.max().clamp_min(torch.finfo(values.dtype).tiny)
    own = torch.linalg.svdvals(model.matrix().double()).cpu()
    matrices = [M.cpu().double() for M in model.matrices]
    return LatentReport(
        eigenvalues=shares.tolist(),
        above={t: int((shares > t).sum()) for t in thresholds},
        latent_rank=effective_rank(s),
        singular_values=own.tolist(),
        matrix_rank=int((own > matrix_threshold * own.max()).sum()),
        matrix_threshold=matrix_threshold,
        matrix_effective_rank=effective_rank(own),
        penalties={name: float(PENALTIES[name](matrices, z)) for name in ("nuclear", "ratio")},
        encoder_scale=float(raw.std()),
    )
