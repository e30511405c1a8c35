"""What the pages that slimtune writes share: one file without scripts or requests, light and dark."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from slimtune.app import plots
from slimtune.app.verdict import Score, Verdict, say


def page(title: str, body: str, origin: str) -> str:
    """A whole page. `origin` ends the line at its foot."""
    style = (files("slimtune.app") / "report.css").read_text(encoding="utf-8")
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"<footer>Written by slimtune, {now}, {origin}.</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def tiles_row(tiles: Sequence[tuple[str, str, str]]) -> str:
    """A card for each (name, value, note)."""
    if not tiles:
        return ""
    cells = "".join(
        f'<div class="card tile"><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>'
        for name, value, note in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def figure_card(run: Path, figure: plots.Figure) -> str:
    """A card with one figure, also written to plots/ of a run; empty where matplotlib is missing."""
    try:
        svg = plots.draw(figure, run / "plots" / f"{figure.name}.png")
    except ImportError:
        return ""
    return f'<figure class="card"><figcaption>{escape(figure.title)}</figcaption>{svg}</figure>'


def settings_card(config: Mapping[str, Any]) -> str:
    """All settings of a run."""
    body = "".join(
        f'<tr><td class="name">{escape(str(key))}</td><td class="name">{escape(setting(value))}</td></tr>'
        for key, value in config.items()
    )
    return (
        '<h2>Configuration</h2>\n<details class="card"><summary>All '
        f'{len(config)} settings, as resolved</summary><div class="scroll"><table class="full">{body}</table></div>'
        "</details>"
    )


def score_card(verdict: Verdict) -> str:
    """The scores that a verdict rests on, on one scale; empty without any."""
    if not verdict.scores:
        return ""
    low, high = _scale(verdict.scores)
    rows = "".join(_score(score, low, high) for score in verdict.scores)
    ends = f"<span>{low:.4g}</span><span>{high:.4g}</span>"
    scale = f'<div class="score"><span class="scale">{ends}</span></div>'
    metric = f"{verdict.metric}, with 95 % intervals" if any(s.ends for s in verdict.scores) else verdict.metric
    return f'<h2>Score</h2>\n<div class="card scores"><p class="sub">{escape(metric or "")}</p>{rows}{scale}</div>'


def _scale(scores: Sequence[Score]) -> tuple[float, float]:
    """Ends of a scale that holds every interval: whole tenths for scores, else 5 % of room on both sides."""
    values = [v for s in scores for v in (s.value, *(s.ends or ()))]
    low, high = min(values), max(values)
    if low >= -1 and high <= 1:
        return math.floor(10 * low - 0.2) / 10, math.ceil(10 * high + 0.2) / 10
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _score(score: Score, low: float, high: float) -> str:
    def place(value: float) -> float:
        return 100 * (value - low) / (high - low)

    band = text = ""
    if score.ends:
        start, end = (place(v) for v in score.ends)
        band = f'<span class="range" style="left:{start:.2f}%;width:{end - start:.2f}%"></span>'
        text = f' <span class="sub">({say(score.ends[0])} to {say(score.ends[1])})</span>'
    n = f' <span class="sub">n = {score.n:,}</span>' if score.n else ""
    return (
        f'<div class="score"><span>{escape(score.name)}{n}</span>'
        f'<span class="track">{band}<span class="dot" style="left:{place(score.value):.2f}%"></span></span>'
        f"<span><b>{say(score.value)}</b>{text}</span></div>"
    )


def setting(value: Any) -> str:
    """A setting as one would write it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def table_of(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> str:
    """A table; the columns `numeric` are set to the right."""
    numeric = set(numeric)
    marks = [' class="n"' if i in numeric else "" for i in range(len(head))]
    first = "".join(f"<th{mark}>{escape(name)}</th>" for mark, name in zip(marks, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{mark}>{escape(cell)}</td>" for mark, cell in zip(marks, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{first}</tr>{body}</table>"


def shortened(value: Any, limit: int = 80) -> str:
    """Text of at most so many characters; a path loses its beginning."""
    text = str(value)
    return text if len(text) <= limit else "…" + text[-limit + 1 :] if os.sep in text else text[: limit - 1] + "…"


def in_percent(share: float) -> str:
    """0.123 as 12 %."""
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def in_units(value: float) -> str:
    """1234567 as 1.23 M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.0f}"


def in_bytes(value: float) -> str:
    """1234567 as 1.23 MB."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def in_time(seconds: float) -> str:
    """75 as 1 min 15 s."""
    whole = round(seconds)
    if whole < 1:
        return f"{max(seconds, 0):.1g} s"
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{n} {unit}" for n, unit in [p for p in parts if p[0]][:2])
