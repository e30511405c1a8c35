"""The networks of the LoRAE paper, the head that classifies their latents, and their images as pixels.

As in the code of arXiv 2310.16194. Shapes: B images, N latent features.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from ..errors import DataError, StructureError
from ..structures.base import check_count
from .lorae import LoRAE

__all__ = ["lorae_64", "lorae_head", "lorae_mnist", "lorae_shapes", "to_pixels"]

OUTPUTS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "identity": nn.Identity}


def to_pixels(images: Tensor) -> Tensor:
    """uint8 of images whose targets were in [0, 1]: round(255 * clip(x, 0, 1)).

    Clipped before the cast: uint8 of a slightly negative value wraps round to about 255 (as in the published colour
    samples, arXiv 2310.16194's code, with tanh outputs).

    Raises:
        DataError: a value that is not finite.

    Example:
        >>> to_pixels(torch.tensor([-0.01, 0.5, 1.2])).tolist()
        [0, 128, 255]
    """
    if not bool(images.isfinite().all()):
        raise DataError(f"to_pixels: {int((~images.isfinite()).sum())} values are not finite")
    return (images.detach().clamp(0, 1) * 255).round().to(torch.uint8)


def lorae_mnist(
    latent: int = 128,
    layers: int = 1,
    start: str = "orthogonal",
    output: str = "tanh",
    width: int = 32,
    channels: int = 1,
) -> LoRAE:
    """The paper's model for MNIST and FashionMNIST padded to (B, 1, 32, 32), values in [0, 1]. LoRAE's code, width 32.

    Encoder: convolutions 4 x 4, stride 2, to w, 2w, 4w, 8w channels, ReLU after each, linear to N. Decoder: linear to
    (4w, 8, 8), ReLU, transposed convolutions 4 x 4, stride 2, to 2w, w, ReLU, 1 x 1 to the image.

    Args:
        latent: N.
        layers: l.
        start: of each M_j.
        output: what the decoder ends in. "tanh" is the published one, for targets in [0, 1]: a black background is
            where it is steep, and what falls below 0 is clipped by `to_pixels`. "sigmoid" cannot leave [0, 1], but is
            flat at black: on mostly black images it can end there for good at Adam's usual rates. "identity".
        width: w.
        channels: of the images.

    Raises:
        StructureError: a size that is no count; an unknown start or output.

    Example:
        >>> model = lorae_mnist(latent=16, width=4)
        >>> tuple(model.encode(torch.zeros(2, 1, 32, 32)).shape), tuple(model(torch.zeros(2, 1, 32, 32)).shape)
        ((2, 16), (2, 1, 32, 32))
    """
    w = _sizes("lorae_mnist", latent, output, width, channels)
    encoder = nn.Sequential(*_down(channels, w, 2 * w, 4 * w, 8 * w), nn.Flatten(), nn.Linear(32 * w, latent))
    decoder = nn.Sequential(
        nn.Linear(latent, 256 * w),
        nn.ReLU(),
        nn.Unflatten(1, (4 * w, 8, 8)),
        *_up(4 * w, 2 * w, w),
        nn.ConvTranspose2d(w, channels, 1),
        OUTPUTS[output](),
    )
    return LoRAE(encoder, decoder, latent, layers, start)


def lorae_64(
    latent: int = 256,
    layers: int = 1,
    start: str = "orthogonal",
    output: str = "tanh",
    width: int = 128,
    channels: int = 3,
) -> LoRAE:
    """The paper's model for CelebA, Intel and CIFAR-10 at (B, 3, 64, 64), values in [0, 1]. LoRAE's code, width 128.

    Encoder: convolutions 4 x 4, stride 2, to w, 2w, 4w, 8w channels, ReLU after each, linear to N. Decoder: linear to
    (8w, 8, 8), transposed convolutions 4 x 4, stride 2, to 4w, 2w, w, ReLU after each, 1 x 1 to the image.

    Args and errors are those of `lorae_mnist`.

    Example:
        >>> tuple(lorae_64(latent=16, width=4)(torch.zeros(2, 3, 64, 64)).shape)
        (2, 3, 64, 64)
    """
    w = _sizes("lorae_64", latent, output, width, channels)
    encoder = nn.Sequential(*_down(channels, w, 2 * w, 4 * w, 8 * w), nn.Flatten(), nn.Linear(128 * w, latent))
    decoder = nn.Sequential(
        nn.Linear(latent, 512 * w),
        nn.Unflatten(1, (8 * w, 8, 8)),
        *_up(8 * w, 4 * w, 2 * w, w),
        nn.ConvTranspose2d(w, channels, 1),
        OUTPUTS[output](),
    )
    return LoRAE(encoder, decoder, latent, layers, start)


def lorae_shapes(
    latent: int = 32,
    layers: int = 1,
    start: str = "orthogonal",
    output: str = "tanh",
    width: int = 32,
    channels: int = 3,
) -> LoRAE:
    """The paper's model for its coloured shapes at (B, 3, 32, 32), values in [0, 1]. LoRAE's code, width 32.

    Encoder: convolutions 4 x 4, stride 2, to w, 2w, 4w, 8w channels, ReLU after each, a convolution 2 x 2 to N. The
    decoder mirrors it with transposed convolutions.

    Args and errors are those of `lorae_mnist`.

    Example:
        >>> tuple(lorae_shapes(latent=16, width=4)(torch.zeros(2, 3, 32, 32)).shape)
        (2, 3, 32, 32)
    """
    w = _sizes("lorae_shapes", latent, output, width, channels)
    encoder = nn.Sequential(*_down(channels, w, 2 * w, 4 * w, 8 * w), nn.Conv2d(8 * w, latent, 2), nn.Flatten())
    decoder = nn.Sequential(
        nn.Unflatten(1, (latent, 1, 1)),
        nn.ConvTranspose2d(latent, 8 * w, 2),
        nn.ReLU(),
        *_up(8 * w, 4 * w, 2 * w, w),
        nn.ConvTranspose2d(w, channels, 4, 2, 1),
        OUTPUTS[output](),
    )
    return LoRAE(encoder, decoder, latent, layers, start)


def _sizes(name: str, latent: int, output: str, width: int, channels: int) -> int:
    counts = {"latent": latent, "width": width, "channels": channels}
    for what, count in counts.items():
        check_count(count, f"{name}: {what}")
    if output not in OUTPUTS:
        raise StructureError(f"{name}: no output {output!r}; there are {', '.join(OUTPUTS)}")
    return width


def _down(*channels: int) -> list[nn.Module]:
    pairs = itertools.pairwise(channels)
    return [module for a, b in pairs for module in (nn.Conv2d(a, b, 4, 2, 1), nn.ReLU())]


def _up(*channels: int) -> list[nn.Module]:
    pairs = itertools.pairwise(channels)
    return [module for a, b in pairs for module in (nn.ConvTranspose2d(a, b, 4, 2, 1), nn.ReLU())]


def lorae_head(latent: int, classes: int = 10, dropout: float = 0.5) -> nn.Sequential:
    """(Linear N -> N, ReLU, dropout) twice, Linear N -> classes: what LoRAE's code trains on frozen latents, by Adam.

    Give it `model.encode(x)`, z = M E(x). The published code gave it E(x), from before M: not the low-rank latent.

    Example:
        >>> tuple(lorae_head(16)(torch.zeros(2, 16)).shape)
        (2, 10)
    """
    check_count(latent, "lorae_head: latent")
    check_count(classes, "lorae_head: classes")
    hidden = [m for _ in range(2) for m in (nn.Linear(latent, latent), nn.ReLU(), nn.Dropout(dropout))]
    return nn.Sequential(*hidden, nn.Linear(latent, classes))
