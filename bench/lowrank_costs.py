"""What low-rank training costs beside the step: TRP's projections and Cuttlefish's looks at their default periods.

    python -m bench.lowrank_costs            # measure, some minutes on one core
    python -m bench.lowrank_costs --page     # print the table of docs/compression.md

Two models: ResNet-20 at batch 128 under SGD with momentum, and the Llama-style one of `bench.run`, all of it trained
by AdamW on 4 x 256 tokens. Every controller is called by hand around each step of the same run, so that the step that
it is compared with is its neighbour. Times are CPU time of the process on one thread; a share is the median over
periods of what a controller took in one, over what the training steps in it took.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.model import SIZES, llama, token_ids
from bench.timing import keep_freed_memory

RESULT = Path(__file__).parent / "results" / "lowrank_costs.json"
PERIOD = 20  # TRP's own; Cuttlefish looks a hundred times in a run, here of a hundred periods
PERIODS = {"resnet20": 4, "llama": 2}


def controllers(kind: str) -> dict[str, Any]:
    """By what the table calls them."""
    import slimtune as st

    targets: dict[str, Any] = {} if kind == "resnet20" else {"targets": "all-linear"}
    found: dict[str, Any] = {
        "TRP, channel": st.TRP(**targets),
        "TRP, without penalty": st.TRP(**targets, weight=0.0),
        "TRP, proximal": st.TRP(**targets, penalty="prox"),
        "TRP, momentum projected": st.TRP(**targets, momentum=True),
        "nuclear norm alone, as often": st.NuclearNorm(targets.get("targets", "convolutions"), 3e-4, every=PERIOD),
        "Cuttlefish, looking": st.Cuttlefish(total_steps=100 * PERIOD, prefix=0, latest=1.0, **targets),
    }
    if kind == "resnet20":
        found["TRP, spatial"] = st.TRP(form="spatial")
    return found


def setting(kind: str) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], Tensor]]:
    """A model, its optimizer, and what computes the loss of a batch."""
    if kind == "llama":
        size = SIZES["cpu"]
        model, ids = llama(size).requires_grad_(True), token_ids(size)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-4), lambda: model(input_ids=ids, labels=ids).loss
    from examples.resnet_cifar import ResNet

    torch.manual_seed(0)
    model = ResNet(3).train()
    x, y = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return model, optimizer, lambda: nn.functional.cross_entropy(model(x), y)


def measure(kind: str) -> dict[str, Any]:
    """Seconds of a training step, and per controller milliseconds of a step in which it acts and its share."""
    import slimtune as st

    model, optimizer, loss = setting(kind)
    found = controllers(kind)
    attached = [st.attach(c, model, optimizer) for c in found.values()]
    for one in attached:
        one.remove()
        one.controller.begin(model, optimizer)  # called by hand, to be timed
    steps: list[float] = []
    spent: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(PERIODS[kind] * PERIOD + 1):
        start = time.process_time()
        loss().backward()
        passed = time.process_time() - start
        before = {name: timed(lambda c=c: c.before_step(model)) for name, c in found.items()}
        passed += timed(optimizer.step)
        for name, c in found.items():
            spent[name].append(before[name] + timed(lambda c=c: c.after_step(model)))
        optimizer.zero_grad()
        steps.append(passed)
    table = {}
    for name, values in spent.items():
        # the first step is not one of the middle of a run
        periods = [slice(1 + n * PERIOD, 1 + (n + 1) * PERIOD) for n in range(PERIODS[kind])]
        shares = [sum(values[p]) / sum(steps[p]) for p in periods]
        table[name] = {
            "period_ms": 1e3 * statistics.median(sum(values[p]) for p in periods),
            "share": statistics.median(shares),
        }
    return {"step_s": statistics.median(steps), "period": PERIOD, "controllers": table}


def timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def table() -> str:
    """What was measured."""
    known = json.loads(RESULT.read_text())
    lines = ["| model | a training step, s | controller | per 20 steps, ms | share of training |"]
    lines += ["| --- | ---: | --- | ---: | ---: |"]
    for kind, found in known["models"].items():
        for name, row in found["controllers"].items():
            cells = (kind, f"{found['step_s']:.2f}", name, f"{row['period_ms']:.0f}", f"{100 * row['share']:.2f} %")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true")
    if parser.parse_args(arguments).page:
        print(table())
        return
    torch.set_num_threads(1)
    keep_freed_memory()
    found = {"command": "python -m bench.lowrank_costs", "models": {kind: measure(kind) for kind in PERIODS}}
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(table())


if __name__ == "__main__":
    main()
