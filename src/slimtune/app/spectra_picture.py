"""The picture of `inspect`: the singular values of every layer, and what ranks would save against what they cost."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimtune.app.plots import FIRST, INK, LINE, SECOND
from slimtune.app.spectra import ENERGIES, Spectrum, cheapest, evenly, together, worths
from slimtune.errors import ConfigError

SUFFIXES = (".png", ".svg")
COLORS = (FIRST, SECOND, "#2f8f5b", "#8a4fbf", "#b8912b", "#3f9fb5", "#9a3d64")
LAST = "#8a93a3"  # of the kinds beyond those
TAILS = [10 ** (-4 + 3.95 * i / 80) for i in range(81)]  # 1 - energy
FLOOR = 1e-3  # of s / s_1 that is shown


def check_picture(path: Path) -> None:
    """Raise ConfigError for a file that could not be drawn, before anything is computed."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--picture: expected a name that ends with {' or '.join(SUFFIXES)}, got {path.name!r}")
    if not path.parent.is_dir():
        raise ConfigError(f"--picture: no such folder: {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--picture: matplotlib is not installed; pip install 'slimtune[report]'") from None


def kind_of(name: str) -> str:
    """What layers of a stack have in common: the name without numbers and without what comes before the last of them.

    Example:
        >>> kind_of("model.layers.3.mlp.up_proj.weight"), kind_of("layer2.0.conv1.weight"), kind_of("0.weight")
        ('mlp.up_proj', 'conv1', '0')
    """
    name = name.removesuffix(".weight")
    return re.split(r"(?:^|\.)\d+\.", name)[-1]


def draw(spectra: dict[str, Spectrum], path: Path, adapter: bool) -> None:
    """Write the picture, complete or not at all; of an adapter, dW's."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "spectra", "font.family": "sans-serif"}
    with rc_context(style):
        canvas = Figure(figsize=(10.4, 4.4), layout="constrained")
        left, right = canvas.subplots(1, 2)
        for axes in (left, right):
            for edge in ("top", "right", "left"):
                axes.spines[edge].set_visible(False)
            axes.spines["bottom"].set_color(LINE)
            axes.grid(axis="y", color=LINE, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(colors=INK, length=0, which="both")
        _spectra(left, spectra, adapter)
        _price(right, list(spectra.values()), adapter)
        beside = path.with_name(f".{path.name}.new{path.suffix.lower()}")
        try:
            metadata = {"Date": None} if path.suffix.lower() == ".svg" else {"Software": None}
            canvas.savefig(beside, dpi=160, facecolor="white", metadata=metadata)
            os.replace(beside, path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise ConfigError(f"--picture: {path} cannot be written: {error.strerror}") from None


def _spectra(axes: Any, spectra: dict[str, Spectrum], adapter: bool) -> None:
    kinds = list(dict.fromkeys(kind_of(name) for name in spectra))
    own = dict(zip(kinds, COLORS, strict=False))
    told: set[str] = set()
    faint = 0.9 if len(spectra) <= 12 else 0.45
    last = max((len(s.values) for s in spectra.values()), default=1)
    if adapter:
        last = max((sum(v > FLOOR * s.values[0] for v in s.values) for s in spectra.values()), default=1)
    for name, s in spectra.items():
        if not s.values[0] > 0:
            continue
        kind = kind_of(name)
        label = kind if kind in own else "other"
        values = [v / s.values[0] for v in s.values]
        count = len(values)
        x = [float(i + 1) for i in range(count)] if adapter else [100 * (i + 1) / count for i in range(count)]
        shown = [(a, v) for a, v in zip(x, values, strict=True) if v >= FLOOR / 3]
        axes.plot(
            [a for a, _ in shown],
            [v for _, v in shown],
            color=own.get(kind, LAST),
            linewidth=1.2,
            alpha=faint,
            marker="o" if adapter and last <= 32 else None,
            markersize=2.5,
            label=None if label in told else label,
        )
        told.add(label)
    axes.set_yscale("log")
    axes.set_ylim(FLOOR, 1.3)
    axes.set_xlim(0, max(2, last + 0.5) if adapter else 100)
    axes.set_xlabel("rank j" if adapter else "rank j, % of the full rank", color=INK)
    what = "dW" if adapter else "each weight"
    axes.set_title(f"Singular values of {what}, s_j / s_1", color=INK, fontsize=11, loc="left", parse_math=False)
    if len(told) > 1:
        _legend(axes, loc="upper right" if adapter else "lower left")


def _price(axes: Any, spectra: Sequence[Spectrum], adapter: bool) -> None:
    before = sum(s.parameters for s in spectra)
    energy = [together(spectra, 1 - tail) for tail in TAILS]
    even = [evenly(spectra, share / 60) for share in range(1, 61)]
    best = [cheapest(spectra, worth) for worth in worths(spectra)]
    for found, color, label in (
        (even, LAST, "the same share of every rank"),
        (energy, FIRST, "the same energy in every layer"),
        (best, SECOND, "least error"),
    ):
        line = sorted((100 * t.saved, 100 * t.error) for t in found if t.saved > 0)
        if line:
            axes.plot(*zip(*line, strict=True), color=color, linewidth=2.0, label=label)
    for share in ENERGIES:
        found_at = together(spectra, share)
        if found_at.saved > 0:
            point = (100 * found_at.saved, 100 * found_at.error)
            axes.plot(*point, "o", color=FIRST, markersize=5)
            style: dict[str, Any] = {"textcoords": "offset points", "xytext": (-6, 5), "ha": "right"}
            axes.annotate(f"{100 * share:.0f} %", point, color=INK, fontsize=9, **style)
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"parameters saved, % of {before:,}", color=INK)
    what = "dW" if adapter else "W"
    title = f"What a lower rank costs: |{what}' - {what}| / |{what}|, %"
    axes.set_title(title, color=INK, fontsize=11, loc="left", parse_math=False)
    if axes.lines:
        _legend(axes, loc="upper left")
    else:
        axes.text(50, 0.5, "no rank would save anything", ha="center", color=INK)


def _legend(axes: Any, **place: Any) -> None:
    legend = axes.legend(frameon=False, labelcolor=INK, fontsize=9, **place)
    for line in legend.get_lines():
        line.set_alpha(1.0)
    for text in legend.get_texts():
        text.set_parse_math(False)
