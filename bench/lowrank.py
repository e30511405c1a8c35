"""Low-rank training on JPEG-CIFAR: TRP and Cuttlefish against factorising before and after, at equal multiply-adds.

    python -m bench.lowrank                          # every run that has no result yet
    python -m bench.lowrank --runs trp --seeds 0     # some of them
    python -m bench.lowrank --page                   # print the tables of docs/compression.md

Needs `python examples/prepare_data.py FOLDER` once. A ResNet trained on lossless CIFAR-10 is fine-tuned on JPEG images
(resnet20-scratch: trained from random weights), all runs of a network with the same images, order, crops, schedule and
number of steps, in this process on one thread; `bench/results/lowrank/` keeps one file per run. `after` factorises the
run without a method at the multiply-adds of each other run of its seed, layer by layer at one energy, without training;
`before` does so at the start and trains the factors. Nothing here is CIFAR-10 accuracy: the images are JPEG-coded.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import slimtune as st
from slimtune.compress import part_of, structured_layers
from slimtune.factors.base import matrices
from slimtune.ops import rank_by_tail
from slimtune.targets import select

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "lowrank"
WORK = ROOT / "runs" / "lowrank"
DATA = ROOT / "examples" / "data"
PICTURE = ROOT / "docs" / "images" / "lowrank.png"
SEEDS = (0, 1)
BATCH, DECAY, MOMENTUM = 128, 1e-4, 0.9
CONVOLUTIONS = r"layer\d\.\d+\.conv\d$"


@dataclass(frozen=True)
class Network:
    """A network of examples/resnet_cifar.py and how long it is trained."""

    blocks: int
    steps: int
    weights: str | None
    """File with the weights it starts from; None: random ones."""
    rate: float
    runs: tuple[str, ...]
    seeds: tuple[int, ...] = SEEDS


FINE_TUNING = ("full", "trp-mild", "trp-prox", "before-mild", "trp-nuclear", "before", "trp-spatial", "cuttlefish")
NETWORKS = {
    "resnet20": Network(3, 624, "resnet20_cifar10.safetensors", 0.02, FINE_TUNING),
    "resnet56": Network(9, 156, "resnet56_cifar10.safetensors", 0.02, ("full", "trp-nuclear", "before", "cuttlefish")),
    "resnet20-scratch": Network(3, 1560, None, 0.1, ("full", "cuttlefish-scratch", "pufferfish")),
}


@dataclass(frozen=True)
class Run:
    """One way of training: what is attached to the optimizer, or done to the network at the start."""

    title: str
    controller: Callable[[int], Any] | None = None
    before: tuple[str, str] | None = None
    """(form, run whose multiply-adds it is to have)."""
    during: tuple[float, float] | None = None
    """(share of the steps after which, share of the full rank to which every convolution is factorised)."""


def runs() -> dict[str, Run]:
    """By name; a run that refers to another comes after it."""

    def trp(**options: Any) -> Callable[[int], Any]:
        return lambda steps: st.TRP(**{"targets": CONVOLUTIONS, "tail": 0.05, "factorize": True, **options})

    def cuttlefish(**options: Any) -> Callable[[int], Any]:
        return lambda steps: st.Cuttlefish(prefix=0, multiple=1, total_steps=steps, **options)

    return {
        "full": Run("every weight, dense"),
        "trp-mild": Run("TRP, channel, e = 0.02", trp(tail=0.02)),
        "trp-nuclear": Run("TRP, channel, e = 0.05", trp()),
        "trp-prox": Run("TRP, channel, e = 0.02, proximal steps", trp(tail=0.02, penalty="prox", weight=0.3)),
        "trp-spatial": Run("TRP, spatial, e = 0.05", trp(form="spatial")),
        "before": Run("SVD first, then trained: cost of e = 0.05", before=("channel", "trp-nuclear")),
        "before-mild": Run("SVD first, then trained: cost of e = 0.02", before=("channel", "trp-mild")),
        "cuttlefish": Run("Cuttlefish, ranks by energy", cuttlefish(targets=CONVOLUTIONS, rule="energy")),
        "cuttlefish-scratch": Run("Cuttlefish", cuttlefish(targets=r"layer[23]\.\d+\.conv\d$", period=78)),
        "pufferfish": Run("a quarter of every rank after a fifth of the steps (Pufferfish)", during=(0.2, 0.25)),
    }


# ---------------------------------------------------------------- data and network


class Images:
    """Normalised images; batches of mirrored crops in an order drawn from a seed."""

    def __init__(self, split: str) -> None:
        with np.load(DATA / "jpeg_cifar.npz") as archive:
            images, labels = archive[f"{split}_images"], archive[f"{split}_labels"]
        mean, deviation = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        self.x = (pixels - mean[:, None, None]) / deviation[:, None, None]
        self.y = torch.from_numpy(labels).long()

    def batches(self, seed: int, count: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        epochs = count * BATCH // len(self.x) + 1
        order = torch.cat([torch.randperm(len(self.x), generator=generator) for _ in range(epochs)])
        for part in order[: count * BATCH].split(BATCH):
            x = F.pad(self.x[part], (4, 4, 4, 4))
            down, right = (torch.randint(0, 9, (len(part),), generator=generator) for _ in range(2))
            x = torch.stack([i[:, d : d + 32, r : r + 32] for i, d, r in zip(x, down, right, strict=True)])
            mirrored = torch.rand(len(part), generator=generator) < 0.5
            yield torch.where(mirrored[:, None, None, None], x.flip(3), x), self.y[part]


def network(name: str) -> nn.Module:
    """As it starts."""
    sys.path.insert(0, str(ROOT))
    from examples.resnet_cifar import ResNet

    model = ResNet(NETWORKS[name].blocks)
    if weights := NETWORKS[name].weights:
        model.load_state_dict(load_file(DATA / weights))
    return model


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Per cent."""
    model.eval()
    right = sum(
        int((model(x).argmax(1) == y).sum()) for x, y in zip(images.x.split(500), images.y.split(500), strict=True)
    )
    return 100 * right / len(images.x)


def multiply_adds(model: nn.Module) -> int:
    """Of one 32 x 32 image."""
    from torch.utils.flop_counter import FlopCounterMode

    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() // 2


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def at_energy(model: nn.Module, form: str, tail: float) -> None:
    """Factorise every convolution of the blocks where that leaves out at most `tail` of its squared norm."""
    ranks = {}
    for layer in select(model, CONVOLUTIONS):
        M = matrices(part_of(model.get_submodule(layer), layer), form)
        ranks[layer] = max(1, rank_by_tail(torch.linalg.svdvals(M[0]), tail))
    st.factorize(model, ranks, st.factors.svd(form=form))


def _sizes(model: nn.Module, layer: str) -> tuple[int, int]:
    W = part_of(model.get_submodule(layer), layer).W
    return W.shape[0], W.shape[1]


def at_cost(make: Callable[[], nn.Module], form: str, wanted: int) -> nn.Module:
    """A network factorised at the energy that brings it nearest to `wanted` multiply-adds from below."""
    low, high, best = 0.0, 0.9, None
    for _ in range(14):
        tail = (low + high) / 2
        model = make()
        at_energy(model, form, tail)
        if multiply_adds(model) > wanted:
            low = tail
        else:
            high, best = tail, model
    assert best is not None, "no energy leaves so few multiply-adds"
    return best


# ---------------------------------------------------------------- one run


def train(net: str, name: str, seed: int, test: Images, images: Images) -> dict[str, Any]:
    run, steps = runs()[name], NETWORKS[net].steps
    torch.manual_seed(seed)
    model = network(net)
    if run.before:
        form, other = run.before
        model = at_cost(lambda: network(net), form, read(net, other, seed)["multiply_adds"])
    optimizer = torch.optim.SGD(model.parameters(), lr=NETWORKS[net].rate, momentum=MOMENTUM, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    attached = st.attach(run.controller(steps), model, optimizer) if run.controller else None
    began, losses, notes = time.perf_counter(), [], []
    for step, (x, y) in enumerate(images.batches(seed, steps), 1):
        if run.during and step == round(run.during[0] * steps):
            ranks = {n: max(1, int(run.during[1] * min(_sizes(model, n)))) for n in select(model, CONVOLUTIONS)}
            st.factorize(model, ranks, optimizer=optimizer)
        model.train()
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if attached and (note := attached.controller.note()):
            notes.append({"step": step, **note})
        if step % 20 == 0:
            print(f"{net} {name} {seed}: step {step}/{steps}  loss {statistics.mean(losses[-20:]):.4f}", flush=True)
    seconds = time.perf_counter() - began
    trained = accuracy(model, test)
    if attached:
        attached.finish()
    result = {
        "run": name,
        "title": run.title,
        "seed": seed,
        "steps": steps,
        "seconds": round(seconds, 1),
        "loss": round(statistics.mean(losses[-50:]), 4),
        "accuracy_trained": trained,
        "accuracy": accuracy(model, test),
        "multiply_adds": multiply_adds(model),
        "parameters": parameters(model),
        "ranks": {layer: module.structure.rank for layer, module in structured_layers(model).items()},
        "switches": [note for note in notes if "ranks" in note][-1:],
    }
    if name == "full":
        result["accuracy_base"] = accuracy(network(net), test)
        WORK.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.contiguous() for k, v in model.state_dict().items()}, str(WORK / f"{net}-full-{seed}.safetensors")
        )
    elif run.controller:
        result["after"] = after(net, name, seed, result["multiply_adds"], test)
    return result


def after(net: str, name: str, seed: int, wanted: int, test: Images) -> dict[str, Any]:
    """The run without a method, factorised at the multiply-adds of this one."""
    form = "spatial" if "spatial" in name else "channel"

    def dense() -> nn.Module:
        model = network(net)
        model.load_state_dict(load_file(WORK / f"{net}-full-{seed}.safetensors"))
        return model

    model = at_cost(dense, form, wanted)
    return {"accuracy": accuracy(model, test), "multiply_adds": multiply_adds(model), "parameters": parameters(model)}


def file_of(net: str, name: str, seed: int) -> Path:
    return RESULTS / f"{net}-{name}-{seed}.json"


def read(net: str, name: str, seed: int) -> dict[str, Any]:
    return dict(json.loads(file_of(net, name, seed).read_text(encoding="utf-8")))


# ---------------------------------------------------------------- the page


def table() -> str:
    """Markdown, one table per network."""
    parts = []
    for net, network_ in NETWORKS.items():
        found = {
            name: [read(net, name, seed) for seed in network_.seeds if file_of(net, name, seed).is_file()]
            for name in network_.runs
        }
        if sum(map(bool, found.values())) < 2:
            continue
        base = found["full"][0]
        dense = base["multiply_adds"]
        seeds = len(found["full"])
        head = f"**{net}**, {base['steps']} steps of {BATCH} images, {seeds} seed{'s' * (seeds > 1)}; untouched "
        head += f"{base['accuracy_base']:.2f} %, full cost {dense / 1e6:.1f} million multiply-adds"
        lines = [head, "", "| | test, % | SVD after, same cost | fewer multiply-adds | parameters |"]
        lines.append("|---|---|---|---|---|")
        for name, results in found.items():
            if not results:
                continue
            cells = [runs()[name].title, _spread([r["accuracy"] for r in results])]
            cells.append(_spread([r["after"]["accuracy"] for r in results if "after" in r]))
            cells.append(f"{dense / statistics.mean(r['multiply_adds'] for r in results):.2f}x")
            cells.append(f"{statistics.mean(r['parameters'] for r in results) / 1000:.0f} k")
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    text = f"{statistics.mean(values):.2f}"
    return text if len(values) < 2 else f"{text} ({', '.join(f'{v:.2f}' for v in values)})"


def picture() -> None:
    """Accuracy against multiply-adds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    nets = [net for net in NETWORKS if len(list(RESULTS.glob(f"{net}-[!s]*.json"))) > len(NETWORKS[net].seeds)]
    figure, axes = plt.subplots(1, len(nets), figsize=(5.6 * len(nets), 4.8), squeeze=False, layout="constrained")
    for ax, net in zip(axes[0], nets, strict=True):
        for index, name in enumerate(NETWORKS[net].runs):
            results = [read(net, name, s) for s in NETWORKS[net].seeds if file_of(net, name, s).is_file()]
            if results:
                cost = [r["multiply_adds"] / 1e6 for r in results]
                ax.plot(cost, [r["accuracy"] for r in results], "o", color=f"C{index}", label=runs()[name].title)
                later = [r["after"] for r in results if "after" in r]
                ax.plot(
                    [r["multiply_adds"] / 1e6 for r in later], [r["accuracy"] for r in later], "x", color=f"C{index}"
                )
        ax.set(title=net, xlabel="million multiply-adds per image", ylabel="JPEG-CIFAR test accuracy, %")
        ax.grid(alpha=0.3)
        ax.legend(
            fontsize=7,
            title="x: SVD after training, same cost",
            title_fontsize=7,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
            ncols=2,
        )
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--runs", help=f"of {', '.join(runs())}; default: those without a result")
    parser.add_argument("--seeds", help="default: those of the network")
    parser.add_argument("--page", action="store_true", help="print the tables, draw the picture")
    arguments = parser.parse_args()
    if not arguments.page:
        torch.set_num_threads(1)
        images, test = Images("train"), Images("test")
        RESULTS.mkdir(parents=True, exist_ok=True)
        for net in arguments.networks.split(","):
            seeds = [int(s) for s in arguments.seeds.split(",")] if arguments.seeds else NETWORKS[net].seeds
            for seed in seeds:
                for name in arguments.runs.split(",") if arguments.runs else NETWORKS[net].runs:
                    if arguments.runs or not file_of(net, name, seed).is_file():
                        result = train(net, name, seed, test, images)
                        assert math.isfinite(result["loss"])
                        command = f"python -m bench.lowrank --networks {net} --runs {name} --seeds {seed}"
                        result |= {"command": command, "torch": torch.__version__}
                        file_of(net, name, seed).write_text(json.dumps(result) + "\n", encoding="utf-8")
                        print(json.dumps({k: v for k, v in result.items() if k != "ranks"}), flush=True)
    picture()
    print(table())


if __name__ == "__main__":
    main()
