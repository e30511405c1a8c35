"""Train LoRAE on coloured shapes made here, or on MNIST; report, pictures and a model file.

    python examples/lorae.py                                             # shapes, a few minutes on one core
    python examples/prepare_data.py FOLDER mnist
    python examples/lorae.py --data mnist --latent 64 --penalty ratio --weight 1e-2
    python examples/lorae.py --layers 4 --start linear --weight 0        # IRMAE
    python examples/lorae.py --layers 0                                  # a plain autoencoder

Generators are fitted on the training images; errors, ranks and distances are of the test images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import slimtune as st

HERE = Path(__file__).parent
BATCH = 500  # where nothing is trained


def shapes(count: int, seed: int) -> Tensor:
    """(count, 3, 32, 32) in [0, 1]: a circle or a square on black, as LoRAE's. Centre U{8..24} squared, size (radius,
    half the side) U{3..8}, colour U[0, 1]^3: seven numbers say all of an image."""
    draw = torch.Generator().manual_seed(seed)
    centre = torch.randint(8, 25, (count, 2, 1, 1), generator=draw)
    size = torch.randint(3, 9, (count, 1, 1), generator=draw)
    colour = torch.rand(count, 3, 1, 1, generator=draw)
    square = torch.randint(2, (count, 1, 1), generator=draw).bool()
    line = torch.arange(32)
    dy, dx = (line[:, None] - centre[:, 0]).abs(), (line - centre[:, 1]).abs()
    inside = torch.where(square, torch.maximum(dy, dx) <= size, dy**2 + dx**2 <= size**2)
    return inside[:, None] * colour


def mnist(path: Path = HERE / "data" / "mnist.npz") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (20,000, 1, 32, 32) in [0, 1], padded by two pixels, and labels; test images and labels."""
    import numpy as np

    with np.load(path) as archive:
        keys = ("train_images", "train_labels", "test_images", "test_labels")
        parts = [torch.from_numpy(archive[key]) for key in keys]
    images = [F.pad(x[:, None].float() / 255, (2, 2, 2, 2)) for x in parts[::2]]
    return images[0], parts[1].long(), images[1], parts[3].long()


def train(
    model: st.LoRAE,
    images: Tensor,
    epochs: int,
    seed: int,
    lr: float = 1e-3,
    batch_size: int = 50,
    weight: float = 1e-3,
    penalty: str = "nuclear",
    step: Callable[[], object] = lambda: None,
) -> list[tuple[float, float]]:
    """Adam on shuffled batches; (error, penalty) of each epoch, means over its steps. `step` is called after each."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    draw = torch.Generator().manual_seed(seed)
    history = []
    for _ in range(epochs):
        seen = []
        for rows in torch.randperm(len(images), generator=draw).split(batch_size):
            found = st.lorae_loss(model, images[rows], weight, penalty)
            optimizer.zero_grad()
            found.loss.backward()
            optimizer.step()
            seen.append((found.error.item(), found.penalty.item()))
            step()
        history.append((sum(e for e, _ in seen) / len(seen), sum(p for _, p in seen) / len(seen)))
    return history


@torch.no_grad()
def encoded(model: st.LoRAE, images: Tensor) -> Tensor:
    """z = M E(x), (B, N)."""
    return torch.cat([model.encode(x) for x in images.split(BATCH)])


@torch.no_grad()
def decoded(model: st.LoRAE, z: Tensor) -> Tensor:
    """Images, clipped to [0, 1]."""
    return torch.cat([model.decode(part).clamp(0, 1) for part in z.split(BATCH)])


Pairs = tuple[Tensor, Tensor]


def few_labels(model: st.LoRAE, train: Pairs, test: Pairs, per_class: int, seed: int) -> float:
    """Test accuracy of LoRAE's head, Adam 1e-3, 500 epochs, on the frozen z of the first images of each class."""
    images, labels = train
    rows = torch.cat([(labels == c).nonzero()[:per_class, 0] for c in range(10)])
    z, known = encoded(model, images[rows]), labels[rows]
    torch.manual_seed(seed)
    head = st.lorae_head(z.shape[1])
    optimizer = torch.optim.Adam(head.parameters(), 1e-3)
    for _ in range(500):
        for part in torch.randperm(len(z)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(head(z[part]), known[part]).backward()
            optimizer.step()
    head.eval()
    with torch.no_grad():
        return (head(encoded(model, test[0])).argmax(1) == test[1]).double().mean().item()


def save_sheet(path: Path, rows: Tensor, scale: int = 2) -> None:
    """A picture of (R, C, channels, H, W) in [0, 1], row by row."""
    from matplotlib.image import imsave

    R, C, channels, H, W = rows.shape
    framed = F.pad(st.to_pixels(rows), (1, 1, 1, 1), value=255)
    sheet = framed.permute(0, 3, 1, 4, 2).reshape(R * (H + 2), C * (W + 2), channels).expand(-1, -1, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, sheet.repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy())


def save_spectra(path: Path, reports: dict[str, dict[str, Any]]) -> None:
    """Eigenvalues of cov(z) and singular values of M, over the largest, of one model or several."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, report in reports.items():
        values, own = report["eigenvalues"], report["singular_values"]
        left.semilogy(range(1, len(values) + 1), [max(v, 1e-12) for v in values], label=name)
        right.semilogy(range(1, len(own) + 1), [max(s / own[0], 1e-12) for s in own], label=name)
    left.set(title="eigenvalues of cov(z) on test images", xlabel="index", ylabel="over the largest", ylim=(1e-8, 2))
    right.set(title="singular values of M", xlabel="index", ylim=(1e-8, 2))
    left.axhline(1e-2, color="grey", linewidth=0.8, linestyle=":")
    if len(reports) > 1:
        left.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def pictures(prefix: str, model: st.LoRAE, train: Tensor, test: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Write {prefix}interpolation.png, -samples, -pca; the generators' draws as images, by name."""
    z = encoded(model, train)
    gaussian, mixture = st.LatentGaussian.fit(z), st.LatentMixture.fit(z, seed=seed)
    ends = encoded(model, test[:16]).reshape(2, 8, 1, -1)
    path = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, 10)[:, None])  # (8, 10, N)
    grid = gaussian.grid(10).to(path.dtype)
    sheets = {"interpolation": path, "pca": grid}
    draw = torch.Generator().manual_seed(seed)
    drawn = {"Gaussian": gaussian.sample(80, draw), "mixture": mixture.sample(80, draw)}
    for name, latents in sheets.items():
        images = decoded(model, latents.flatten(0, 1))
        save_sheet(Path(f"{prefix}{name}.png"), images.reshape(*latents.shape[:2], *images.shape[1:]))
    images = {name: decoded(model, latents) for name, latents in drawn.items()}
    both = torch.cat([x.reshape(8, 10, *x.shape[1:]) for x in images.values()], 1)
    save_sheet(Path(f"{prefix}samples.png"), both)
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["shapes", "mnist"], default="shapes")
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--layers", type=int, default=1, help="linear maps; 0: a plain autoencoder")
    parser.add_argument("--start", default="orthogonal", help="orthogonal, identity or linear")
    parser.add_argument("--penalty", default="nuclear", help="nuclear, ratio or batch")
    parser.add_argument("--weight", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=8, help="channels of the first convolution; the paper's is 32")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3, help="the paper's is 1e-4, for 100 epochs of batches of 100")
    parser.add_argument("--images", type=int, default=10_000, help="training images, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/lorae"))
    a = parser.parse_args()

    torch.manual_seed(a.seed)
    if a.data == "mnist":
        images, labels, test, test_labels = mnist()
        images, labels = images[: a.images], labels[: a.images]
    else:
        images, test = shapes(a.images, a.seed), shapes(2000, a.seed + 1)
    try:
        make = st.lorae_mnist if a.data == "mnist" else st.lorae_shapes
        model = make(a.latent, a.layers, a.start, width=a.width)
        history = _with_bar(a, model, images)
        report = st.latent_report(model, test.split(BATCH))
        folded = model.fold(batches=test.split(BATCH))
    except st.SlimtuneError as error:
        parser.error(str(error))
    result: dict[str, Any] = {
        "options": {key: str(v) if isinstance(v, Path) else v for key, v in vars(a).items()},
        "history": [{"error": e, "penalty": p} for e, p in history],
        "test_error": folded.error_before,
        "test_error_folded": folded.error_after,
        "latent": report.as_dict(),
    }
    if a.data == "mnist":
        pairs = (images, labels), (test, test_labels)
        result["accuracy"] = {10 * n: few_labels(model, *pairs, n, a.seed) for n in (10, 100)}
    from safetensors.torch import save_file

    pictures(f"{a.out}/", model, images, test, a.seed)
    save_spectra(a.out / "spectra.png", {"": result["latent"]})
    save_file(model.state_dict(), a.out / "model.safetensors")
    (a.out / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"test error {folded.error_before:.5f}, folded {folded.error_after:.5f}\n{report}")
    for count, accuracy in result.get("accuracy", {}).items():
        print(f"{count} labels: accuracy {accuracy:.3f}")
    print(f"written to {a.out}")


def _with_bar(a: argparse.Namespace, model: st.LoRAE, images: Tensor) -> list[tuple[float, float]]:
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("training", total=a.epochs * -(-len(images) // 50))
        options = {"weight": a.weight, "penalty": a.penalty, "lr": a.lr}
        return train(model, images, a.epochs, a.seed, step=lambda: bar.advance(task), **options)


if __name__ == "__main__":
    main()
