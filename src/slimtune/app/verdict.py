"""What a run achieved, in one sentence that its counts support: better, worse, a tie, or simply measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from slimtune.app.intervals import Difference, difference, interval, paired
from slimtune.app.record import Record, metric_value, number, rises

NAMES = {
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "full": "Full fine-tuning",
    "head": "A trained head",
    "trp": "TRP",
    "cuttlefish": "Cuttlefish",
}


@dataclass(frozen=True)
class Score:
    """A metric on held-out examples; `ends` is its 95 % interval, n the examples, where known."""

    name: str
    value: float
    n: int | None = None
    ends: tuple[float, float] | None = None


@dataclass
class Verdict:
    """One sentence, further sentences, and the scores they rest on."""

    sentence: str
    metric: str | None = None
    scores: list[Score] = field(default_factory=list)
    details: list[str] = field(default_factory=list)


def judge(record: Record) -> Verdict:
    """The verdict on a run.

    The test set decides where it was measured, else the validation set. It is compared with ``metrics["baseline"]``
    ({"name", <metric>, and "gained" and "lost" where both were judged on the same examples), else with the untouched
    model: ``metrics["base_test"]`` or ``metrics["base"]``.
    """
    metrics = record.metrics
    metric = metrics.get("metric") if isinstance(metrics.get("metric"), str) else None
    part = "test" if metric and metric_value(metrics.get("test"), metric) is not None else "validation"
    after = metric_value(metrics.get(part), metric) if metric else None
    if metric is None or after is None:
        return Verdict(_unfinished(record), metric or _main_metric(record))
    n = record.examples(part)
    examples = f"{n:,} {part} examples" if n else f"the {part} set"
    final = Score(f"after, {part}", after, n, interval(metric, after, n))
    if part == "test" and (value := metric_value(metrics.get("validation"), metric)) is not None:
        count = record.examples("validation")
        final_scores = [final, Score("after, validation", value, count, interval(metric, value, count))]
    else:
        final_scores = [final]
    baseline, name = _baseline(metrics, metric, part)
    if baseline is None:
        sentence = f"{method_phrase(record)}: {metric} {say(after)} on {examples}{_between(final.ends)}."
        return Verdict(sentence, metric, final_scores)
    before = metric_value(baseline, metric)
    assert before is not None
    first = Score(name, before, n, interval(metric, before, n))
    change = _change(baseline, metric, before, after, n)
    conclusion = _conclusion(metric, change, before, after)
    sentence = f"{method_phrase(record)}: {metric} {say(before)} → {say(after)} on {examples}{conclusion}."
    return Verdict(sentence, metric, [first, *final_scores], _explain(baseline, change, name))


def say(value: float) -> str:
    """A score or loss with the digits worth reading."""
    if value == 0 or 1e-3 <= abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:,.4g}" if 10 <= abs(value) < 1e5 else f"{value:.2e}"


def method_phrase(record: Record) -> str:
    """`LoRA on 0.9 % of the weights`."""
    method = str(record.metrics.get("method") or record.config.get("method") or "Training")
    name = NAMES.get(method, method)
    trainable, total = (number(record.metrics.get(key)) for key in ("trainable_parameters", "total_parameters"))
    if not trainable or not total:
        return name
    share = 100 * trainable / total
    return f"{name} on {share:.2g} % of the weights" if share < 99.5 else f"{name} on all weights"


def _main_metric(record: Record) -> str | None:
    wanted = record.config.get("metric_for_best_model")
    names = [wanted, "accuracy", "pearson", "matthews_correlation", "mcc", "perplexity", "loss"]
    known = {key.removeprefix("eval_") for event in record.evaluations for key in event}
    return next((str(name) for name in names if name in known), None)


def _unfinished(record: Record) -> str:
    step = f"step {record.step:,}"
    what = {
        "empty": "nothing has been trained yet",
        "diverged": f"the run diverged at {step} and has no score",
        "finished": "the run finished; its metrics are missing",
    }.get(record.state, f"{step} reached, no final score yet")
    return f"{method_phrase(record)}: {what}."


def _baseline(metrics: dict[str, Any], metric: str, part: str) -> tuple[dict[str, Any] | None, str]:
    given = metrics.get("baseline")
    if isinstance(given, dict) and metric_value(given, metric) is not None:
        return given, str(given.get("name") or "baseline")
    base = metrics.get("base_test" if part == "test" else "base")
    if isinstance(base, dict) and metric_value(base, metric) is not None:
        return base, "before"
    return None, ""


def _change(baseline: dict[str, Any], metric: str, before: float, after: float, n: int | None) -> Difference | None:
    gained, lost = number(baseline.get("gained")), number(baseline.get("lost"))
    if metric == "accuracy" and gained is not None and lost is not None and n:
        return paired(int(gained), int(lost), n)
    return difference(metric, before, after, n)


def _conclusion(metric: str, change: Difference | None, before: float, after: float) -> str:
    better = (after > before) == rises(metric)
    if change is None:
        return ": unchanged" if after == before else ": better" if better else ": worse"
    ends = f"95 % interval of the change {change.low:+.3f} to {change.high:+.3f}"
    if change.tie:
        return f": a tie ({ends})"
    return f" ({ends})" if better else f": worse ({ends})"


def _between(ends: tuple[float, float] | None) -> str:
    return f" (95 % interval {say(ends[0])} to {say(ends[1])})" if ends else ""


def _explain(baseline: dict[str, Any], change: Difference | None, name: str) -> list[str]:
    if "gained" in baseline and "lost" in baseline and change is not None:
        return [
            f"Compared with {name}: {baseline['gained']} examples became right and {baseline['lost']} became wrong "
            "(exact test on the pairs)."
        ]
    return [f"Compared with {name}."] if name not in ("before", "") else []
