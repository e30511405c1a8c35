"""The page: JSON files in, Markdown out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.cases import CASES, GOALS_SET_AT, STARTUP_GOALS
from bench.model import SIZES

__all__ = ["page"]

Row = dict[str, Any]
Cell = Callable[[Row], str]

INTRO = """\
# Performance

Written by `python -m bench` from `bench/results/*.json`; do not edit by hand. `bench/README.md` says how it
measures.

Every step time is a ratio to **the limit**: the same model with every weight frozen and gradients still
flowing to the embeddings' output, run right before and right after. Forward and backward count; AdamW is a
column of its own, as a share of the limit's step. Ours and PEFT are first given the same adapter and must
agree (parity: the largest relative difference). Figures are medians, quartiles in brackets. On a CPU, times
are CPU time of the process, on one thread.
"""


def page(results: Path) -> str:
    """The whole page from a folder of result files, in the order of the table of cases."""
    rows = [json.loads(p.read_text()) for p in sorted(results.glob("*-*-*.json"))]
    rows = sorted((r for r in rows if r["method"] in CASES), key=lambda r: list(CASES).index(r["method"]))
    path = results / "startup.json"
    startup = json.loads(path.read_text()) if path.exists() else {}
    missed = [f"- {line}" for row in rows for line in _missed(row)]
    missed += [f"- {line}" for line in _missed_startup(startup)]
    parts = [INTRO, "## Goals not reached\n", "\n".join(missed or ["None of those measured below."]) + "\n"]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["device"], row["dtype"], json.dumps(row["model"])), []).append(row)
    for key in sorted(groups, key=lambda k: (k[0], list(GOALS_SET_AT).index(k[1]))):
        parts += _section(groups[key])
    if startup:
        parts += ["## Start-up\n", _startup_table(startup["startup"])]
    parts += ["## How these were made\n", _provenance([*rows, startup])]
    return "\n".join(parts)


def goal(row: Row, measure: str) -> float | None:
    """The goal of a cell, or None: goals are for the default model on a CPU."""
    if row["device"] != "cpu" or row["model"] != asdict(SIZES["cpu"]):
        return None
    return CASES[row["method"]].goals.get(measure, {}).get(row["dtype"])


def _get(row: Row, path: str) -> Any:
    """The value at a dotted path, None where there is none."""
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _at(path: str, form: str = "{:.2f}", factor: float = 1) -> Cell:
    def cell(row: Row) -> str:
        value = _get(row, path)
        return "-" if value is None else form.format(value if factor == 1 else value * factor)

    return cell


def _spread(path: str) -> Cell:
    def cell(row: Row) -> str:
        value = _get(row, path)
        return "-" if value is None else "{median:.2f} [{low:.2f}, {high:.2f}]".format(**value)

    return cell


def _goal(measure: str, form: str) -> Cell:
    def cell(row: Row) -> str:
        value = goal(row, measure)
        return "-" if value is None else "<= " + form.format(value)

    return cell


TO_MIB, TO_KIB = 2**-20, 2**-10
METHOD = _at("method", "{}")

# header -> cell; headers that read the same differ in trailing blanks, which are not shown
STEP: Mapping[str, Cell] = {
    "method": METHOD,
    "goal": _goal("step", "{:.2f}"),
    "PEFT": _spread("step.peft.ratio"),
    "ours": _spread("step.ours.ratio"),
    "forward, ours": _at("step.ours.forward.median"),
    "backward, ours": _at("step.ours.backward.median"),
    "AdamW, PEFT": _at("step.peft.optimizer.median", "+{:.3f}"),
    "AdamW, ours": _at("step.ours.optimizer.median", "+{:.3f}"),
    "trained": _at("step.ours.trained", "{:,}"),
    "parity": _at("parity.difference", "{:.0e}"),
}
MEMORY: Mapping[str, Cell] = {
    "method": METHOD,
    "kept: goal": _goal("saved", "{:.0f}"),
    "limit": _at("memory.limit.saved", "{:.0f}", TO_MIB),
    "PEFT": _at("memory.peft.saved", "{:.0f}", TO_MIB),
    "ours": _at("memory.ours.saved", "{:.0f}", TO_MIB),
    "peak: limit": _at("memory.limit.peak", "{:.0f}", TO_MIB),
    "PEFT ": _at("memory.peft.peak", "{:.0f}", TO_MIB),
    "ours ": _at("memory.ours.peak", "{:.0f}", TO_MIB),
}
BESIDE: Mapping[str, Cell] = {
    "method": METHOD,
    "attach ms: PEFT": _at("lifecycle.peft.attach_seconds", "{:.0f}", 1000),
    "ours": _at("lifecycle.ours.attach_seconds", "{:.0f}", 1000),
    "merge ms: PEFT": _at("lifecycle.peft.merge_seconds", "{:.0f}", 1000),
    "ours ": _at("lifecycle.ours.merge_seconds", "{:.0f}", 1000),
    "file KiB: PEFT": _at("lifecycle.peft.file_bytes", "{:,.0f}", TO_KIB),
    "ours  ": _at("lifecycle.ours.file_bytes", "{:,.0f}", TO_KIB),
    "tiny call: goal": _goal("call", "{:.1f}"),
    "PEFT": _at("call.peft", "{:.1f}"),
    "ours   ": _at("call.ours", "{:.1f}"),
}
COMPILED: Mapping[str, Cell] = {
    "method": METHOD,
    "goal": _goal("compile", "{:.2f}"),
    "limit": _at("compile.limit.ratio.median"),
    "PEFT": _spread("compile.peft.ratio"),
    "ours": _spread("compile.ours.ratio"),
    "graphs: PEFT": _at("compile.peft.graphs", "{}"),
    "ours ": _at("compile.ours.graphs", "{}"),
    "compile s: PEFT": _at("compile.peft.seconds", "{:.0f}"),
    "ours  ": _at("compile.ours.seconds", "{:.0f}"),
}
ACHIEVED: Mapping[str, tuple[str, str, str, float]] = {
    "step": ("step time", "step.ours.ratio.median", "{:.2f}", 1),
    "saved": ("MiB kept for backward", "memory.ours.saved", "{:.0f}", TO_MIB),
    "compile": ("step under torch.compile", "compile.ours.ratio.median", "{:.2f}", 1),
    "call": ("tiny call", "call.ours", "{:.1f}", 1),
}
"""Measure with a goal -> what it is called, where ours is, how it is written."""


def _missed(row: Row) -> Iterator[str]:
    for measure, (label, path, form, factor) in ACHIEVED.items():
        wanted, reached = goal(row, measure), _get(row, path)
        if wanted is None or reached is None:
            continue
        printed = form.format(reached * factor)
        if float(printed) > wanted:
            yield f"{row['method']} {row['dtype']}, {label}: {printed}, goal {form.format(wanted)}"


def _missed_startup(startup: Row) -> Iterator[str]:
    for key, (label, wanted) in STARTUP_GOALS.items():
        reached = _get(startup, f"startup.{key}")
        if reached is not None and reached > wanted:
            yield f"{label}: {reached:.2f} s, goal {wanted:.1f} s"


def _section(rows: Sequence[Row]) -> Iterator[str]:
    """All tables of the rows that share device, dtype and model."""
    device, dtype, m = (rows[0][key] for key in ("device", "dtype", "model"))
    yield f"## {device.upper()}, {dtype}\n"
    has_goals = any(goal(r, measure) is not None for r in rows for measure in ACHIEVED)
    seconds = [s for r in rows if (s := _get(r, "step.limit.seconds.median")) is not None]
    yield (
        f"A random Llama, hidden {m['hidden']}, {m['layers']} layers, {m['heads']} heads, MLP {m['mlp']}, "
        f"vocabulary {m['vocab']}, batch {m['batch']} x {m['tokens']} tokens; all linears but the head."
        + (f" The limit takes {min(seconds):.3g} to {max(seconds):.3g} s a step." if seconds else "")
        + (f" Where the goals were set the limit took {GOALS_SET_AT[dtype][1]}.\n" if has_goals else "\n")
    )
    yield _table(STEP, [r for r in rows if "step" in r])
    notes = [f"- {r['method']}: {CASES[r['method']].note}\n" for r in rows if CASES[r["method"]].note]
    if notes:
        yield "".join(notes)
    yield "### Memory, MiB\n"
    yield _table(MEMORY, [r for r in rows if "memory" in r])
    yield (
        "Kept: unique storages held for the backward pass, weights apart. Peak: most allocated at once in a "
        "step, over the model, in a fresh process."
        + (f" Where the goals were set the limit kept {GOALS_SET_AT[dtype][0]}.\n" if has_goals else "\n")
    )
    yield "### Beside the step\n"
    yield _table(BESIDE, [r for r in rows if "lifecycle" in r or "call" in r])
    yield "Tiny call: one row through an 8 x 8 layer without gradient, in calls of the bare `nn.Linear`.\n"
    if compiled := [r for r in rows if "compile" in r]:
        yield "### The whole model under torch.compile\n"
        yield _table(COMPILED, compiled)
        yield "Ratios to the limit run eagerly.\n"


def _table(columns: Mapping[str, Cell], rows: Iterable[Row]) -> str:
    lines = [[cell(row) for cell in columns.values()] for row in rows]
    return _markdown([list(columns), ["---"] * len(columns), *lines])


def _startup_table(measured: Row) -> str:
    lines = [
        [label, f"<= {wanted:.1f} s", f"{measured[key]:.2f} s"]
        for key, (label, wanted) in STARTUP_GOALS.items()
        if key in measured
    ]
    return _markdown([["", "goal", "measured"], ["---"] * 3, *lines])


def _markdown(lines: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cell.strip() for cell in line)} |\n" for line in lines)


def _provenance(files: Iterable[Row]) -> str:
    made = [v["made"] for file in files for v in file.values() if isinstance(v, dict) and "made" in v]
    lines = []
    for text in sorted({json.dumps(m, sort_keys=True) for m in made}):
        m = json.loads(text)
        where = "{cpu}, {cores} cores, {threads} thread(s)".format(**m["machine"])
        if "gpu" in m["machine"]:
            where = f"{m['machine']['gpu']}; {where}"
        versions = ", ".join(f"{name} {v}" for name, v in sorted(m["versions"].items()))
        lines.append(f"- {m['date']}: `{m['command']}` on {where}; Python {m['python']}, {versions}\n")
    return "".join(lines)
