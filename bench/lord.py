"""LORD against plain SVD on real models: what one shot costs, and what a short adapter training gives back.

    python -m bench.lord                                   # every result that is missing
    python -m bench.lord --parts llama --seeds 0 --steps 200
    python -m bench.lord --page                            # print the tables of docs/compression.md, draw the picture

Needs `python examples/prepare_data.py FOLDER tinystories trec` once; a part whose data is absent is skipped and says
so. Parts: `llama`, two small Llamas on held-out stories of their own kind; `minilm`, a MiniLM encoder fine-tuned on
TREC here; `time`, LORD of the whole MiniLM; `linear`, a factorised Linear against the dense one. Shares are of the
parameters of the linear layers without the head, biases counted (a bias that AFM adds, too). `bench/results/lord/`
keeps one file per model and seed. The seed draws the calibration rows and the order of the adapter's training data,
which is calibration's split, never the test's.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slimtune as st
from slimtune.hf.models import load_model, load_tokenizer

ROOT = Path(__file__).parents[1]
DATA = ROOT / "examples" / "data"
RESULTS = Path(__file__).parent / "results" / "lord"
PICTURE = ROOT / "docs" / "images" / "lord.png"
KEEPS = (0.9, 0.8, 0.7)
SEEDS = (0, 1)
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Way:
    """A way to compress; the columns of the tables."""

    title: str
    compress: Callable[[nn.Module, Sequence[Batch], float], None]
    recovered: bool = True
    """Whether an adapter is trained on it, too."""


def plain(model: nn.Module, batches: Sequence[Batch], keep: float) -> None:
    """Truncated singular values of the weights, the same share in every layer."""
    st.factorize(model, st.allocate.uniform(st.allocate.prices(model), keep))


def one_shot(
    model: nn.Module, batches: Sequence[Batch], keep: float, centred: bool = True, policy: str = "tail", **options: Any
) -> None:
    ranks = (lambda p: st.allocate.uniform(p, keep)) if policy == "uniform" else None
    st.lord(model, batches, keep=keep, ranks=ranks, centred=centred, measure=False, forward=without_labels, **options)


def weighed(model: nn.Module, batches: Sequence[Batch], keep: float) -> None:
    """Squared errors cost what the loss's gradients in them say."""
    labelled = [batch if "labels" in batch else {**batch, "labels": batch["input_ids"]} for batch in batches]
    one_shot(model, batches, keep, importance=st.calibrate.fisher(model, labelled))


WAYS: dict[str, Way] = {
    "svd": Way("SVD of the weights", plain),
    "uncentred": Way("uncentred (SVD-LLM), uniform", partial(one_shot, centred=False, policy="uniform")),
    "afm": Way("AFM, uniform", partial(one_shot, policy="uniform")),
    "lord": Way("AFM, one budget", one_shot),
    "fisher": Way("AFM, one budget, weighed by gradients", weighed),
    "sequential": Way("AFM, one budget, block by block", partial(one_shot, sequential=True), recovered=False),
}


def without_labels(model: nn.Module, batch: Batch) -> Any:
    return model(**{key: value for key, value in batch.items() if key != "labels"})


def read(name: str, split: str) -> list[dict[str, Any]]:
    with (DATA / name / f"{split}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# ---------------------------------------------------------------- the Llamas


def stories(folder: str, split: str, length: int, most: int) -> Tensor:
    """(sequences, length) of running stories."""
    tokenizer = load_tokenizer(str(DATA / folder))
    ids: list[int] = []
    for row in read("tinystories", split):
        ids += tokenizer(row["text"], verbose=False)["input_ids"]
        if len(ids) >= length * most:
            break
    ids = ids[: len(ids) // length * length]
    return torch.tensor(ids).view(-1, length)


@dataclass
class Llama:
    """Nats a token on held-out stories; lower is better."""

    folder: str
    metric = "perplexity"
    learning_rate = 1e-3

    @property
    def needs(self) -> list[Path]:
        return [DATA / self.folder, DATA / "tinystories"]

    def start(self, seed: int, told: argparse.Namespace) -> tuple[nn.Module, list[Batch], Iterator[Batch]]:
        """(model, calibration batches, training batches)."""
        model = load_model("causal-lm", str(DATA / self.folder), "float32").model.eval()
        train, self.test = stories(self.folder, "train", 256, 4000), stories(self.folder, "test", 256, told.test)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        calibration = [{"input_ids": part} for part in train[order[: told.calibration]].split(16)]
        return model, calibration, self._training(train, seed)

    @staticmethod
    def _training(train: Tensor, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            part = train[torch.randint(len(train), (8,), generator=generator)][:, :128]
            yield {"input_ids": part, "labels": part}

    @torch.no_grad()
    def measure(self, model: nn.Module) -> float:
        model.eval()
        total = sum(float(model(input_ids=p, labels=p).loss) * len(p) for p in self.test.split(16))
        return math.exp(total / len(self.test))


# ---------------------------------------------------------------- MiniLM


@dataclass
class MiniLM:
    """Accuracy on TREC of an encoder whose every weight was fine-tuned on it; higher is better."""

    metric = "accuracy"
    learning_rate = 5e-4

    @property
    def needs(self) -> list[Path]:
        return [DATA / "trec"]

    def start(self, seed: int, told: argparse.Namespace) -> tuple[nn.Module, list[Batch], Iterator[Batch]]:
        rows, test = read("trec", "train"), read("trec", "test")
        names = sorted({row["label"] for row in rows})
        self.tokenizer, self.labels = load_tokenizer("embedded:minilm"), {n: i for i, n in enumerate(names)}
        model = load_model("sequence-classification", "embedded:minilm", "float32", seed, num_labels=len(names)).model
        generator = torch.Generator().manual_seed(seed)
        train = self._training(rows, generator)
        groups = [
            {
                "params": [p for n, p in model.named_parameters() if ("pooler" in n or "classifier" in n) == head],
                "lr": lr,
            }
            for head, lr in ((False, 1e-4), (True, 1e-3))
        ]
        fit(model, train, told.fine_tuning, groups)
        self.test = [self._batch(test[i : i + 50]) for i in range(0, len(test), 50)]
        order = torch.randperm(len(rows), generator=generator)[: 8 * told.calibration].tolist()
        calibration = [self._batch([rows[i] for i in order[at : at + 64]]) for at in range(0, len(order), 64)]
        return model.eval(), calibration, train

    def _batch(self, rows: Sequence[dict[str, Any]]) -> Batch:
        batch = dict(self.tokenizer([row["text"] for row in rows], padding=True, truncation=True, return_tensors="pt"))
        return batch | {"labels": torch.tensor([self.labels[row["label"]] for row in rows])}

    def _training(self, rows: Sequence[dict[str, Any]], generator: torch.Generator) -> Iterator[Batch]:
        while True:
            for part in torch.randperm(len(rows), generator=generator).split(16):
                yield self._batch([rows[i] for i in part.tolist()])

    @torch.no_grad()
    def measure(self, model: nn.Module) -> float:
        model.eval()
        right = sum(int((model(**b).logits.argmax(1) == b["labels"]).sum()) for b in self.test)
        return right / sum(len(b["labels"]) for b in self.test)


MODELS: dict[str, Any] = {
    "babyllama105": Llama("babyllama105"),
    "stories260k": Llama("stories260k"),
    "minilm": MiniLM(),
}
PARTS = {"llama": ["babyllama105", "stories260k"], "minilm": ["minilm"]}


def fit(model: nn.Module, batches: Iterator[Batch], steps: int, groups: Any) -> None:
    """AdamW; the rates rise for a tenth of the steps and fall to 0 along a line."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / max(1, steps // 10), (steps - i) / steps)
    )
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**next(batches)).loss.backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def recover(task: Any, model: nn.Module, batches: Iterator[Batch], steps: int) -> float:
    """The metric after LoRA of rank 8 on every linear layer was trained."""
    torch.manual_seed(0)
    st.adapt(model, st.lora(rank=8))
    fit(model, batches, steps, st.param_groups(model, lr=task.learning_rate))
    return task.measure(model)


def run(
    name: str,
    seed: int,
    told: argparse.Namespace,
    before: dict[str, Any] | None,
    save: Callable[[dict[str, Any]], None],
) -> None:
    """One model and seed, row by row; those of a run that was cut short are kept."""
    if before and [(row["way"], row["keep"]) for row in before["rows"]] == [(w, k) for k in KEEPS for w in WAYS]:
        return
    task, clock = MODELS[name], time.time()
    model, calibration, _ = task.start(seed, told)
    result: dict[str, Any] = before or {
        "model": name,
        "seed": seed,
        "metric": task.metric,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dense": task.measure(model),
        "recovery_steps": told.steps,
        "calibration_rows": sum(b["input_ids"].numel() for b in calibration),
        "rows": [],
    }
    again = partial(_training_of, task, seed, told)
    if "dense_recovered" not in result:
        result["dense_recovered"] = recover(task, copy.deepcopy(model), again(), told.steps)
    for keep in KEEPS:
        for key, way in WAYS.items():
            if any((row["way"], row["keep"]) == (key, keep) for row in result["rows"]):
                continue
            other, start = copy.deepcopy(model), time.time()
            way.compress(other, calibration, keep)
            row: dict[str, Any] = {"way": key, "keep": keep, "seconds": round(time.time() - start, 2)}
            row |= {"parameters": sum(p.numel() for p in other.parameters()), "compressed": task.measure(other)}
            if way.recovered:
                row["recovered"] = recover(task, other, again(), told.steps)
            result["rows"].append(row)
            result["rows"].sort(key=lambda row: (-row["keep"], list(WAYS).index(row["way"])))
            result["seconds"] = round(result.get("seconds", 0.0) + time.time() - clock, 1)
            clock = time.time()
            print(name, seed, {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            save(result)


def _training_of(task: Any, seed: int, told: argparse.Namespace) -> Iterator[Batch]:
    """The same training batches from the beginning."""
    if isinstance(task, Llama):
        return Llama._training(stories(task.folder, "train", 256, 4000), seed)
    return task._training(read("trec", "train"), torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- times


def time_minilm() -> dict[str, Any]:
    """LORD of the whole MiniLM: 256 sequences of 128 random tokens, calibration, ranks and factors, in seconds."""
    model = load_model("sequence-classification", "embedded:minilm", "float32", 0, num_labels=2).model.eval()
    ids = torch.randint(1000, 20000, (256, 128), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(32)]
    start, cpu = time.perf_counter(), time.process_time()
    report = st.lord(model, batches, keep=0.8, measure=False)
    return {
        "model": "minilm",
        "tokens": ids.numel(),
        "layers": len(report.layers),
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "threads": torch.get_num_threads(),
        "report": str(report),
    }


@torch.no_grad()
def time_linear(rounds: int = 41) -> dict[str, Any]:
    """Dense over factorised, forward, 256 rows, at half the break-even rank: medians of interleaved pairs."""
    rows = []
    for O, I in ((384, 384), (1536, 384), (1024, 1024), (4096, 1024), (1024, 4096)):
        dense = nn.Linear(I, O)
        thin = nn.Sequential(copy.deepcopy(dense))
        rank = int(st.ops.break_even(O, I) / 2)
        st.factorize(thin, {"0": rank})
        x, ratios = torch.randn(256, I), []
        for _ in range(rounds):
            times = []
            for layer in (dense, thin[0]):
                repeats, start = max(1, 2**28 // (O * I * 256)), time.process_time()
                for _ in range(repeats):
                    layer(x)
                times.append(time.process_time() - start)
            ratios.append(times[0] / times[1])
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append({"shape": [O, I], "rank": rank, "speedup": middle, "low": low, "high": high})
        print(rows[-1], flush=True)
    return {"tokens": 256, "threads": torch.get_num_threads(), "rows": rows}


TIMES: dict[str, Callable[[], dict[str, Any]]] = {"time": time_minilm, "linear": time_linear}


# ---------------------------------------------------------------- the page


def found() -> dict[str, list[dict[str, Any]]]:
    """{model: results of its seeds}."""
    results: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("*-*.json")):
        row = json.loads(path.read_text())
        results.setdefault(row["model"], []).append(row)
    return results


def cell(results: Sequence[dict[str, Any]], way: str, keep: float, what: str) -> list[float]:
    return [r[what] for one in results for r in one["rows"] if (r["way"], r["keep"]) == (way, keep) and what in r]


def table() -> str:
    """Means over the seeds, and their range; as compressed, and after the adapter."""
    lines = []
    for name, results in found().items():
        dense = [r["dense"] for r in results]
        after = [r["dense_recovered"] for r in results if "dense_recovered" in r]
        lines += [
            f"**{name}**, {results[0]['metric']}; dense: {_shown(dense)}, with the adapter {_shown(after)}",
            "",
            "| way | " + " | ".join(f"{1 - k:.0%} fewer | + LoRA" for k in KEEPS) + " |",
            "| --- |" + " ---: |" * (2 * len(KEEPS)),
        ]
        for key, way in WAYS.items():
            cells = [_shown(cell(results, key, k, w)) for k in KEEPS for w in ("compressed", "recovered")]
            lines.append(f"| {way.title} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _shown(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def draw() -> None:
    """The metric over the share kept, as compressed and recovered."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results = found()
    figure, axes = plt.subplots(1, len(results), figsize=(4.2 * len(results), 3.6), squeeze=False)
    for axis, (name, rows) in zip(axes[0], results.items(), strict=True):
        for i, (key, way) in enumerate(WAYS.items()):
            for what, style in (("compressed", "-o"), ("recovered", "--^")):
                points = [(1 - k, statistics.mean(v)) for k in KEEPS if (v := cell(rows, key, k, what))]
                if points:
                    label = way.title if what == "compressed" else None
                    axis.plot(
                        *zip(*points, strict=True), style, color=f"C{i}", label=label, markersize=4, linewidth=1.2
                    )
        axis.axhline(statistics.mean(r["dense"] for r in rows), color="black", linewidth=0.8, label="dense")
        axis.set(title=name, xlabel="fewer parameters of the linear layers", ylabel=rows[0]["metric"])
        axis.set_xticks([1 - k for k in KEEPS], [f"{1 - k:.0%}" for k in KEEPS])
        if rows[0]["metric"] == "perplexity":
            axis.set_yscale("log")
    named = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    order = [*(way.title for way in WAYS.values() if way.title in named), "dense"]
    figure.legend([named[label] for label in order], order, fontsize=7, ncols=4, loc="lower center")
    figure.suptitle("Compressed in one shot (solid), then a short LoRA (dashed)", fontsize=10)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="linear,time,llama,minilm", help="or models: babyllama105, stories260k")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--steps", type=int, default=40, help="of the adapter")
    parser.add_argument("--fine-tuning", type=int, default=150, help="steps that make the classifier")
    parser.add_argument("--calibration", type=int, default=128, help="sequences; times 8 for MiniLM's short ones")
    parser.add_argument("--test", type=int, default=100, help="sequences of 256 tokens that the Llamas are tested on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="replace results that exist")
    parser.add_argument("--page", action="store_true")
    told = parser.parse_args(arguments)
    if told.page:
        print(table())
        draw()
        return
    torch.set_num_threads(told.threads)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for part in told.parts.split(","):
        if part in TIMES:
            path = RESULTS / f"{part}.json"
            if told.again or not path.exists():
                path.write_text(json.dumps(TIMES[part](), indent=1) + "\n")
            continue
        for seed in map(int, told.seeds.split(",")):
            for name in PARTS.get(part, [part]):
                if missing := [str(p) for p in MODELS[name].needs if not p.exists()]:
                    print(f"{name}: skipped, {missing[0]} is missing; see examples/prepare_data.py")
                    continue
                path = RESULTS / f"{name}-{seed}.json"
                before = json.loads(path.read_text()) if path.exists() and not told.again else None
                run(name, seed, told, before, lambda row, path=path: path.write_text(json.dumps(row, indent=1) + "\n"))


if __name__ == "__main__":
    main()
