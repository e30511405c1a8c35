"""The figures of a run report. Each is an SVG that follows the page's light or dark colours, and a PNG file."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slimtune.app.record import Record, metric_value, number

INK, LINE, FIRST, SECOND, SHADE = "#1f2430", "#d8dce4", "#2457c5", "#c2541b", "#8fa9dc"
VARIABLES = {INK: "--muted", LINE: "--line", FIRST: "--accent", SECOND: "--second", SHADE: "--shade"}
WIDTH, HEIGHT = 5.4, 2.9  # inches


@dataclass
class Curve:
    """One line of a figure; `marks` draws its points too."""

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    color: str = FIRST
    marks: bool = False
    faint: bool = False


@dataclass
class Figure:
    """A figure before it is drawn: curves against the step, and dashed horizontal levels with their labels."""

    name: str
    title: str
    curves: list[Curve]
    levels: list[tuple[float, str]] = field(default_factory=list)
    log: bool = False
    bars: bool = False
    x_label: str = "step"


def curves(record: Record, metric: str | None) -> list[Figure]:
    """Loss, metric, learning rate and gradient norm against the step, as far as there is data."""
    found = []
    loss, held_out = record.series("loss"), record.series("loss", record.evaluations)
    lines = []
    if len(loss[1]) > 30:
        lines += [Curve(*loss, color=SHADE, faint=True), Curve(loss[0], smooth(loss[1]), "training (smoothed)")]
    elif loss[1]:
        lines.append(Curve(*loss, "training", marks=len(loss[1]) < 3))
    if held_out[1]:
        lines.append(Curve(*held_out, "validation", SECOND, marks=True))
    if lines:
        found.append(Figure("loss", "Loss", lines))
    if metric and metric != "loss":
        values = record.series(metric, record.evaluations)
        base = metric_value(record.metrics.get("base"), metric)
        if values[1]:
            levels = [(base, "before training")] if base is not None else []
            found.append(Figure("metric", f"Validation {metric}", [Curve(*values, color=SECOND, marks=True)], levels))
    for key, title in (("learning_rate", "Learning rate"), ("grad_norm", "Gradient norm")):
        series = record.series(key)
        if len(series[1]) > 1:
            positive = [v for v in series[1] if v > 0]
            wide = key == "grad_norm" and bool(positive) and max(positive) > 30 * min(positive)
            found.append(Figure(key, title, [Curve(*series)], log=wide))
    return found


def layers(record: Record) -> Figure | None:
    """Each layer's rank where ranks differ, else its number of parameters; None for fewer than two layers.

    Modules trained in full, which would dwarf the rest, are left to the table.
    """
    rows = [row for row in record.ranks if number(row.get("rank")) is not None] or record.ranks
    counts = [number(row.get("parameters")) or 0.0 for row in rows]
    ranks = [number(row.get("rank")) or 0.0 for row in rows]
    if len(counts) < 2:
        return None
    vary = len(set(ranks)) > 1
    title = "Rank of each adapted layer" if vary else "Parameters of each adapted layer"
    values = ranks if vary else counts
    return Figure(
        "layers", title, [Curve(range(1, len(values) + 1), values)], bars=True, x_label="layer, in model order"
    )


def smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average without the bias of its start."""
    total = norm = 0.0
    result = []
    for value in values:
        total, norm = weight * total + value, weight * norm + 1
        result.append(total / norm)
    return result


def draw(figure: Figure, png: Path | None = None) -> str:
    """The figure as inline SVG, its colours CSS variables; also written to `png` (white, 160 dpi) if given.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    style = {"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": figure.name, "font.family": "sans-serif"}
    with rc_context(style):
        canvas = Canvas(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = canvas.add_subplot()
        for edge in ("top", "right", "left"):
            axes.spines[edge].set_visible(False)
        axes.spines["bottom"].set_color(LINE)
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, length=0, labelsize=10)
        axes.set_xlabel(figure.x_label, color=INK, fontsize=10)
        for curve in figure.curves:
            if figure.bars:
                axes.bar(curve.x, curve.y, color=FIRST, width=0.8)
            else:
                axes.plot(
                    curve.x,
                    curve.y,
                    color=curve.color,
                    linewidth=1.0 if curve.faint else 2.0,
                    marker="o" if curve.marks else None,
                    markersize=4.5,
                    label=curve.label or None,
                )
        for level, label in figure.levels:
            axes.axhline(level, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label=label)
        if figure.log:
            axes.set_yscale("log")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
            axes.yaxis.set_major_formatter(_tick)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        if any(curve.label for curve in figure.curves) or figure.levels:
            axes.legend(frameon=False, labelcolor=INK, fontsize=10)
        stream = io.StringIO()
        canvas.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        if png is not None:
            png.parent.mkdir(parents=True, exist_ok=True)
            axes.set_title(figure.title, color=INK, fontsize=11, loc="left")
            canvas.savefig(png, dpi=160, facecolor="white", metadata={"Software": None})
    return _inline(stream.getvalue(), figure.title)


def _tick(value: float, _: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _inline(svg: str, title: str) -> str:
    """Cut an SVG file down to what a page embeds: no prologue, no metadata, no group ids, colours by variable."""
    from html import escape

    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: ([0-9.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    size = re.search(r'viewBox="([^"]*)"', svg)
    box = size[1] if size else f"0 0 {72 * WIDTH} {72 * HEIGHT}"
    label = escape(title, quote=True)
    return re.sub(r"<svg[^>]*>", f'<svg viewBox="{box}" role="img" aria-label="{label}">', svg, count=1).strip()
