"""LoRAE against a plain autoencoder and IRMAE on MNIST: error, rank, samples, few labels.

    python -m bench.lorae           # train, measure and draw what has no result yet; under ten minutes of one core
    python -m bench.lorae --page    # print the tables of docs/lorae.md

Needs `python examples/prepare_data.py FOLDER mnist` once. The models are the paper's at a quarter of its width and
latent, trained for a shorter time at a higher rate, all alike. Generators are fitted on training images; every number
is of test images. Samples are judged by the Frechet distance of the 84 features before the last layer of a LeNet that
is trained here: these numbers compare only with each other.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from examples.lorae import BATCH, Pairs, decoded, encoded, few_labels, mnist, pictures, save_spectra, train
from torch import Tensor, nn

import slimtune as st

RESULT = Path(__file__).parent / "results" / "lorae.json"
PICTURES = Path(__file__).parents[1] / "docs" / "images"
SEEDS = (0, 1)
LATENT, WIDTH, EPOCHS, RATE, BATCH_SIZE = 32, 8, 5, 1e-3, 50
PER_CLASS = (10, 100)
LARGE = 1e-2
DRAWN = {"autoencoder": "ae", "LoRAE, nuclear, 1e-3": "lorae"}

VARIANTS: dict[str, dict[str, Any]] = {
    "autoencoder": {"layers": 0, "weight": 0.0},
    "LoRAE, nuclear, 1e-3": {"weight": 1e-3},
    "IRMAE, l = 4": {"layers": 4, "start": "linear", "weight": 0.0},
    "LoRAE, ratio, 1e-3": {"weight": 1e-3, "penalty": "ratio"},
    "LoRAE, batch, 1e-3": {"weight": 1e-3, "penalty": "batch"},
}


class LeNet(nn.Module):
    """(B, 1, 32, 32) -> (B, 10); `features` (B, 84)."""

    def __init__(self) -> None:
        super().__init__()
        pool = nn.MaxPool2d(2)
        convolutions = nn.Conv2d(1, 6, 5), nn.ReLU(), pool, nn.Conv2d(6, 16, 5), nn.ReLU(), pool
        linear = nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()
        self.features = nn.Sequential(*convolutions, nn.Flatten(), *linear)
        self.last = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))


def judge(images: Tensor, labels: Tensor, epochs: int = 4) -> LeNet:
    """A LeNet trained on these images, the same for every variant."""
    torch.manual_seed(0)
    net = LeNet()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
    return net.eval()


def made(variant: str, images: Tensor, seed: int, epochs: int = EPOCHS) -> tuple[st.LoRAE, list[tuple[float, float]]]:
    """A trained model and its history."""
    options = dict(VARIANTS[variant])
    loss = {key: options.pop(key) for key in ("weight", "penalty") if key in options}
    torch.manual_seed(seed)
    model = st.lorae_mnist(LATENT, width=WIDTH, **options)
    return model, train(model, images, epochs, seed, RATE, BATCH_SIZE, **loss)


def measured(
    model: st.LoRAE, fitted: Pairs, test: Pairs, features: Callable[[Tensor], Tensor], seed: int
) -> dict[str, Any]:
    """All that is reported of a trained model. Generators and heads see `fitted` only; the reference is `test`."""
    batches = test[0].split(BATCH)
    report = st.latent_report(model, batches)
    wanted = max(1, report.above[LARGE])
    cuts = {by: copy.deepcopy(model).fold(wanted, by, batches) for by in ("matrix", "pca")}
    z = encoded(model, fitted[0])
    reference, draw = features(test[0]), torch.Generator().manual_seed(seed)
    fits = {"Gaussian": st.LatentGaussian.fit(z), "mixture": st.LatentMixture.fit(z, seed=seed)}
    drawn = {name: decoded(model, fit.sample(len(test[0]), draw)) for name, fit in fits.items()}
    drawn["reconstruction"] = decoded(model, encoded(model, test[0]))
    return {
        "test_error": cuts["pca"].error_before,
        "latent": report.as_dict(),
        "cut_rank": wanted,
        "cut_error": {by: cut.error_after for by, cut in cuts.items()},
        "distance": {name: st.frechet_distance(features(x), reference) for name, x in drawn.items()},
        "accuracy": {str(10 * n): few_labels(model, fitted, test, n, seed) for n in PER_CLASS},
    }


def run() -> None:
    """All variants and seeds that have no result; written after each."""
    images, labels, test, test_labels = mnist()
    pairs = (images, labels), (test, test_labels)
    net = judge(images, labels)
    features = torch.no_grad()(lambda x: torch.cat([net.features(part) for part in x.split(BATCH)]))
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": []}
    known["command"] = "python -m bench.lorae"
    known["settings"] = {
        "latent": LATENT,
        "width": WIDTH,
        "epochs": EPOCHS,
        "lr": RATE,
        "batch_size": BATCH_SIZE,
        "images": len(images),
    }
    with torch.no_grad():
        logits = torch.cat([net(x) for x in test.split(BATCH)])
    known["judge"] = {
        "accuracy": (logits.argmax(1) == test_labels).double().mean().item(),
        "distance": st.frechet_distance(features(images[: len(test)]), features(test)),
    }
    for variant in VARIANTS:
        for seed in SEEDS:
            if any((row["variant"], row["seed"]) == (variant, seed) for row in known["rows"]):
                continue
            start = time.process_time()
            model, history = made(variant, images, seed)
            row = {"variant": variant, "seed": seed, "history": history, "cpu_seconds": time.process_time() - start}
            known["rows"].append(row | measured(model, *pairs, features, seed))
            RESULT.write_text(json.dumps(known, indent=1) + "\n")
            if seed == SEEDS[0] and variant in DRAWN:
                pictures(f"{PICTURES}/lorae-{DRAWN[variant]}-", model, images, test)
            print(variant, seed, known["rows"][-1]["test_error"], flush=True)
    reports = {row["variant"]: row["latent"] for row in known["rows"] if row["seed"] == SEEDS[0]}
    save_spectra(PICTURES / "lorae-spectra.png", reports)


COLUMNS: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {
    "test MSE": ("{:.5f}", lambda r: r["test_error"]),
    "eigenvalues above 1e-2": ("{:.1f}", lambda r: r["latent"]["above"]["0.01"]),
    "above 1e-4": ("{:.1f}", lambda r: r["latent"]["above"]["0.0001"]),
    "effective rank of z": ("{:.1f}", lambda r: r["latent"]["latent_rank"]),
    "distance, Gaussian": ("{:.1f}", lambda r: r["distance"]["Gaussian"]),
    "distance, mixture": ("{:.1f}", lambda r: r["distance"]["mixture"]),
    "accuracy, 100 labels": ("{:.3f}", lambda r: r["accuracy"]["100"]),
    "1,000 labels": ("{:.3f}", lambda r: r["accuracy"]["1000"]),
}
INNER: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {
    "rank of M at 1e-6": ("{:.0f}", lambda r: r["latent"]["matrix_rank"]),
    "effective rank of M": ("{:.1f}", lambda r: r["latent"]["matrix_effective_rank"]),
    "nuclear norm": ("{:.3g}", lambda r: r["latent"]["penalties"]["nuclear"]),
    "std of E(x)": ("{:.2f}", lambda r: r["latent"]["encoder_scale"]),
    "cut to rank": ("{:.1f}", lambda r: r["cut_rank"]),
    "MSE, M cut": ("{:.5f}", lambda r: r["cut_error"]["matrix"]),
    "MSE, z cut": ("{:.5f}", lambda r: r["cut_error"]["pca"]),
}


def table(columns: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = COLUMNS) -> str:
    """A row per variant: the mean over seeds, and half the range."""
    rows = json.loads(RESULT.read_text())["rows"]
    lines = [f"| model | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for variant in VARIANTS:
        own = [row for row in rows if row["variant"] == variant]
        if not own:
            continue
        cells = []
        for shown, read in columns.values():
            values = [read(row) for row in own]
            spread = f" ± {shown.format((max(values) - min(values)) / 2)}" if len(values) > 1 else ""
            cells.append(shown.format(statistics.mean(values)) + spread)
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def inner() -> str:
    """The same of M, and of what cutting costs."""
    return table(INNER)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true")
    if not parser.parse_args(arguments).page:
        torch.set_num_threads(1)
        run()
    print(f"{table()}\n{inner()}")


if __name__ == "__main__":
    main()
