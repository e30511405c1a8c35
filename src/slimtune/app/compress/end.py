"""The end of a compression: files written, read back and compared, and what was measured put into words."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor, nn

import slimtune as st
from slimtune.app import intervals
from slimtune.app.compress.command import CompressResult, peak_memory
from slimtune.app.compress.config import CALIBRATED, CompressConfig
from slimtune.app.compress.measure import evaluating, to_device
from slimtune.app.compress.plan import Layer, Plan, share
from slimtune.app.compress.state import CONFIG, RECORD, writing
from slimtune.app.setup import write_text
from slimtune.app.verdict import say as digits
from slimtune.errors import VerificationError

if TYPE_CHECKING:
    from slimtune.app.compress.command import _Compression

MODEL, DENSE = "model", "dense"
SAME = {torch.float64: 1e-12, torch.float32: 1e-5}  # of the outputs: orders of summation
HALF = 1e-2


def finish(
    job: _Compression,
    plan: Plan,
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
    times: dict[str, Any],
) -> CompressResult:
    """Write model/ and dense/, hold both against the model in memory, write the record and the report.

    Raises:
        VerificationError: what is read back computes something else; nothing is left of it.
        SlimtuneError: the folder cannot be written.
    """
    cfg = job.resolved
    facts = {"method": cfg.method, "keep": cfg.keep, "ranks": {x.name: x.rank for x in plan.chosen}}
    st.save_compressed(job.model, job.out / MODEL, processing=_processing(job), facts=facts)
    checked: dict[str, float | None] = {MODEL: _check(job)}
    problem = None
    if cfg.dense:
        try:
            checked[DENSE] = _write_dense(job)
        except st.StructureError as error:
            problem = f"no dense/: {error}"
            job.notes.append(problem)
    record = make_record(cfg, plan, before, after, times, job.notes, _about(job), size_of(job.out / MODEL))
    record |= {"checked": checked, "seconds": round(time.perf_counter() - job.began, 1)}
    done = close(job.out, cfg, record, job.state.remove)
    if problem is not None:
        raise st.StructureError(f"model/ is complete, but {problem}")
    return done


def close(out: Path, cfg: CompressConfig, record: dict[str, Any], tidy: Any) -> CompressResult:
    """Write compress.yaml, compress.json and the report."""
    from slimtune.app.compress.report import write_report

    record["peak_memory_bytes"] = peak_memory()
    with writing(out):
        write_text(out / CONFIG, yaml.safe_dump(cfg.resolved(), sort_keys=False, allow_unicode=True))
        write_text(out / RECORD, json.dumps(record, indent=1, allow_nan=False, default=str))
    tidy()
    return CompressResult(out, record, report=write_report(out))


def _about(job: _Compression) -> dict[str, Any]:
    task, sizes = job.source.task, [p.numel() * p.element_size() for p in job.source.model.parameters()]
    about: dict[str, Any] = {"source": job.cfg.model_name_or_path or job.cfg.model_factory}
    about["dtype"] = str(next(job.source.model.parameters()).dtype).removeprefix("torch.")
    about["bytes_per_number"] = sum(sizes) / max(1, sum(p.numel() for p in job.source.model.parameters()))
    if task is not None:
        about |= {"metric": task.metric, "task": task.name}
    return about


def _processing(job: _Compression) -> Any:
    """A tokenizer, or the folder that an image model's settings lie in."""
    if hasattr(job.source.processing, "save_pretrained"):
        return job.source.processing
    name = job.cfg.model_name_or_path
    return name if name is not None and Path(name).is_dir() else None


def size_of(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# ---------------------------------------------------------------- read back


def _write_dense(job: _Compression) -> float | None:
    """The model without structures, as transformers stores it; how far its outputs are off."""
    from slimtune.hf.models import quiet

    shutil.rmtree(job.out / DENSE, ignore_errors=True)
    inputs = None
    if job.source.task is not None:
        inputs = {key: t for key, t in _probe(job).items() if key != "labels"}
    with quiet():
        found = st.save_expanded(job.model, job.out / DENSE, processing=_processing(job), inputs=inputs)
    if found.flags:
        job.notes.append(f"dense/: {', '.join(found.flags)} set in its config.json, for the biases that lord adds")
    return found.difference


def _check(job: _Compression) -> float:
    """The relative difference between the outputs of the model in memory and of model/."""
    folder, dtype = job.out / MODEL, next(job.model.parameters()).dtype
    try:
        fresh = _reload(job, folder).to(job.source.device).eval()
    except st.FileFormatError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise VerificationError(f"{folder}: what was written cannot be read back: {error}") from None
    if job.source.forward is None:
        found = _tensors_differ(job.model, fresh)
    else:
        batch = _probe(job)
        with evaluating(job.model):
            a = job.source.forward(job.model, batch).double()
        with torch.no_grad():
            b = job.source.forward(fresh, batch).double()
        found = float((a - b).norm() / a.norm().clamp_min(1e-300))
    allowed = SAME.get(dtype, HALF)
    if not found <= allowed:
        shutil.rmtree(folder, ignore_errors=True)
        raise VerificationError(
            f"{folder}: read back, its outputs differ from those of the model in memory by {found:.2e} of their norm, "
            f"more than {allowed:.0e}; it has been removed"
        )
    return found


def _probe(job: _Compression) -> dict[str, Any]:
    task = job.source.task
    assert task is not None
    rows = task.validation
    return to_device(task.collator([rows[i] for i in range(min(4, len(rows)))]), job.source.device)


def _reload(job: _Compression, folder: Path) -> nn.Module:
    from slimtune.app.tasks.factory import build_factory_model
    from slimtune.hf.models import quiet

    cfg = job.cfg
    if cfg.model_factory is None:
        with quiet():
            return st.load_compressed(folder)
    fresh, _, _ = build_factory_model(cfg.model_factory, cfg.model_options, None, cfg.dtype, cfg.seed)
    return st.load_compressed(folder, fresh)


def _tensors_differ(a: nn.Module, b: nn.Module) -> float:
    """0 if two models have the same tensors, else infinity."""
    left, right = a.state_dict(), b.state_dict()
    same = left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    return 0.0 if same else float("inf")


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())


# ---------------------------------------------------------------- in words


def make_record(
    cfg: CompressConfig,
    plan: Plan,
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
    times: dict[str, Any],
    notes: Sequence[str],
    about: Mapping[str, Any],
    size: int,
) -> dict[str, Any]:
    """The table of compress.json."""
    metric = about.get("metric")
    scores = _scores(before, after, metric)
    return {
        "format": 1,
        "config": cfg.resolved(),
        **about,
        "verdict": sentence(cfg, plan, scores, times, metric),
        "notes": [*notes, *told(cfg, plan, times)],
        "parameters": {
            "layers_before": plan.before,
            "layers_after": plan.after,
            "model_before": plan.model,
            "model_after": plan.model_after,
        },
        "bytes": {"before": round(plan.model * about["bytes_per_number"]), "after": size},
        "scores": scores,
        "latency": times,
        "layers": [asdict(layer) for layer in plan.layers],
    }


def _scores(before: dict[str, Any] | None, after: dict[str, Any] | None, metric: str | None) -> dict[str, Any]:
    """{split: metrics before and after, how many examples changed, and the 95 % interval of the change}."""
    if before is None or after is None or metric is None:
        return {}
    found = {}
    for split, first in before.items():
        last = after[split]
        entry: dict[str, Any] = {"before": first["metrics"], "after": last["metrics"]}
        a, b, n = first["metrics"][metric], last["metrics"][metric], int(first["metrics"]["samples"])
        change = None
        if first["right"]:
            pairs = list(zip(first["right"], last["right"], strict=True))
            entry |= {"gained": sum(q and not p for p, q in pairs), "lost": sum(p and not q for p, q in pairs)}
        if metric == "accuracy" and first["right"]:
            change = intervals.paired(entry["gained"], entry["lost"], n)
        else:
            change = intervals.difference(metric, a, b, n)
        if change is not None:
            entry["change"] = {"value": change.value, "low": change.low, "high": change.high, "tie": change.tie}
        found[split] = entry
    return found


def sentence(
    cfg: CompressConfig, plan: Plan, scores: Mapping[str, Any], times: Mapping[str, Any], metric: str | None
) -> str:
    """The verdict."""
    kept = f"{plan.model:,} -> {plan.model_after:,} parameters ({share(plan.model_after, plan.model)})"
    parts = [f"{cfg.method}: {kept}"]
    split = next((name for name in ("test", "validation") if name in scores), None)
    if split is not None and metric is not None:
        parts.append(_change(scores[split], metric, split))
    if times.get("model"):
        last = times["model"][-1]
        parts.append(f"{_speed(last)} at batch {last['batch']}")
    return "; ".join(parts) + "."


def _change(entry: Mapping[str, Any], metric: str, split: str) -> str:
    a, b = entry["before"][metric], entry["after"][metric]
    n = int(entry["before"]["samples"])
    words = f"{metric} {digits(a)} -> {digits(b)} on {n:,} {split} examples"
    change = entry.get("change")
    if change is None:
        return words + (f" ({(b - a) / abs(a):+.1%})" if a else "")  # no interval, no judgement
    ends = f"95 % interval of the change {change['low']:+.3f} to {change['high']:+.3f}"
    return words + (f", a tie ({ends})" if change["tie"] else f" ({ends})")


def _speed(entry: Mapping[str, Any]) -> str:
    if entry["low"] < 1 < entry["high"]:
        middle = f"{entry['low']:.2f}x to {entry['high']:.2f}x in the middle half of the turns"
        return f"no faster or slower than the timing tells apart ({entry['speed']:.2f}x; {middle})"
    return f"{entry['speed']:.2f} times as fast" if entry["low"] >= 1 else f"slower than dense ({entry['speed']:.2f}x)"


def told(cfg: CompressConfig, plan: Plan, times: Mapping[str, Any]) -> list[str]:
    """What a reader should know before trusting the numbers: what became slower, and what was foretold wrongly."""
    return [*_slower(plan.chosen, times), *_disagreeing(cfg, plan.chosen)]


def _slower(layers: Sequence[Layer], times: Mapping[str, Any]) -> Iterator[str]:
    for entry in times.get("model", ()):
        if entry["high"] < 1:
            yield (
                f"the whole model is slower than dense at batch {entry['batch']}: {1000 * entry['compressed']:.3g} ms, "
                f"dense {1000 * entry['dense']:.3g} ms (medians of {times['runs']})"
            )
    slow = [x for x in layers if x.slower]
    if slow:
        yield (
            f"{len(slow)} of {len(layers)} factorised layers are slower than dense at batch "
            f"{times['model'][-1]['batch']}: {_named(slow, lambda x: x.dense_ms / x.compressed_ms, 'x')}"
        )


def _disagreeing(cfg: CompressConfig, layers: Sequence[Layer]) -> Iterator[str]:
    if cfg.method not in CALIBRATED:
        return
    both = [x for x in layers if x.predicted is not None and x.measured is not None]
    odd = [x for x in both if _apart(x.measured, x.predicted) > cfg.tolerance]
    if odd:
        yield (
            f"the measured error of {len(odd)} of {len(both)} layers is not the predicted one within "
            f"{cfg.tolerance:.0%}: {_named(odd, lambda x: x.measured / max(x.predicted, 1e-30), 'x')}; rounding "
            "to the model's dtype, or a layer that computes other things than W x + b, would do that"
        )


def _apart(measured: float | None, predicted: float | None) -> float:
    assert measured is not None and predicted is not None
    return abs(measured - predicted) / max(predicted, 1e-3)


def _named(layers: Sequence[Layer], value: Any, unit: str) -> str:
    ordered = sorted(layers, key=value)
    shown = ", ".join(f"{x.name} ({value(x):.2f}{unit})" for x in ordered[:3])
    return shown + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
