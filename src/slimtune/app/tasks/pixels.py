"""Images to tensors: decoding, size, normalisation, and augmentation that a resumed run repeats exactly."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimtune.app.tables import Table
from slimtune.errors import ConfigError, DataError

SHIFT = 4  # pixels
Array = np.ndarray[Any, Any]


class Pixels(torch.utils.data.Dataset[tuple[Array, int, tuple[int, int] | None]]):
    """(image uint8 (H, W, C), label, (epoch, row) or None) of each row; files are decoded when asked for.

    Args:
        size: edge in pixels to bring every image to (shorter edge scaled, centre kept); None: as they are.
        channels: 1 or 3 to convert to; None: as they are (files: 3).
        training: hand out (epoch, row), from which the collator draws its augmentation.
    """

    def __init__(
        self,
        table: Table,
        column: str,
        labels: Sequence[int],
        size: int | None = None,
        channels: int | None = None,
        training: bool = False,
    ):
        self.table, self.cells, self.labels = table, table.columns[column], labels
        self.size, self.channels, self.training = size, channels, training
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.table)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, i: int) -> tuple[Array, int, tuple[int, int] | None]:
        cell = self.cells[i if self.table.index is None else self.table.index[i]]
        image = fit(decode(cell, self.table.where(i), self.channels), self.size, self.channels)
        return image, self.labels[i], (self.epoch, i) if self.training else None


def decode(cell: Any, where: str, channels: int | None = None) -> Array:
    """An array, file path, encoded bytes, {"bytes", "path"} or PIL image as uint8 (H, W, C).

    Raises:
        DataError: not an image, or a file that is missing or damaged, with its row.
    """
    if isinstance(cell, np.ndarray):
        return cell
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ConfigError("decoding images needs Pillow: pip install 'slimtune[hf]'") from error
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    try:
        if isinstance(cell, str):
            beside = Path(where.rsplit(":", 1)[0]).parent / cell
            cell = Image.open(cell if Path(cell).exists() else beside)
        elif isinstance(cell, bytes):
            cell = Image.open(io.BytesIO(cell))
        if not isinstance(cell, Image.Image):
            raise DataError(f"{where}: expected an image, found {type(cell).__name__}")
        pixels = np.asarray(cell.convert("L" if channels == 1 else "RGB"))
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise DataError(f"{where}: not a readable image ({error})") from error
    return pixels if pixels.ndim == 3 else pixels[..., None]


def fit(image: Array, size: int | None, channels: int | None) -> Array:
    """uint8 (H, W, C) -> uint8 (size, size, channels)."""
    height, width, depth = image.shape
    if channels is not None and depth != channels and 1 in (depth, channels):
        image = np.repeat(image, channels, 2) if depth == 1 else image.mean(2, keepdims=True).astype(np.uint8)
    if size is None or (height, width) == (size, size):
        return image
    from PIL import Image

    scale = size / min(height, width)
    new = (max(size, round(width * scale)), max(size, round(height * scale)))
    planes = [
        np.asarray(Image.fromarray(image[..., c]).resize(new, Image.Resampling.BICUBIC)) for c in range(image.shape[2])
    ]
    top, left = (new[1] - size) // 2, (new[0] - size) // 2
    return np.stack(planes, -1)[top : top + size, left : left + size]


class ImageCollator:
    """Rows to pixel_values (B, C, H, W) = (pixels / 255 - mean) / std in fp32, and labels (B).

    With `augment`, training images are mirrored with probability 1/2 and shifted by -4..4 pixels each way over a
    black border. The draws are a function of (seed, epoch, row) alone, so neither workers nor a resume change them.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], augment: bool = False, seed: int = 0):
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)
        self.augment, self.seed = augment, seed

    def __call__(self, rows: list[tuple[Array, int, tuple[int, int] | None]]) -> dict[str, Tensor]:
        images, labels, draws = zip(*rows, strict=True)
        if len(shapes := {image.shape for image in images}) > 1:
            raise DataError(f"images of different sizes in one batch: {sorted(shapes)}; the model takes one size")
        batch = np.stack(images)
        if self.augment and draws[0] is not None:
            batch = shift_and_flip(batch, hashes(self.seed, np.asarray(draws, np.uint64)))
        pixels = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))).float().div_(255)
        pixels.sub_(self.mean.view(-1, 1, 1)).div_(self.std.view(-1, 1, 1))
        return {"pixel_values": pixels, "labels": torch.tensor(labels)}


def hashes(seed: int, draws: Array) -> Array:
    """64 mixed bits (splitmix64) for each (epoch, row) of `draws` (B, 2) uint64."""

    def mix(x: Array) -> Array:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    step = np.uint64(0x9E3779B97F4A7C15)
    state = mix(np.full(len(draws), seed, np.uint64) + step)
    for column in draws.T:
        state = mix(state * step + column + np.uint64(1))
    return state


def shift_and_flip(images: Array, bits: Array) -> Array:
    """Mirrored and shifted copies of (B, H, W, C) images, drawn from 64 bits each."""
    batch, height, width, _ = images.shape
    reach = np.uint64(2 * SHIFT + 1)
    down = ((bits >> np.uint64(8)) % reach).astype(np.int64)
    right = ((bits >> np.uint64(32)) % reach).astype(np.int64)
    rows = down[:, None] + np.arange(height)
    columns = np.arange(width) + right[:, None]
    flipped = (bits & np.uint64(1)).astype(bool)
    columns[flipped] = columns[flipped, ::-1]
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)))
    return padded[np.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]
