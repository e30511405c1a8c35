"""Sealed folders: whole under their name or not there, and told apart from damaged ones."""

import json
import os

import pytest

from slimtune.app import checkpoint
from slimtune.errors import SlimtuneError


@pytest.fixture
def make(tmp_path):
    def make(step, text="abc"):
        final = tmp_path / f"checkpoint-{step}"
        folder = checkpoint.prepare(final)
        (folder / "inner").mkdir()
        (folder / "a.bin").write_text(text)
        (folder / "inner" / "b.bin").write_text(text * 2)
        checkpoint.seal(folder, step)
        checkpoint.publish(folder, final)
        return final

    return make


def test_what_is_sealed_verifies(make):
    path = make(3)
    assert checkpoint.verify(path) == []
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 3 and set(manifest["files"]) == {"a.bin", "inner/b.bin"}
    (path / "extra").write_text("not looked at")
    assert checkpoint.verify(path) == []


@pytest.mark.parametrize(
    ("do", "problem"),
    [
        (lambda p: (p / "a.bin").unlink(), "a.bin is missing"),
        (lambda p: (p / "a.bin").write_text("ab"), "a.bin has 2 bytes, expected 3"),
        (lambda p: (p / "a.bin").write_text("abd"), "a.bin has sha256 a52d159f262b..., expected ba7816bf8f01..."),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda p: (p / "manifest.json").write_text("[" * 100_000), "manifest.json is damaged"),
        (lambda p: (p / "manifest.json").write_text('{"format": 1, "files": {"a": 3}}'), "manifest.json is damaged"),
        (lambda p: (p / "manifest.json").write_text('{"format": 9, "files": {}}'), "has format 9, expected 1"),
        (
            lambda p: (p / "manifest.json").write_text('{"format": 1, "files": {"../x": {"bytes": 1, "sha256": "a"}}}'),
            "names a file outside the folder",
        ),
    ],
)
def test_damage_is_named(make, do, problem):
    path = make(1)
    do(path)
    (found,) = checkpoint.verify(path)
    assert problem in found


def test_newest_good_and_its_reasons(make, tmp_path):
    for step in (2, 10, 9):
        make(step)
    (tmp_path / "checkpoint-10" / "a.bin").unlink()
    (tmp_path / "checkpoint-11").mkdir()
    path, skipped = checkpoint.newest_good(tmp_path)
    assert path.name == "checkpoint-9"
    assert [(bad.name, reason) for bad, reason in skipped] == [
        ("checkpoint-11", "manifest.json is missing"),
        ("checkpoint-10", "a.bin is missing"),
    ]
    assert checkpoint.newest_good(tmp_path / "nowhere") == (None, [])


def test_rotation_spares_the_only_good_one_and_the_best(make, tmp_path):
    for step in (1, 2, 3, 4, 5):
        make(step)
    for step in (3, 4, 5):
        (tmp_path / f"checkpoint-{step}" / "a.bin").unlink()
    checkpoint.rotate(tmp_path, 1, [tmp_path / "checkpoint-1"])
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-2", "checkpoint-1"]
    checkpoint.rotate(tmp_path, 5)
    assert len(checkpoint.checkpoints(tmp_path)) == 3


def test_publishing_over_an_older_one(make, tmp_path):
    make(1, "old")
    path = make(1, "new")
    assert (path / "a.bin").read_text() == "new" and checkpoint.verify(path) == []
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_leftovers_are_removed_and_a_half_replaced_one_comes_back(make, tmp_path):
    make(1)
    os.replace(tmp_path / "checkpoint-1", tmp_path / ".checkpoint-1.old")
    checkpoint.prepare(tmp_path / "checkpoint-2")
    (tmp_path / ".other.tmp").mkdir()
    checkpoint.clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.tmp", "checkpoint-1"]
    assert checkpoint.verify(tmp_path / "checkpoint-1") == []


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_every_failing_call_leaves_the_old_state(make, tmp_path, monkeypatch, name):
    """Whichever call fails: one error that names the cause, and the old or the new checkpoint whole."""
    real, said = getattr(os, name), []
    for n in range(1, 20):
        make(1, "old")
        final, calls = tmp_path / "checkpoint-1", 0

        def flaky(*arguments, _n=n):
            nonlocal calls
            calls += 1
            if calls == _n:
                raise OSError(5, "Input/output error")
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, flaky)
            try:
                with checkpoint.failing_clearly(final, tmp_path):
                    make(1, "new")
                break
            except SlimtuneError as error:
                said.append(str(error))
        checkpoint.clean(tmp_path)
        assert checkpoint.verify(final) == []
        assert (final / "a.bin").read_text() in ("old", "new")
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert len(said) >= 2
    assert all("cannot write checkpoint" in text and "Input/output error" in text for text in said)
