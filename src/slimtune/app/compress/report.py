"""`report.html` of a compression, made from its compress.json and from nothing else."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from slimtune.app import intervals, plots
from slimtune.app.compress.plan import HEADS, Layer, row
from slimtune.app.compress.state import RECORD, writing
from slimtune.app.page import (
    figure_card,
    in_bytes,
    in_time,
    in_units,
    page,
    score_card,
    settings_card,
    shortened,
    table_of,
    tiles_row,
)
from slimtune.app.verdict import Score, Verdict
from slimtune.errors import FileFormatError


def write_report(run: str | Path) -> Path:
    """Write ``report.html`` and, where matplotlib is installed, ``plots/*.png`` into a folder that `compress` wrote.

    Raises:
        FileFormatError: no compress.json, or a damaged one. SlimtuneError: it cannot be written to.
    """
    folder = Path(run)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        layers = [Layer(**{**entry, "shape": tuple(entry["shape"])}) for entry in record["layers"]]
        text = _page(folder, record, layers)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"{folder / RECORD}: not the record of a compression: {error}") from None
    with writing(folder):
        (folder / ".report.html.tmp").write_text(text, encoding="utf-8")
        os.replace(folder / ".report.html.tmp", folder / "report.html")
    return folder / "report.html"


def _page(run: Path, record: Mapping[str, Any], layers: list[Layer]) -> str:
    parts = (
        _header(run, record),
        _notes(record),
        _tiles(record),
        score_card(_scores(record)),
        _pictures(run, layers),
        _latency(record),
        _layers(layers),
        _use(record),
        settings_card(record["config"]),
    )
    title = f"{record['config']['method']} · {run.resolve().name} · slimtune"
    return page(title, "\n".join(part for part in parts if part), f"from {RECORD} of this folder")


def _header(run: Path, record: Mapping[str, Any]) -> str:
    about = [run.resolve().name, record.get("task"), record.get("source"), record["config"].get("dataset_name")]
    eyebrow = "".join(f"<span>{escape(shortened(item))}</span>" for item in about if item)
    return (
        f'<header>\n<div class="eyebrow">{eyebrow}<span class="state good">compressed</span></div>\n'
        f"<h1>{escape(record['verdict'])}</h1>\n</header>"
    )


def _notes(record: Mapping[str, Any]) -> str:
    if not record["notes"]:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in record["notes"])
    return f'<div class="card note"><b>Notes</b><ul>{items}</ul></div>'


def _tiles(record: Mapping[str, Any]) -> str:
    numbers, size = record["parameters"], record["bytes"]
    before, after = numbers["model_before"], numbers["model_after"]
    tiles = [
        ("Parameters", in_units(after), f"{after / before:.1%} of {in_units(before)}"),
        (
            "In the targeted layers",
            in_units(numbers["layers_after"]),
            f"{numbers['layers_after'] / numbers['layers_before']:.1%} of {in_units(numbers['layers_before'])}",
        ),
        ("File", in_bytes(size["after"]), f"dense {in_bytes(size['before'])}, {record['dtype']}"),
    ]
    for entry in record["latency"].get("model", ()):
        seconds = f"{1000 * entry['compressed']:.3g} ms, dense {1000 * entry['dense']:.3g} ms"
        tiles.append((f"Speed, batch {entry['batch']}", f"{entry['speed']:.2f}x", seconds))
    tiles.append(("Time", in_time(record["seconds"]), ""))
    tiles.append(("Peak memory", in_bytes(record["peak_memory_bytes"]), ""))
    return tiles_row(tiles)


def _scores(record: Mapping[str, Any]) -> Verdict:
    metric = record.get("metric")
    scores = []
    for split, entry in record["scores"].items():
        for when in ("before", "after"):
            value, n = entry[when][metric], int(entry[when]["samples"])
            scores.append(Score(f"{when}, {split}", value, n, intervals.interval(str(metric), value, n)))
    return Verdict("", metric, scores)


def _pictures(run: Path, layers: list[Layer]) -> str:
    found = "\n".join(filter(None, (figure_card(run, figure) for figure in pictures(layers))))
    return f'<h2>Ranks and errors</h2>\n<div class="plots">\n{found}\n</div>' if found else ""


def pictures(layers: list[Layer]) -> list[plots.Figure]:
    """Ranks beside break-even ranks, and errors, of every layer."""
    if len(layers) < 2:
        return []
    x = range(1, len(layers) + 1)
    where = "layer, in model order"
    ranks = [
        plots.Curve(x, [layer.break_even for layer in layers], "break-even", plots.SHADE),
        plots.Curve(x, [float(layer.rank or 0) for layer in layers], "rank (none: dense)"),
    ]
    found = [plots.Figure("ranks", "Rank of each layer", ranks, bars=True, x_label=where)]
    lines = []
    for key, label, color, dashed in (
        ("weight", "of the weights", plots.SHADE, False),
        ("measured", "measured, of the outputs", plots.FIRST, False),
        ("predicted", "predicted", plots.SECOND, True),
    ):
        points = [(i, v) for i, layer in zip(x, layers, strict=True) if (v := getattr(layer, key)) is not None]
        if points:
            at, values = zip(*points, strict=True)
            lines.append(plots.Curve(at, values, label, color, marks=True, dashed=dashed))
    if lines:
        found.append(plots.Figure("errors", "Relative error of each layer", lines, x_label=where, below=True))
    return found


def _latency(record: Mapping[str, Any]) -> str:
    entries = record["latency"].get("model")
    if not entries:
        return ""
    rows = [
        [str(e["batch"]), f"{1000 * e['dense']:.3f}", f"{1000 * e['compressed']:.3f}", f"{e['speed']:.2f}x"]
        for e in entries
    ]
    table = table_of(["batch", "dense, ms", "compressed, ms", "speed"], rows, numeric=range(4))
    told = f"Medians of {record['latency']['runs']} forward passes each, in turns."
    return f'<h2>Latency</h2>\n<div class="card scroll">{table}<p class="sub">{told}</p></div>'


def _layers(layers: list[Layer]) -> str:
    rows = [[*row(layer), layer.reason] for layer in layers]
    heads = [*HEADS, ""]
    shown = [i for i in range(len(heads)) if any(line[i] not in ("-", "") for line in rows)]
    table = table_of([heads[i] for i in shown], [[line[i] for i in shown] for line in rows], range(1, len(HEADS)))
    opened = " open" if len(layers) <= 16 else ""
    return (
        f'<h2>Layers</h2>\n<details class="card"{opened}><summary>{len(layers)} layers</summary>'
        f'<div class="scroll">{table}</div></details>'
    )


def _use(record: Mapping[str, Any]) -> str:
    folder = f"{str(record['config']['output_dir']).rstrip('/')}/model"
    code = f"import slimtune as st\n\nmodel = st.load_compressed({folder!r})"
    blocks = [("Load it in Python", code)]
    if record["config"]["model_factory"] is None:
        train = f"slimtune train --config recover.yaml model_name_or_path={shlex.quote(folder)}"
        blocks.append(("Train an adapter on it", train))
    else:
        code = f"model = st.load_compressed({folder!r}, model)  # of {record['config']['model_factory']}"
        blocks = [("Load it in Python", f"import slimtune as st\n\n{code}")]
    body = "".join(f"<p>{escape(title)}</p><pre>{escape(text)}</pre>" for title, text in blocks)
    return f'<h2>Use it</h2>\n<div class="card use">{body}</div>'
