"""`report.html`: one page about one run, made from the files in its folder and from nothing else."""

from __future__ import annotations

import os
import shlex
from html import escape
from pathlib import Path
from typing import Any

from slimtune.app import plots
from slimtune.app.page import (
    figure_card,
    in_bytes,
    in_percent,
    in_time,
    in_units,
    page,
    score_card,
    settings_card,
    shortened,
    table_of,
    tiles_row,
)
from slimtune.app.record import Record, metric_value, number, read_record
from slimtune.app.verdict import Verdict, judge, say
from slimtune.errors import ConfigError, SlimtuneError

STATES = {  # state -> (words, colour class, what it means)
    "finished": ("finished", "good", ""),
    "interrupted": ("interrupted", "warn", "This run was interrupted; the same command continues it."),
    "stopped": ("stopped early", "warn", "This run stopped before its last step."),
    "running": (
        "not finished",
        "warn",
        "This run has not ended: it is still going, or was killed; the same command continues it.",
    ),
    "diverged": ("diverged", "bad", "The loss or a gradient stopped being finite and the run was stopped."),
    "empty": ("nothing yet", "warn", "This folder holds no training steps yet."),
}


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` and, where matplotlib is installed, ``plots/*.png`` into a run folder.

    Reads config.yaml, events.jsonl, metrics.json and ranks.json; whatever is missing or torn is named on the page.
    The page is one file: no script, no request, light and dark.

    Returns:
        The page's path.

    Raises:
        ConfigError: `run_dir` is not a folder, or holds something else than a run.
        SlimtuneError: it cannot be written to.
    """
    run = Path(run_dir)
    if not run.is_dir():
        raise ConfigError(f"report: no run folder at {run}")
    found = sorted(p.name for p in run.iterdir() if p.name not in ("report.html", "plots"))
    if found and not {"config.yaml", "events.jsonl", "metrics.json", "ranks.json"} & set(found):
        raise ConfigError(f"report: {run} is not a run folder; it holds {', '.join(found[:8])}")
    record = read_record(run)
    page = run / "report.html"
    temporary = run / ".report.html.tmp"
    try:
        temporary.write_text(_page(record, judge(record)), encoding="utf-8")
        os.replace(temporary, page)
    except OSError as error:
        raise SlimtuneError(f"cannot write {page}: {error.strerror}") from error
    return page


def _page(record: Record, verdict: Verdict) -> str:
    body = "\n".join(
        part
        for part in (
            _header(record, verdict),
            _problems(record),
            _tiles(record),
            score_card(verdict),
            _plots(record, verdict.metric),
            _evaluations(record, verdict.metric),
            _ranks(record),
            _layers(record),
            _timeline(record),
            _use(record),
            _config(record),
        )
        if part
    )
    return page(_title(record), body, "from the files of this run folder")


def _title(record: Record) -> str:
    method = record.config.get("method") or record.metrics.get("method") or "run"
    return f"{method} · {record.path.resolve().name} · slimtune"


def _header(record: Record, verdict: Verdict) -> str:
    words, color, meaning = STATES[record.state]
    config = record.config
    model = config.get("model_name_or_path") or config.get("model_factory")
    about = [record.path.resolve().name, config.get("task"), model, config.get("dataset_name")]
    eyebrow = "".join(f"<span>{escape(shortened(item))}</span>" for item in about if item)
    lines = [meaning, *verdict.details]
    sub = "".join(f'<p class="sub">{escape(line)}</p>' for line in lines if line)
    return (
        f'<header>\n<div class="eyebrow">{eyebrow}<span class="state {color}">{words}</span></div>\n'
        f"<h1>{escape(verdict.sentence)}</h1>\n{sub}\n</header>"
    )


def _problems(record: Record) -> str:
    notes = [note for note in record.problems if record.state == "finished" or "is missing" not in note]
    stops = [e for e in record.timeline if e["kind"] == "stop" and record.state in ("diverged", "stopped")]
    notes = [_words(event) for event in stops[-1:]] + notes
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<div class="card note"><b>Notes</b><ul>{items}</ul></div>'


def _tiles(record: Record) -> str:
    m = record.metrics
    trainable, total = number(m.get("trainable_parameters")), number(m.get("total_parameters"))
    tiles: list[tuple[str, str, str]] = []
    if trainable is not None:
        share = f"{in_percent(trainable / total)} of {in_units(total)}" if total else ""
        start = number(m.get("trainable_parameters_at_start"))
        if start is not None and start != trainable:
            share += f"{'; ' if share else ''}{start:,.0f} at the start"
        tiles.append(("Trainable parameters", f"{trainable:,.0f}", share))
    if (rate := number(m.get("learning_rate"))) is not None:
        whose = "as given" if record.config.get("learning_rate") else "the method's own"
        tiles.append(("Learning rate", f"{rate:g}", whose))
    if (size := number(m.get("adapter_bytes"))) is not None:
        tiles.append(("File", in_bytes(size), f"{size:,.0f} bytes"))
    if (seconds := number(m.get("train_runtime"))) is not None:
        each = number(m.get("seconds_per_step"))
        tiles.append(("Training time", in_time(seconds), f"{each:.3g} s per step" if each else ""))
    looked = m.get("calibration")
    if isinstance(looked, dict) and (seconds := number(looked.get("seconds"))) is not None:
        batches = number(looked.get("batches"))
        tiles.append(("Calibration", in_time(seconds), f"{batches:,.0f} batches" if batches else ""))
    steps = number(m.get("steps")) or float(record.step)
    if steps:
        tiles.append(("Steps", f"{steps:,.0f}", _epochs(record)))
    if (peak := number(m.get("peak_memory_bytes"))) is not None:
        tiles.append(("Peak memory", in_bytes(peak), "of the process" if m.get("device", "cpu") == "cpu" else ""))
    return tiles_row(tiles)


def _epochs(record: Record) -> str:
    """Passes over the data by the last step, from the last event that counts them."""
    known = [(e, step) for event in record.logs if (e := number(event.get("epoch"))) and (step := event["step"])]
    if not known:
        return ""
    epoch, step = known[-1]
    return f"{epoch * (number(record.metrics.get('steps')) or record.step) / step:.3g} epochs"


def _plots(record: Record, metric: str | None) -> str:
    wanted = plots.curves(record, metric)
    if not wanted:
        return ""
    cards = "\n".join(figure_card(record.path, figure) for figure in wanted).strip()
    if not cards:
        return (
            '<h2>Curves</h2>\n<div class="card"><p class="sub">matplotlib is not installed, so there are tables only. '
            "For curves: <code>pip install 'slimtune[plot]'</code>, then "
            f"<code>slimtune report {escape(shlex.quote(_place(record)))}</code>.</p></div>"
        )
    return f'<h2>Curves</h2>\n<div class="plots">\n{cards}\n</div>'


def _evaluations(record: Record, metric: str | None) -> str:
    if not record.evaluations:
        return ""
    names = dict.fromkeys(name for name in (metric, "loss") if name)
    skipped = {"time", "step", "kind", "epoch"}
    for event in record.evaluations:
        for key in event:
            name = key.removeprefix("eval_")
            if key not in skipped and number(event[key]) is not None and not _is_cost(name):
                names.setdefault(name)
    rows = [
        [f"{event['step']:,}", *(_cell(metric_value(event, name)) for name in names)] for event in record.evaluations
    ]
    table = table_of(["step", *names], rows, numeric=range(len(names) + 1))
    return f'<h2>Evaluations</h2>\n<div class="card scroll">{table}</div>'


def _is_cost(name: str) -> bool:
    return name.endswith(("runtime", "per_second", "samples", "time"))


def _cell(value: float | None) -> str:
    return "–" if value is None else say(value)


def _ranks(record: Record) -> str:
    """How ranks moved, where they did, and the stable ranks that they were chosen by."""
    watched = plots.stable_ranks(record)
    figures = [*([watched] if watched else []), *plots.ranks(record)]
    cards = "\n".join(filter(None, (figure_card(record.path, figure) for figure in figures)))
    return f'<h2>Ranks</h2>\n<div class="plots">\n{cards}\n</div>' if cards else ""


def _layers(record: Record) -> str:
    if not record.ranks:
        return ""
    largest = max((number(row.get("parameters")) or 0.0 for row in record.ranks), default=0.0) or 1.0
    body = ""
    for row in record.ranks:
        count = number(row.get("parameters")) or 0.0
        rank, start = number(row.get("rank")), number(row.get("start_rank"))
        before = f"{start:g} → " if start is not None and start != rank else ""
        cells = f'<td class="n">{"–" if rank is None else f"{before}{rank:g}"}</td>'
        body += (
            f'<tr><td class="name">{escape(str(row["name"]))}</td>{cells}<td class="n">{count:,.0f}</td>'
            f'<td class="share"><span class="bar" style="width:{100 * count / largest:.1f}%"></span></td></tr>'
        )
    head = '<tr><th>layer</th><th class="n">rank</th><th class="n">parameters</th><th></th></tr>'
    figure = plots.layers(record)
    card = figure_card(record.path, figure) if figure else ""
    opened = " open" if len(record.ranks) <= 12 else ""
    total = sum(number(row.get("parameters")) or 0.0 for row in record.ranks)
    return (
        f'<h2>Layers</h2>\n<div class="plots">{card}<details class="card"{opened}><summary>{len(record.ranks)} '
        f'layers, {total:,.0f} parameters</summary><div class="scroll"><table class="full">{head}{body}</table></div>'
        "</details></div>"
    )


def _timeline(record: Record) -> str:
    events = [e for e in record.timeline if e["kind"] != "save"]
    saves = [e for e in record.timeline if e["kind"] == "save"]
    if not record.timeline:
        return ""
    if saves:
        events.append(saves[-1])
    events.sort(key=lambda e: number(e.get("time")) or 0.0)
    start = number(record.timeline[0].get("time"))
    rows = []
    for event in events:
        now = number(event.get("time"))
        after = "" if now is None or start is None else f"+{in_time(now - start)}"
        words = f"last of {len(saves)}: {_words(event)}" if event["kind"] == "save" else _words(event)
        rows.append([after, f"{event['step']:,}", str(event["kind"]), words])
    table = table_of(["time", "step", "event", ""], rows, numeric=(1,))
    return f'<h2>Timeline</h2>\n<div class="card scroll timeline">{table}</div>'


SHOWN = (
    "reason",
    "path",
    "max_steps",
    "train_examples",
    "batches",
    "examples",
)  # fields of an event that the timeline tells


def _words(event: dict[str, Any]) -> str:
    """What an event says beyond its time, step and kind, in one line."""
    parts = []
    for key in SHOWN:
        if (value := event.get(key)) is not None:
            unit = key.removeprefix("max_").replace("_", " ")
            parts.append(str(value) if isinstance(value, str) else f"{value:,} {unit}" if number(value) else "")
    return shortened("; ".join(filter(None, parts)), 300)


def _use(record: Record) -> str:
    run = shlex.quote(_place(record))
    adapter = (record.path / "adapter").is_dir()
    blocks = [
        ("Run it again, or continue it", f"slimtune train --config {shlex.quote(_place(record) + '/config.yaml')}")
    ]
    if record.state == "finished":
        blocks += [
            ("Check the files, and that they change the model", f"slimtune verify {run}"),
            ("See ranks, sizes and norms per layer", f"slimtune inspect {run}"),
        ]
        if adapter:
            out = shlex.quote(_place(record) + "-merged")
            blocks.append(("Write it into the base model's weights", f"slimtune merge {run} --output {out}"))
            out = shlex.quote(_place(record) + "-lora")
            blocks.append(("Write it as plain LoRA, if it is near enough", f"slimtune convert {run} --output {out}"))
        code = (
            f"from slimtune.app.loading import load_run\n\nrun = load_run({_place(record)!r})\n"
            "model, processing = run.model, run.processing  # ready for inference"
        )
        blocks.append(("Load it in Python", code))
    body = "".join(f"<p>{escape(title)}</p><pre>{escape(text)}</pre>" for title, text in blocks)
    return f'<h2>Use it</h2>\n<div class="card use">{body}</div>'


def _config(record: Record) -> str:
    if not record.config:
        return ""
    return settings_card(record.config)


def _place(record: Record) -> str:
    """The run folder as its configuration names it, when that is where it lies."""
    named = record.config.get("output_dir")
    if isinstance(named, str) and Path(named).name == record.path.resolve().name:
        return named.rstrip("/")
    return str(record.path)
