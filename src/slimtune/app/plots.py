"""The figures of a run report. Each is an SVG that follows the page's light or dark colours, and a PNG file."""

from __future__ import annotations

import bisect
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimtune.app.record import Record, metric_value, number
from slimtune.app.whole import WHOLE

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
    dashed: bool = False
    held: bool = False
    """A value holds until the next one."""
    weight: float = 1.0
    """How strong its colour is, from 0 to 1."""


@dataclass
class Grid:
    """A map of whole numbers: a row per name, from the top; `values[i][k]` holds from `edges[k]` to `edges[k + 1]`."""

    names: Sequence[str]
    edges: Sequence[float]
    values: Sequence[Sequence[int]]
    unit: str


@dataclass
class Figure:
    """A figure before it is drawn: curves against the step and dashed levels with their labels, or a map."""

    name: str
    title: str
    curves: list[Curve]
    levels: list[tuple[float, str]] = field(default_factory=list)
    log: bool = False
    bars: bool = False
    below: bool = False
    """The legend below the axes."""
    x_label: str = "step"
    grid: Grid | None = None
    moments: list[tuple[float, str]] = field(default_factory=list)
    """Dashed vertical lines at steps at which something happened, with their labels."""
    reach: tuple[float, float] | None = None
    """Steps that are shown; default: those of the curves."""


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
    starts = [number(row.get("start_rank")) for row in rows]
    if len(counts) < 2:
        return None
    moved = any(start is not None and start != rank for start, rank in zip(starts, ranks, strict=True))
    vary = moved or len(set(ranks)) > 1
    kind = "layer" if record.config.get("method") in WHOLE else "adapted layer"
    title = f"Rank of each {kind}" if vary else f"Parameters of each {kind}"
    x = range(1, len(rows) + 1)
    bars = [Curve(x, ranks if vary else counts, "at the end" if moved else "")]
    if moved:
        bars.insert(0, Curve(x, [start or 0.0 for start in starts], "at the start", SHADE))
    return Figure("layers", title, bars, bars=True, x_label="layer, in model order")


FEW = 4  # layers that lines can tell apart
CELLS = 4000  # of a map, at most
SHADES = 12


def ranks(record: Record) -> list[Figure]:
    """The ranks of all layers against the step: a map, or lines for a few layers; and their sum where it changes."""
    steps, history = record.rank_history()
    if all(len(set(values)) == 1 for values in history.values()):
        return []
    end = max(record.step, steps[-1] + 1)
    steps, history = [*steps, end], {name: [*values, values[-1]] for name, values in history.items()}
    title = "Rank of each layer over training"
    if len(history) <= FEW:
        styles = [(color, dashed) for dashed in (False, True) for color in (FIRST, SECOND)]
        lines = [
            Curve(steps, values, _tail(name, 48), color, dashed=dashed, held=True)
            for (name, values), (color, dashed) in zip(history.items(), styles, strict=False)
        ]
        found = [Figure("ranks", title, lines)]
    else:
        found = [Figure("ranks", title, [], grid=_grid(steps, history))]
    totals = [sum(column) for column in zip(*history.values(), strict=True)]
    if len(set(totals)) > 1:
        found.append(Figure("total_rank", "Ranks of all layers together", [Curve(steps, totals, held=True)]))
    return found


def stable_ranks(record: Record) -> Figure | None:
    """The stable ranks that layers were watched by, and the step at which they were factorised."""
    history, chosen = record.stable_ranks()
    history = {name: series for name, series in history.items() if len(series[0]) > 1}
    if not history:
        return None
    names, last = list(history), len(history) - 1
    if len(names) <= FEW:
        styles = [(color, dashed) for dashed in (False, True) for color in (FIRST, SECOND)]
        lines = [
            Curve(*history[name], _tail(name, 48), color, dashed=dashed)
            for name, (color, dashed) in zip(names, styles, strict=False)
        ]
    else:
        ends = {0: f"{_tail(names[0], 40)} (first)", last: f"{_tail(names[last], 40)} (last)"}
        lines = [
            Curve(*history[name], ends.get(i, ""), faint=i not in ends, weight=0.25 + 0.75 * i / last)
            for i, name in enumerate(names)
        ]
    moments = [] if chosen is None else [(float(chosen), "factorised")]
    title, reach = "Stable rank of each layer over training", (0, record.step)
    return Figure("stable_ranks", title, lines, below=True, moments=moments, reach=reach)


def _grid(steps: Sequence[int], history: Mapping[str, Sequence[int]]) -> Grid:
    """The map of a history: its own steps as columns or, where they are too many, evenly spaced ones, each with the
    ranks at its end."""
    columns, most = len(steps) - 1, max(20, CELLS // len(history))
    if columns <= most:
        edges: list[float] = [float(step) for step in steps]
        chosen = list(range(columns))
    else:
        edges = [steps[0] + (steps[-1] - steps[0]) * k / most for k in range(most + 1)]
        chosen = [bisect.bisect_right(steps, edge) - 1 for edge in edges[1:]]
    return Grid(list(history), edges, [[values[k] for k in chosen] for values in history.values()], "rank")


def _short(names: Sequence[str]) -> list[str]:
    """Names without the modules that all of them lie in."""
    parts = [name.split(".") for name in names]
    same = 0
    while all(len(part) > same + 1 and part[same] == parts[0][same] for part in parts):
        same += 1
    return [".".join(part[same:]) for part in parts]


def _tail(name: str, length: int) -> str:
    return name if len(name) <= length else "…" + name[1 - length :]


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
        canvas = Canvas(figsize=(WIDTH, _height(figure)), layout="constrained")
        if figure.grid is None:
            axes = canvas.add_subplot()
            _draw_curves(axes, figure)
        else:
            axes, scale = canvas.subplots(1, 2, width_ratios=(40, 1))
            _draw_grid(axes, scale, figure.grid)
        axes.spines["bottom"].set_color(LINE)
        axes.set_xlabel(figure.x_label, color=INK, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        stream = io.StringIO()
        canvas.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        if png is not None:
            png.parent.mkdir(parents=True, exist_ok=True)
            axes.set_title(figure.title, color=INK, fontsize=11, loc="left")
            canvas.savefig(png, dpi=160, facecolor="white", metadata={"Software": None})
    return _inline(stream.getvalue(), figure.title)


def _height(figure: Figure) -> float:
    rows = len(figure.grid.names) if figure.grid else 0
    labels = [curve for curve in figure.curves if curve.label and (figure.below or curve.held)]
    below = 0.2 * len(labels) + (0.2 if figure.below and figure.moments else 0.0)
    return min(max(HEIGHT, 0.9 + (0.2 if rows <= NAMED else 0.05) * rows), 2 * HEIGHT) + below


def _draw_curves(axes: Any, figure: Figure) -> None:
    from matplotlib.ticker import MaxNLocator

    for edge in ("top", "right", "left"):
        axes.spines[edge].set_visible(False)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, labelsize=10)
    for i, curve in enumerate(figure.curves):
        if figure.bars:
            axes.bar(curve.x, curve.y, color=curve.color, width=0.4 if i else 0.8, label=curve.label or None)
        else:
            axes.plot(
                curve.x,
                curve.y,
                color=curve.color,
                linewidth=1.0 if curve.faint else 2.0,
                alpha=curve.weight,
                linestyle=(0, (3, 2)) if curve.dashed else "-",
                drawstyle="steps-post" if curve.held else "default",
                marker="o" if curve.marks else None,
                markersize=4.5,
                label=curve.label or None,
            )
    for level, label in figure.levels:
        axes.axhline(level, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label=label)
    if figure.reach:
        axes.set_xlim(*figure.reach)
    for step, label in figure.moments:
        axes.axvline(step, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label=label)
    if figure.log:
        axes.set_yscale("log")
    else:
        whole = figure.bars or any(curve.held for curve in figure.curves)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=whole))
        axes.yaxis.set_major_formatter(_tick)
    if any(curve.label for curve in figure.curves) or figure.levels or figure.moments:
        filled = figure.below or figure.bars or any(curve.held for curve in figure.curves)  # no room inside
        style: dict[str, Any] = {"frameon": False, "labelcolor": INK, "fontsize": 10}
        if filled:
            legend = axes.figure.legend(loc="outside lower left", ncols=2 if figure.bars else 1, **style)
        else:
            legend = axes.legend(**style)
        for text in legend.get_texts():
            text.set_parse_math(False)


NAMED = 16  # rows that are labelled with their names


def _draw_grid(axes: Any, scale: Any, grid: Grid) -> None:
    """Equal neighbours in a row are one bar; all bars of a shade are one path. The shade says how much."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline
    from matplotlib.ticker import MaxNLocator

    low, high = (pick(value for row in grid.values for value in row) for pick in (min, max))
    step = max(1, math.ceil((high - low + 1) / SHADES))  # numbers that share a shade
    count = (high - low) // step + 1
    shades = [0.12 + 0.88 * (k + 1) / count for k in range(count)]
    bars: list[list[tuple[float, float, float, float]]] = [[] for _ in shades]
    gap = 0.08 if len(grid.names) <= 40 else 0.0
    for row, values in enumerate(grid.values):
        begin = 0
        for k in range(1, len(values) + 1):
            if k == len(values) or (values[k] - low) // step != (values[begin] - low) // step:
                bars[(values[begin] - low) // step].append(
                    (grid.edges[begin], grid.edges[k], row - 0.5 + gap, row + 0.5 - gap)
                )
                begin = k
    codes = [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY]
    codes.insert(2, Outline.LINETO)
    for shade, boxes in zip(shades, bars, strict=True):
        corners = [p for x, X, y, Y in boxes for p in ((x, y), (X, y), (X, Y), (x, Y), (x, y))]
        if corners:
            outline = Outline(corners, codes * len(boxes))
            axes.add_patch(PathPatch(outline, facecolor=FIRST, alpha=shade, linewidth=0))
    axes.set_xlim(grid.edges[0], grid.edges[-1])
    axes.set_ylim(len(grid.names) - 0.5, -0.5)
    if len(grid.names) <= NAMED:
        axes.set_yticks(range(len(grid.names)), [_tail(name, 26) for name in _short(grid.names)], parse_math=False)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value + 1:.0f}")
        axes.set_ylabel("layer, in model order", color=INK, fontsize=10)
    for k, shade in enumerate(shades):
        scale.bar(0, step, bottom=low + k * step - 0.5, width=1, color=FIRST, alpha=shade, linewidth=0)
    scale.set_xlim(-0.5, 0.5)
    scale.set_ylim(low - 0.5, low + count * step - 0.5)
    scale.set_xticks([])
    scale.yaxis.tick_right()
    scale.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    scale.set_title(grid.unit, color=INK, fontsize=10)
    for part in (axes, scale):
        part.tick_params(colors=INK, length=0, labelsize=10 if part is scale else 9)
        for edge in part.spines.values():
            edge.set_visible(False)


def _tick(value: float, _: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _rounded(path: str) -> str:
    """A path's numbers to a hundredth of a point, without line breaks."""
    return re.sub(r"(\.\d\d)\d+", r"\1", " ".join(path.split()))


def _inline(svg: str, title: str) -> str:
    """Cut an SVG file down to what a page embeds: no prologue, no metadata, no group ids, colours by variable."""
    from html import escape

    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r' d="([^"]*)"', lambda path: f' d="{_rounded(path[1])}"', svg)
    svg = re.sub(r"font: ([0-9.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    size = re.search(r'viewBox="([^"]*)"', svg)
    box = size[1] if size else f"0 0 {72 * WIDTH} {72 * HEIGHT}"
    label = escape(title, quote=True)
    return re.sub(r"<svg[^>]*>", f'<svg viewBox="{box}" role="img" aria-label="{label}">', svg, count=1).strip()
