"""`slimtune compress`: a model in, a model of fewer numbers out, with what that cost measured."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.app.compress import state as compress_state
from slimtune.app.compress.config import CompressConfig
from slimtune.app.signals import StopRequest

if TYPE_CHECKING:
    from torch import nn

    from slimtune.app.compress.plan import Layer, Plan
    from slimtune.app.compress.source import Source
    from slimtune.app.compress.state import State


class Stopped(Exception):
    """A signal asked for an end, and everything finished has been kept."""


@dataclass
class CompressResult:
    """What a compression came to. `interrupted`: stopped by a signal, to be continued by the same command."""

    output_dir: Path
    record: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False
    report: Path | None = None


def compress(cfg: CompressConfig) -> CompressResult:
    """Plan, factorise, measure, save, reload and compare; continue where an earlier call was stopped.

    The output folder holds model/ (for `st.load_compressed` and `slimtune train`), with `dense` also dense/, and
    compress.json, compress.yaml, report.html; while at work also state/.

    Raises:
        ConfigError, DataError, TargetError, FileFormatError: before anything is written.
        VerificationError: what was written is not what was computed.
        SlimtuneError: the folder cannot be written.
    """
    from slimtune.app.compress.source import settled

    with StopRequest() as stop:
        if (record := compress_state.finished(cfg)) is not None:
            print(f"{cfg.output_dir} is finished; resume=false compresses again", file=sys.stderr)
            page = Path(cfg.output_dir) / "report.html"
            return CompressResult(Path(cfg.output_dir), record, report=page if page.exists() else None)
        chosen = settled(cfg)
        try:
            if chosen.dataset_name is None and chosen.model_factory is None:
                from slimtune.app.compress.shards import compress_shards

                return compress_shards(cfg, chosen, stop)
            return _Compression(cfg, chosen, stop).run()
        except Stopped:
            return CompressResult(Path(cfg.output_dir), interrupted=True)


@contextmanager
def going(stop: StopRequest, what: str) -> Iterator[Callable[[int, int], None]]:
    """Within: progress(done, total) is shown, and raises Stopped after a signal."""
    from slimtune.app.calibration import meter

    with meter(what) as show:

        def progress(done: int, total: int) -> None:
            show(done, total)
            if stop.signal:
                raise Stopped

        yield progress


def say(line: str) -> None:
    """One line of progress."""
    print(line, file=sys.stderr, flush=True)


class _Compression:
    """One call of `compress` with the model in memory."""

    def __init__(self, cfg: CompressConfig, chosen: CompressConfig, stop: StopRequest) -> None:
        from slimtune.app import setup
        from slimtune.app.compress.source import open_source
        from slimtune.app.compress.statistics import Statistics

        self.cfg, self.stop, self.began = chosen, stop, time.perf_counter()
        self.out = Path(cfg.output_dir)
        setup.check_folder(self.out)
        self.source: Source = open_source(chosen)
        self.state: State = compress_state.State(cfg)
        if self.state.continued:
            say(f"continuing in {self.out}")
        self.statistics = Statistics(self)
        self.resolved = cfg
        self.dense: dict[str, nn.Module] = {}
        self.twins: dict[str, nn.Module] = {}
        self.notes: list[str] = []
        self._batches: list[dict[str, Any]] = []

    @property
    def model(self) -> nn.Module:
        return self.source.model

    def run(self) -> CompressResult:
        from slimtune.app.compress.end import finish

        self.stop.deferred = True
        plan = self.plan()
        print(plan)
        self._check_room(plan)
        if self.cfg.plan_only:
            return CompressResult(self.out, {"plan": [asdict(layer) for layer in plan.layers]})
        before = self.scores("before")
        self.factorise(plan)
        self.measure(plan)
        times = self.times(plan)
        self.take(self.twins)
        after = self.scores("after")
        return finish(self, plan, before, after, times)

    # ---- the plan

    def plan(self) -> Plan:
        from slimtune.app.compress import plan as planning
        from slimtune.app.compress.statistics import allocated

        reasons = planning.find_layers(self.model, self.cfg)
        given = planning.explicit(self.cfg, reasons)
        self.statistics.collect([name for name, reason in reasons.items() if not reason or name in given])
        numbers = sum(p.numel() for p in self.model.parameters())
        plan = planning.new_plan(reasons, self.statistics.price, numbers)
        free, keep = planning.shared_out(self.cfg, plan, given)
        weights = self.statistics.weights(free, keep)
        planning.decide(plan, allocated(self.cfg, free, keep, weights), given)
        return plan

    def _check_room(self, plan: Plan) -> None:
        import shutil

        from slimtune.errors import SlimtuneError

        size = next(p.element_size() for p in self.model.parameters())
        need = size * (2 * plan.model_after + (plan.model if self.cfg.dense else 0))
        free = shutil.disk_usage(self.out).free
        if free < need:
            raise SlimtuneError(
                f"output_dir: the layers and the model take about {need / 2**20:,.0f} MiB, but {self.out} has "
                f"{free / 2**20:,.0f} MiB free"
            )

    # ---- data

    def calibration(self) -> list[dict[str, Any]]:
        """Batches of the calibration examples, in an order drawn from the data seed."""
        import torch

        from slimtune.app.compress.measure import batches

        cfg, task = self.cfg, self.source.task
        assert task is not None
        if not self._batches:
            seed = cfg.seed if cfg.data_seed is None else cfg.data_seed
            order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed)).tolist()
            chosen = order[: cfg.calibration_samples]
            self._batches = list(batches(task, task.train, chosen, cfg.per_device_eval_batch_size))
        return self._batches

    def scores(self, when: str) -> dict[str, Any] | None:
        """The task's metrics by split, from the state if they were measured before."""
        from slimtune.app.compress.measure import score

        task = self.source.task
        if task is None:
            return None
        if task.fresh:
            if when == "before":
                self.notes.append(f"no scores: {', '.join(task.fresh)} of the model is newly drawn, not trained")
            return None
        if (known := self.state.value(when)) is not None:
            return dict(known)
        found: dict[str, Any] = {}
        for split, rows in (("validation", task.validation), ("test", task.test)):
            if rows is not None:
                with going(self.stop, f"scoring {when}") as progress:
                    found[split] = asdict(
                        score(task, rows, self.cfg.per_device_eval_batch_size, self.source.device, progress)
                    )
        self.state.keep_value(when, found)
        return found

    # ---- the layers

    def factorise(self, plan: Plan) -> None:
        """Make or take from the state what replaces every chosen layer."""
        blocks = self.statistics.blocks(plan.chosen)
        done = 0
        with going(self.stop, "factorising") as progress:
            for block in blocks:
                missing = [layer.name for layer in block if self.state.note(f"layer/{layer.name}") is None]
                if self.cfg.sequential and missing:
                    self.statistics.renew(missing)
                for layer in block:
                    if layer.name in missing and self.cfg.sequential:
                        layer.predicted = self.statistics.predicted(layer)
                    self.one(layer)
                    done += 1
                    progress(done, len(plan.chosen))
                if self.cfg.sequential:
                    self.measure_outputs(block)
                    self.take({layer.name: self.twins[layer.name] for layer in block})

    def one(self, layer: Layer) -> None:
        """A layer's twin, which holds a structure in its weight's place."""
        from slimtune.app.compress.layer import read_layer, write_layer
        from slimtune.factors import Replacement
        from slimtune.substitutes import substitute

        module = self.model.get_submodule(layer.name)
        known = read_layer(self.state, layer, module)
        if known is None:
            structure, bias = self.statistics.replacement(layer, module)
            known = write_layer(self.state, layer, module, structure, bias)
        structure, bias, layer.weight, layer.predicted = known
        layer.after = sum(p.numel() for p in structure.parameters())
        own = module._parameters.get("bias")
        layer.after += bias.numel() if bias is not None else 0 if own is None else own.numel()
        self.dense[layer.name] = module
        self.twins[layer.name] = substitute(module, Replacement(structure, bias)).eval()

    def take(self, modules: Mapping[str, nn.Module]) -> None:
        """Put modules into the model."""
        from slimtune.app.compress.measure import exchange

        exchange(self.model, modules)

    # ---- measurements

    def measure(self, plan: Plan) -> None:
        if self.source.task is not None and not self.cfg.sequential:
            self.measure_outputs(plan.chosen)

    def measure_outputs(self, layers: Sequence[Layer]) -> None:
        """The error of every layer's outputs on the calibration examples."""
        from slimtune.calibrate import errors

        known = self.state.value("measured") or {}
        missing = {layer.name: self.twins[layer.name] for layer in layers if layer.name not in known}
        if missing:
            assert self.source.forward is not None
            with going(self.stop, "measuring") as progress:
                found = errors(self.model, missing, self.calibration(), forward=self.source.forward, progress=progress)
            known |= {name: (error / max(energy, 1e-300)) ** 0.5 for name, (error, energy) in found.items()}
            self.state.keep_value("measured", known)
        for layer in layers:
            layer.measured = known[layer.name]

    def times(self, plan: Plan) -> dict[str, Any]:
        """Seconds of the dense and the compressed model, and of every layer."""
        from slimtune.app.compress.measure import latency, layer_latencies, to_device

        task, cfg, source = self.source.task, self.cfg, self.source
        if task is None or not cfg.latency_runs:
            return {}
        assert source.forward is not None
        if cfg.sequential:
            self.take(self.dense)
        found: dict[str, Any] = {"runs": cfg.latency_runs, "model": []}
        rows = task.validation
        for size in sorted({1, min(cfg.per_device_eval_batch_size, len(rows))}):
            batch = to_device(task.collator([rows[i] for i in range(size)]), source.device)
            done = latency(source.model, self.twins, batch, source.forward, cfg.latency_runs, source.device)
            found["model"].append({"batch": size, **asdict(done), "speed": done.speed})
        each = layer_latencies(source.model, self.twins, batch, source.forward, cfg.latency_runs, source.device)
        for layer in plan.chosen:
            if layer.name in each:
                pair = each[layer.name]
                layer.dense_ms, layer.compressed_ms = 1000 * pair.dense, 1000 * pair.compressed
                layer.slower = pair.high < 1
        return found


def closing_lines(result: CompressResult) -> Iterator[str]:
    """The table of what was measured, what to know about it, and the verdict."""
    from slimtune.app.compress.plan import Layer, table

    record = result.record
    if "verdict" not in record:
        return
    layers = [Layer(**{**entry, "shape": tuple(entry["shape"])}) for entry in record["layers"]]
    yield from table(layers)
    for entry in record["latency"].get("model", ()):
        yield (
            f"batch {entry['batch']}: {1000 * entry['compressed']:.3g} ms, dense {1000 * entry['dense']:.3g} ms "
            f"({entry['speed']:.2f}x)"
        )
    for note in record["notes"]:
        yield f"note: {note}"
    size = record["bytes"]
    yield f"weights: {size['after'] / 1e6:.2f} MB in {result.output_dir / 'model'}, dense {size['before'] / 1e6:.2f} MB"
    if "memory" in record:
        stated, measured = (record["memory"][key] / 2**20 for key in ("stated", "measured"))
        yield f"memory: {measured:,.0f} MiB beyond what the program took at its start, {stated:,.0f} MiB stated"
    if result.report:
        yield f"report: {result.report}"
    yield f"verdict: {record['verdict']}"


def peak_memory() -> int:
    """Bytes: of the device, or of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
