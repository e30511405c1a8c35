"""What adaptive methods cost beside the step: rounds, calibration, and what is left after them.

    python -m bench.costs            # measure, a few minutes on one core
    python -m bench.costs --page     # print the table of docs/adaptive.md

The model is that of `bench.run`. Times are CPU time of the process on one thread, medians. A controller's time does not
depend on the batch, so it is taken over short sequences; calibration and the training step it is compared with run
interleaved, on the same batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.model import SIZES, llama, token_ids

RESULT = Path(__file__).parent / "results" / "costs.json"
SIZE = SIZES["cpu"]
SHORT = replace(SIZE, batch=1, tokens=32)
STEPS = 48
BATCHES = 2
ROUNDS = 5


def recipes() -> dict[str, Any]:
    """Methods with controllers; schedules that hold several rounds in a run of `STEPS`."""
    import slimtune as st

    rounds: dict[str, Any] = {"warmup": 4, "final": 4, "interval": 5, "schedule": False}
    return {
        "adalora": st.adalora(rank=11, initial_rank=16, t_init=4, t_final=4, delta_t=5),
        "adalora, regrow=False": st.adalora(rank=11, initial_rank=16, t_init=4, t_final=4, delta_t=5, regrow=False),
        "elalora, published rule": st.elalora(rank=16, rule="published", **rounds),
        "elalora, improved rule": st.elalora(rank=16, **rounds),
        "ardlora": st.ardlora(rank=14, heads=1, interval=5),
        "lorapro": st.lorapro(rank=16),
        "lorapro, lean": st.lorapro(rank=16, form="lean"),
        "lorapro, full": st.lorapro(rank=16, form="full"),
    }


def controllers(recipe: Any) -> dict[str, float | None]:
    """Milliseconds per ordinary step and per round, and how much longer forward and backward are in the step before
    one."""
    import slimtune as st

    model, ids = llama(SHORT), token_ids(SHORT)
    st.adapt(model, recipe)
    optimizer = torch.optim.AdamW(st.param_groups(model, lr=1e-3))
    attached = [st.attach(c, model, optimizer) for c in st.controllers_of(recipe, STEPS)]
    for one in attached:
        one.remove()
        one.controller.begin(model, optimizer)  # called by hand, to be timed
    ordinary, rounds, passes, sketched = [], [], [], []
    for step in range(STEPS):
        start = time.process_time()
        model(input_ids=ids, labels=ids).loss.backward()
        passed = time.process_time() - start
        start = time.process_time()
        for one in attached:
            one.controller.before_step(model)
        spent = time.process_time() - start
        optimizer.step()
        start = time.process_time()
        for one in attached:
            one.controller.after_step(model)
        spent += time.process_time() - start
        moved = any("ranks" in (one.controller.note() or {}) for one in attached)
        if step >= 4:
            (rounds if moved else ordinary).append(spent)
            (sketched if moved else passes).append(passed)
        optimizer.zero_grad()
    return {
        "ordinary_ms": 1e3 * statistics.median(ordinary),
        "round_ms": 1e3 * statistics.median(rounds) if rounds else None,
        "passes_ms": 1e3 * (statistics.median(sketched) - statistics.median(passes)) if rounds else None,
    }


def calibration() -> dict[str, dict[str, float]]:
    """Per batch, as a ratio to a training step of LoRA (forward, backward, AdamW); megabytes kept for backward."""
    import slimtune as st

    ids = [torch.roll(token_ids(SIZE), n, 0) for n in range(BATCHES)]
    bare, tuned = llama(SIZE), llama(SIZE)
    st.adapt(tuned, st.lora(rank=16))
    optimizer = torch.optim.AdamW(st.param_groups(tuned))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(input_ids=batch, labels=batch).loss

    def train() -> None:
        for batch in ids:
            loss(tuned, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    gradients = st.calibrate.gradients
    runs: dict[str, Callable[[], object]] = {
        "a sketch of 32 directions": lambda: gradients(bare, ids, loss, sketch=32),
        "the same and mean |W * G|": lambda: gradients(bare, ids, loss, sketch=32, importance=["union_mean"]),
        "64 directions, as LoRA-GA asks at rank 16": lambda: gradients(bare, ids, loss, directions=64, power=1),
        "16 components of the inputs": lambda: st.calibrate.inputs(bare, ids, components=16),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            before, own, after = (timed(work) for work in (train, run, train))
            times[name].append(own / ((before + after) / 2))
    found = {name: {"ratio": statistics.median(values)} for name, values in times.items()}
    for name, run in runs.items():
        found[name]["kept_mb"] = kept(run, bare) / 2**20
    found["LoRA's own step"] = {"ratio": 1.0, "kept_mb": kept(train, tuned) / 2**20}
    return found


def timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def kept(work: Callable[[], object], model: nn.Module) -> float:
    """The most bytes that autograd kept at once, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive: dict[int, tuple[int, int]] = {}
    most = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal most
        storage = t.untyped_storage()
        key = storage.data_ptr()
        if key not in own:
            alive[key] = (alive.get(key, (0, 0))[0] + 1, storage.nbytes())
            most = max(most, sum(size for _, size in alive.values()))
        return t

    def unpack(t: Tensor) -> Tensor:
        key = t.untyped_storage().data_ptr()
        if key in alive:
            count, size = alive.pop(key)
            if count > 1:
                alive[key] = (count - 1, size)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        work()
    return most


def left() -> dict[str, list[int]]:
    """Numbers held by parameters, gradients and optimizer state, before and after an AdaLoRA run of rank 12 to 8."""
    import slimtune as st

    recipe = st.adalora(rank=8, initial_rank=12, t_init=1, t_final=2, delta_t=1)
    model, ids = llama(SHORT), token_ids(SHORT)
    st.adapt(model, recipe)
    optimizer = torch.optim.AdamW(st.param_groups(model))
    attached = [st.attach(c, model, optimizer) for c in st.controllers_of(recipe, 8)]
    found: list[tuple[int, int, int]] = []
    for _ in range(8):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        trained = [p for _, p in st.trainable_parameters(model)]
        state = [v for p in trained for v in optimizer.state[p].values() if torch.is_tensor(v)]
        numbers = (trained, [p.grad for p in trained], state)
        found.append(tuple(sum(t.numel() for t in part) for part in numbers))  # type: ignore[misc]
    for one in attached:
        one.finish()
    return dict(
        zip(("parameters", "gradients", "optimizer"), map(list, zip(found[0], found[-1], strict=True)), strict=True)
    )


def table() -> str:
    """What was measured."""
    known = json.loads(RESULT.read_text())
    lines = ["| controller | an ordinary step, ms | a round, ms | passes of the step before it, ms more |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    for name, row in known["controllers"].items():
        cells = [_shown(row[key]) for key in ("ordinary_ms", "round_ms", "passes_ms")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| calibration, per batch | in steps of LoRA | MiB kept for backward |", "| --- | ---: | ---: |"]
    for name, row in known["calibration"].items():
        lines.append(f"| {name.replace('|', chr(92) + '|')} | {row['ratio']:.2f} | {row['kept_mb']:.0f} |")
    lines += ["", "| AdaLoRA, numbers held | at rank 12 | pruned to 8 |", "| --- | ---: | ---: |"]
    lines += [f"| {what} | {before:,} | {after:,} |" for what, (before, after) in known["left"].items()]
    return "\n".join(lines) + "\n"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true")
    if parser.parse_args(arguments).page:
        print(table())
        return
    torch.set_num_threads(1)
    found = {
        "command": "python -m bench.costs",
        "controllers": {name: controllers(recipe) for name, recipe in recipes().items()},
        "calibration": calibration(),
        "left": left(),
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(table())


if __name__ == "__main__":
    main()
