"""The report page: right numbers, whatever the state of the run; one file, no request, no script."""

import base64
import http.server
import json
import math
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from slimtune.app import plots
from slimtune.app.intervals import difference, fisher, interval, paired, wilson
from slimtune.app.record import read_record
from slimtune.app.report import write_report
from slimtune.app.verdict import judge
from slimtune.errors import ConfigError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = "<script>alert('&')</script>"


def write_run(run: Path, finished: bool = True, metrics: dict | None = None, label: str = "x") -> Path:
    """A small run folder: 40 steps, cut off at step 30 and resumed from 20 where it is finished."""
    run.mkdir(parents=True)
    config = {
        "task": "classify",
        "method": "lora",
        "labels": [label, "b"],
        "output_dir": str(run),
        "learning_rate": 1e-3,
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    events = [{"kind": "start", "step": 0, "method": "lora", "max_steps": 40, "train_examples": 320}]

    def steps(first: int, last: int, level: float) -> None:
        for step in range(first, last + 1):
            loss = level * math.exp(-step / 15)
            rate = 1e-3 * (1 - step / 41)
            events.append({"kind": "log", "step": step, "loss": loss, "learning_rate": rate, "grad_norm": 1 / step})
            if step % 10 == 0:
                events.append({"kind": "eval", "step": step, "loss": loss + 0.1, "accuracy": 0.5 + step / 100})
                events.append({"kind": "save", "step": step, "path": f"checkpoint-{step}"})

    steps(1, 30, 3.0)
    if finished:
        events.append({"kind": "stop", "step": 30, "reason": "interrupted by SIGTERM", "path": "checkpoint-30"})
        events.append({"kind": "skip", "step": 30, "path": "checkpoint-30", "reason": "weights are damaged"})
        events.append({"kind": "resume", "step": 20, "path": "checkpoint-20"})
        steps(21, 40, 2.0)
        events.append({"kind": "end", "step": 40})
        found = {
            "task": "classify",
            "method": "lora",
            "metric": "accuracy",
            "base": {"accuracy": 0.5, "samples": 300},
            "base_test": None,
            "validation": {"accuracy": 0.9, "loss": 0.3, "samples": 300},
            "test": None,
            "trainable_parameters": 9_000,
            "total_parameters": 1_000_000,
            "adapter_bytes": 36_500,
            "train_runtime": 75.0,
            "steps": 40,
            "seconds_per_step": 1.9,
            "peak_memory_bytes": 512_000_000,
        }
        (run / "metrics.json").write_text(json.dumps(found | (metrics or {})))
        rows = [{"name": f"layer.{i}.{label}", "rank": 4, "parameters": 300 * (i + 1)} for i in range(5)]
        (run / "ranks.json").write_text(json.dumps(rows))
    lines = (json.dumps({"time": 1.7e9 + i, **event}) for i, event in enumerate(events))
    (run / "events.jsonl").write_text("".join(line + "\n" for line in lines))
    return run


class Strict(HTMLParser):
    """Collects what a page would load or run, and that its tags are closed in order."""

    VOID = frozenset(("meta", "link", "br", "img", "hr", "input"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        assert tag not in ("script", "iframe", "object", "embed")
        for key, value in attrs:
            assert not key.startswith("on")
            if key in ("src", "href", "xlink:href", "data", "action") and not value.startswith(("#", "data:")):
                self.loads.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def parse(page: Path) -> Strict:
    parser = Strict()
    parser.feed(page.read_text(encoding="utf-8"))
    assert not parser.open
    assert not parser.loads
    return parser


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", label=NASTY)


def test_finished_run(run):
    page = write_report(run)
    assert page == run / "report.html"
    text = parse(page).text
    assert "LoRA on 0.9 % of the weights: accuracy 0.500 → 0.900 on 300 validation examples" in text
    for expected in ("9,000", "36.5 kB", "1 min 15 s", "512 MB", "weights are damaged", "slimtune merge", "load_run"):
        assert expected in text or expected == "slimtune merge"  # merge is offered only beside an adapter
    assert NASTY in text
    assert NASTY not in page.read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)</style>", page.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert "prefers-color-scheme: dark" in style
    assert "url(" not in style and "@import" not in style


def test_merge_is_offered_beside_an_adapter(run):
    (run / "adapter").mkdir()
    assert "slimtune merge" in parse(write_report(run)).text


def test_plots(run):
    pytest.importorskip("matplotlib")
    page = write_report(run).read_text(encoding="utf-8")
    assert page.count("<svg") == 5
    assert {p.name for p in (run / "plots").iterdir()} == {
        f"{name}.png" for name in ("loss", "metric", "learning_rate", "grad_norm", "layers")
    }
    assert "var(--accent)" in page


@pytest.fixture
def no_matplotlib(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.ticker"):
        monkeypatch.setitem(sys.modules, name, None)


def test_without_matplotlib_there_are_tables(run, no_matplotlib):
    page = write_report(run)
    assert "<svg" not in page.read_text(encoding="utf-8")
    text = parse(page).text
    assert "pip install 'slimtune[plot]'" in text
    assert "0.700" in text  # the evaluation at step 20


def test_steps_done_again_are_shown_once(run):
    record = read_record(run)
    steps, losses = record.series("loss")
    assert steps == list(range(1, 41))
    assert losses[19] == pytest.approx(3.0 * math.exp(-20 / 15))
    assert losses[20] == pytest.approx(2.0 * math.exp(-21 / 15))


def test_unfinished_and_torn(tmp_path):
    run = write_run(tmp_path / "run", finished=False)
    events = (run / "events.jsonl").read_bytes()
    (run / "events.jsonl").write_bytes(events[:-25])
    text = parse(write_report(run)).text
    assert "not finished" in text
    assert "last line of events.jsonl is torn" in text
    assert "step 30 reached" in text
    assert "slimtune verify" not in text


@pytest.mark.parametrize(
    ("reason", "state"),
    [
        ("interrupted by SIGINT", "interrupted"),
        ("diverged: not finite: step 31: the loss is nan; first seen in signal.0", "diverged"),
        ("early stopping", "stopped"),
    ],
)
def test_stopped_runs(tmp_path, reason, state):
    run = write_run(tmp_path / "run", finished=False)
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": 1.7e9, "kind": "stop", "step": 31, "reason": reason}) + "\n")
    assert read_record(run).state == state
    text = parse(write_report(run)).text
    assert reason in text


@pytest.mark.parametrize("content", [b"", b"\x00\xff[", b"[1, 2]", b"null", b"{" * 5000])
@pytest.mark.parametrize("name", ["config.yaml", "metrics.json", "ranks.json", "events.jsonl"])
def test_any_file_may_be_damaged(run, no_matplotlib, name, content):
    (run / name).write_bytes(content)
    parse(write_report(run))


@pytest.mark.parametrize("name", ["config.yaml", "metrics.json", "ranks.json", "events.jsonl"])
def test_any_file_may_be_missing(run, no_matplotlib, name):
    (run / name).unlink()
    assert f"{name} is missing" in parse(write_report(run)).text or name == "events.jsonl"


def test_odd_values(run):
    (run / "metrics.json").write_text(json.dumps({"metric": ["x"], "validation": 3, "trainable_parameters": "many"}))
    (run / "ranks.json").write_text(json.dumps([{"name": None, "rank": "high", "parameters": None}, 7]))
    with (run / "events.jsonl").open("a") as file:
        file.write(
            '{"kind": "log", "step": null}\n{"kind": "log", "step": "7"}\n{"kind": 1}\n{"kind": "eval", "step": 5}\n'
        )
        file.write('{"kind": "log", "step": 50, "loss": null, "learning_rate": "x", "grad_norm": true}\n')
        file.write('{"kind": "resume", "step": -1e400, "time": "noon"}\n')
    parse(write_report(run))


def test_empty_folder(tmp_path):
    assert "nothing has been trained yet" in parse(write_report(tmp_path)).text


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"is not a run folder; it holds model\.safetensors"):
        write_report(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="no run folder"):
        write_report(tmp_path / "none")


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"base": {"accuracy": 0.88}}, ": a tie (95 % interval of the change -0.0"),
        ({"base": {"accuracy": 0.97}}, ": worse (95 % interval"),
        ({"base": None}, "accuracy 0.900 on 300 validation examples (95 % interval 0.861 to 0.929)"),
        ({"test": {"accuracy": 0.8, "samples": 100}}, "accuracy 0.800 on 100 test examples (95 %"),
        ({"metric": "mcc", "validation": {"mcc": 0.4, "samples": 9}, "base": {"mcc": 0.1}}, "mcc 0.100 → 0.400 on 9"),
        ({"metric": "loss", "base": {"loss": 0.2}}, "loss 0.200 → 0.300 on 300 validation examples: worse."),
        ({"metric": "loss", "base": {"loss": 0.4}}, "loss 0.400 → 0.300 on 300 validation examples: better."),
        ({"metric": "loss", "base": {"loss": 0.3}}, "loss 0.300 → 0.300 on 300 validation examples: unchanged."),
        ({"metric": "pearson", "validation": {"pearson": 0.8, "samples": 50}, "base": {"pearson": 0.7}}, "a tie"),
        ({"baseline": {"name": "b", "accuracy": 0.88, "gained": 6, "lost": 0}}, "0.880 → 0.900 on 300 validation"),
    ],
)
def test_verdicts(tmp_path, metrics, expected):
    sentence = judge(read_record(write_run(tmp_path / "run", metrics=metrics))).sentence
    assert expected in sentence
    if "baseline" in metrics:  # the pairs tell apart what the two intervals cannot
        assert "tie" not in sentence


def test_intervals_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for k, n in ((0, 7), (3, 7), (215, 250), (250, 250)):
        expected = stats.binomtest(k, n).proportion_ci(method="wilson")
        assert wilson(k, n) == pytest.approx((expected.low, expected.high))
    for gained, lost in ((40, 12), (5, 0), (0, 6), (14, 12), (1, 1)):
        changed = gained + lost
        share = stats.binomtest(gained, changed).proportion_ci(method="exact")
        found = paired(gained, lost, 500)
        assert found.low == pytest.approx((2 * share.low - 1) * changed / 500, abs=1e-9)
        assert found.high == pytest.approx((2 * share.high - 1) * changed / 500, abs=1e-9)
        assert found.tie == (stats.binomtest(gained, changed).pvalue >= 0.05)


def test_intervals_from_the_literature():
    # Newcombe 1998, table II, example (a): 56/70 - 48/80 by method 10 = 0.2, 0.0524 to 0.3339
    first, second = wilson(56, 70), wilson(48, 80)
    assert 0.2 - math.hypot(0.8 - first[0], second[1] - 0.6) == pytest.approx(0.0524, abs=5e-5)
    found = difference("accuracy", 0.5, 0.5, 100)
    assert found.tie and found.low == pytest.approx(-found.high)
    low, high = fisher(0.5, 28)
    assert (low, high) == pytest.approx((0.1559, 0.7361), abs=1e-3)
    assert interval("mcc", 0.5, 100) is None
    assert paired(0, 0, 10).tie


def write_ranks(run: Path, layers: int, moves: dict[int, int]) -> dict[int, dict[str, int]]:
    """Rank events: after step s, layer i has rank moves[s] + i; the run's table says where they began and ended."""
    told = {step: {f"model.layers.{i}.$q${NASTY}": first + i for i in range(layers)} for step, first in moves.items()}
    with (run / "events.jsonl").open("a") as file:
        for step, ranks in told.items():
            file.write(json.dumps({"time": 1.7e9, "kind": "ranks", "step": step, "ranks": ranks}) + "\n")
    first, last = told[min(told)], told[max(told)]
    rows = [{"name": n, "rank": last[n], "start_rank": first[n], "parameters": 10 * last[n]} for n in last]
    (run / "ranks.json").write_text(json.dumps(rows))
    return told


@pytest.mark.parametrize("layers", [3, 6, 90])
def test_ranks_over_time(tmp_path, layers):
    """Lines for a few layers, else a map: of every layer one bar for each time it kept a rank; the sum beside it."""
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run")
    write_ranks(run, layers, {0: 8, 10: 8, 20: 5, 30: 3})
    record = read_record(run)
    assert record.rank_history()[0] == [0, 10, 20, 30]
    figures = plots.ranks(record)
    assert [figure.name for figure in figures] == ["ranks", "total_rank"]
    (total,) = figures[1].curves
    shift = layers * (layers - 1) // 2
    assert list(total.x) == [0, 10, 20, 30, 40]
    assert list(total.y) == [first * layers + shift for first in (8, 8, 5, 3, 3)]
    if layers == 3:
        assert [list(curve.y) for curve in figures[0].curves] == [[8 + i, 8 + i, 5 + i, 3 + i, 3 + i] for i in range(3)]
    else:
        grid = figures[0].grid
        assert list(grid.edges) == [0, 10, 20, 30, 40] and grid.values[2] == [10, 10, 7, 5]
        paths = [d for d in re.findall(r'<path d="([^"]*)"', plots.draw(figures[0])) if d.count("M") > 1]
        edges = {float(x) for d in paths for x in re.findall(r"[ML] ([\d.]+) [\d.]+", d)}
        begin, middle, last, end = sorted(edges)  # a rank that stays from 0 to 20 is one bar
        assert (middle - begin) / (end - begin) == pytest.approx(0.5, abs=1e-3)
        assert (last - begin) / (end - begin) == pytest.approx(0.75, abs=1e-3)
    text = write_report(run).read_text(encoding="utf-8")
    assert NASTY not in text
    assert "<h2>Ranks</h2>" in text and "8 → 3" in parse(run / "report.html").text
    assert {"ranks.png", "total_rank.png"} <= {p.name for p in (run / "plots").iterdir()}
    section = text[text.index("<h2>Ranks</h2>") : text.index("<h2>Layers</h2>")]
    assert section.count("<svg") == 2 and "var(--accent)" in section
    assert not re.findall(r"#[0-9a-f]{6}", section.replace("#000000", ""))  # colours that follow the page


def test_the_map_of_a_long_run_stays_small(tmp_path):
    """Hundreds of layers and rounds: columns are drawn together, the last one with the ranks at the end."""
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run")
    write_ranks(run, 200, {step: 60 - step // 10 for step in range(0, 400, 2)})
    grid = plots.ranks(read_record(run))[0].grid
    assert len(grid.edges) == 21 and grid.edges[0] == 0
    assert [row[-1] for row in grid.values] == [60 - 39 + i for i in range(200)]
    assert len(write_report(run).read_bytes()) < 500_000


def test_ranks_done_again_are_drawn_once(tmp_path):
    """A resume drops what was told beyond its step; ranks that never move need no picture."""
    run = write_run(tmp_path / "run", finished=False)
    write_ranks(run, 2, {0: 8, 10: 7, 20: 6, 30: 5})
    with (run / "events.jsonl").open("a") as file:
        for event in ({"kind": "resume", "step": 15}, {"kind": "ranks", "step": 20, "ranks": {"a": 4, "b": "x"}}):
            file.write(json.dumps({"time": 1.7e9, **event}) + "\n")
    steps, history = read_record(run).rank_history()
    assert steps == [0, 10, 20] and history["a"] == [4, 4, 4]
    assert [v for k, v in history.items() if ".0." in k] == [[8, 7, 7]]
    still = write_run(tmp_path / "still")
    write_ranks(still, 5, {0: 8, 10: 8})
    assert not plots.ranks(read_record(still)) and "<h2>Ranks</h2>" not in write_report(still).read_text()


@pytest.mark.parametrize("ranks", [None, [], {"a": None}, {"a": -1}, {"a": 1e300}, {"a": {"b": 1}}, {"a": True}])
def test_odd_ranks(tmp_path, ranks):
    run = write_run(tmp_path / "run")
    with (run / "events.jsonl").open("a") as file:
        for step in (1, 2):
            file.write(json.dumps({"kind": "ranks", "step": step, "ranks": ranks}) + "\n")
        file.write('{"kind": "ranks", "step": 3}\n')
    parse(write_report(run))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to render the page with")
@pytest.mark.parametrize("finished", [True, False])
def test_in_a_browser(tmp_path, finished):
    run = write_run(tmp_path / "run", finished=finished, label=NASTY)
    write_ranks(run, 9, {0: 8, 10: 6, 20: 3})
    write_report(run)
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(run), **kwargs)

        def log_message(self, *args):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        shot = tmp_path / "page.png"
        done = subprocess.run(
            [
                CHROMIUM,
                *("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--hide-scrollbars"),
                f"--user-data-dir={tmp_path / 'profile'}",
                *("--window-size=500,2400", f"--screenshot={shot}", "--dump-dom"),
                f"http://127.0.0.1:{server.server_port}/report.html",
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert asked == ["/report.html"]
    assert "CONSOLE" not in done.stderr
    assert "LoRA" in done.stdout
    assert shot.stat().st_size > 20_000


def test_page_is_one_small_file(run):
    page = write_report(run).read_bytes()
    assert len(page) < 300_000
    assert base64.b64encode(b"\x89PNG")[:4] not in page
