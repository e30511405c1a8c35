"""The lines that end a training run on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimtune.app.train import RunResult


def closing_lines(result: RunResult) -> Iterator[str]:
    """Scores before and after, what trained, what was written."""
    found: dict[str, Any] = result.metrics
    metric = found.get("metric", "loss")
    for split, before in (("validation", "base"), ("test", "base_test")):
        scores = found.get(split)
        if scores and metric in scores:
            base = found.get(before)
            start = f"   before {base[metric]:.4f}" if base and metric in base else ""
            yield f"{split} {metric}: {scores[metric]:.4f}{start}   ({scores.get('samples', 0):,} examples)"
    trained, total = found.get("trainable_parameters", 0), found.get("total_parameters", 0)
    if total:
        yield f"trained {trained:,} of {total:,} parameters ({trained / total:.2%})"
    if "adapter_bytes" in found:
        yield f"weights: {found['adapter_bytes'] / 1e6:.2f} MB in {result.output_dir}"
    if result.report:
        yield f"report: {result.report}"
