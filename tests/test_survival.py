"""Runs killed, interrupted, starved of disk or damaged: what is left is whole and goes on to the same bits."""

import errno
import multiprocessing
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

import slimtune as st
import tinyrun
from slimtune.app import checkpoint, events
from slimtune.app.train import train
from tinyrun import image_config, same

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """The report has its own tests; here it would be most of the time."""
    monkeypatch.setattr("slimtune.app.report.write_report", lambda run: None)


SETTINGS = {"max_steps": 6, "eval_steps": 3, "save_steps": 2, "augment": False}


@pytest.fixture(scope="module")
def children():
    """Processes that start with everything imported and nothing computed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "slimtune.app.setup", "slimtune.app.finish", "tinyrun"])

    def run(config, log, processes=1, **plan):
        started = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(processes):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            world |= {"MASTER_ADDR": "127.0.0.1"}
            plan["environment"] = {k: str(v) for k, v in world.items()} if processes > 1 else {}
            plan["log"] = f"{log}-{rank}" if rank else str(log)
            started.append(context.Process(target=tinyrun.run_in_child, args=(config.resolved(), dict(plan))))
            started[-1].start()
        for child in started:
            child.join(120)
            assert child.exitcode is not None
        return started[0].exitcode

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, children):
    """(run that nothing happened to, how often it called fsync or replace)."""
    folder = tmp_path_factory.mktemp("whole")
    cfg = image_config(folder, **SETTINGS)
    code = children(cfg, folder / "log", kill_at_call=-1, calls=str(folder / "calls"))
    assert code == 0, (folder / "log").read_text()
    return Path(cfg.output_dir), int((folder / "calls").read_text())


@pytest.fixture
def cfg(whole, tmp_path):
    """The same run, in a folder of its own."""
    return image_config(whole[0].parent, **SETTINGS, output_dir=str(tmp_path / "run"))


@pytest.fixture
def half(whole, cfg):
    """The run as it stood after four of its six steps."""
    run = Path(cfg.output_dir)
    run.mkdir()
    for name in ("config.yaml", "checkpoint-4", "events.jsonl"):
        source = whole[0] / name
        shutil.copytree(source, run / name) if source.is_dir() else shutil.copy(source, run)
    shutil.copytree(run / "checkpoint-4", run / "checkpoint-2")
    return run


KILLS = 8


@pytest.mark.parametrize("part", range(KILLS))
def test_kill_9_at_any_write(whole, cfg, tmp_path, children, part):
    """SIGKILL inside a save: what is called a checkpoint is whole; the same command ends with the same bits."""
    calls = whole[1]
    code = children(cfg, tmp_path / "log", kill_at_call=2 + (part * (calls - 2)) // KILLS)
    assert code == -signal.SIGKILL
    run = Path(cfg.output_dir)
    assert all(checkpoint.verify(path) == [] for path in checkpoint.checkpoints(run))
    train(cfg)
    same(whole[0], run)
    assert not [path for path in run.iterdir() if path.name.endswith((".tmp", ".old"))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on(whole, cfg, tmp_path, children, number):
    code = children(cfg, tmp_path / "log", signal_at_step=2, signal=number)
    run = Path(cfg.output_dir)
    assert code == 130 and "config.yaml continues" in (tmp_path / "log").read_text()
    assert checkpoint.newest_good(run)[0].name == "checkpoint-3"
    assert signal.Signals(number).name in events.read(run)[-1]["reason"]
    assert not (run / "metrics.json").exists()
    train(cfg)
    same(whole[0], run)


def test_a_second_signal_stops_at_once(cfg, tmp_path, children):
    code = children(cfg, tmp_path / "log", signal_at_step=3, signal=signal.SIGINT, times=2)
    run = Path(cfg.output_dir)
    assert code == 130 and "interrupted" in (tmp_path / "log").read_text()
    assert checkpoint.newest_good(run)[0].name == "checkpoint-2"


FILES = [
    "manifest.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "run_state.json",
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "adapter/slimtune.json",
]


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])


@pytest.mark.parametrize("how", ["deleted", "truncated", "flipped"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_named(half, name, how):
    """Any damage to any file of the newest checkpoint: the one before is used, and the reason names the file."""
    damage(half / "checkpoint-4" / name, how)
    path, skipped = checkpoint.newest_good(half)
    assert path.name == "checkpoint-2"
    ((bad, reason),) = skipped
    assert bad.name == "checkpoint-4"
    if name != "manifest.json" or how != "flipped":  # a flipped hash shows as damage of the file it belongs to
        assert name in reason


def test_resume_falls_back_and_says_so(whole, cfg, tmp_path, capsys):
    """The newest checkpoint is damaged: the run goes on from the one before, to the same bits."""
    shutil.copytree(whole[0], cfg.output_dir)
    run = Path(cfg.output_dir)
    (run / "metrics.json").unlink()
    damage(run / "checkpoint-6" / "optimizer.pt", "flipped")
    train(cfg)
    same(whole[0], run)
    assert "damaged checkpoint skipped" in capsys.readouterr().err
    (skip,) = [event for event in events.read(run) if event["kind"] == "skip"]
    assert skip["path"] == "checkpoint-6" and "optimizer.pt has sha256" in skip["reason"]
    assert checkpoint.verify(run / "checkpoint-6") == []


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(half, cfg):
    damage(half / "checkpoint-4" / "rng_state.pth", "deleted")
    with pytest.raises(st.FileFormatError, match=r"checkpoint-4 is damaged: rng_state.pth is missing"):
        train(cfg.model_copy(update={"resume_from_checkpoint": str(half / "checkpoint-4")}))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fails(whole, cfg, monkeypatch, code):
    """One clear error; the checkpoint before is untouched; with room again the run goes on to the same bits."""
    run, real = Path(cfg.output_dir), os.fsync

    def fsync(handle):
        if (run / ".checkpoint-4.tmp").exists():
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(st.SlimtuneError, match=r"cannot write .*checkpoint-4") as caught:
        train(cfg)
    assert ("disk is full" in str(caught.value)) == (code == errno.ENOSPC)
    assert caught.value.exit_code == 1 and "checkpoint-2, is untouched" in str(caught.value)
    assert [path.name for path in checkpoint.checkpoints(run)] == ["checkpoint-2"]
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    monkeypatch.setattr(os, "fsync", real)
    train(cfg)
    same(whole[0], run)


def test_no_room_is_told_before_the_first_step(cfg, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(st.SlimtuneError, match="a checkpoint takes about"):
        train(cfg)


def test_two_processes(whole, cfg, tmp_path, children):
    """As under torchrun: one writes, both agree, and a run continued from the middle ends as one that was not cut."""
    log = tmp_path / "log"

    def launch(**changes):
        code = children(cfg.model_copy(update={"gradient_accumulation_steps": 1} | changes), log, processes=2)
        assert code == 0, log.read_text()

    launch()
    run = Path(cfg.output_dir)
    newest = checkpoint.checkpoints(run)[0]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in newest.iterdir()}
    assert checkpoint.verify(newest) == []
    assert [event["kind"] for event in events.read(run) if event["kind"] in ("start", "end")] == ["start", "end"]
    again = tmp_path / "again"
    again.mkdir()
    shutil.copytree(run / "checkpoint-4", again / "checkpoint-4")
    launch(output_dir=str(again))
    same(run, again)


def test_two_processes_stop_together(cfg, tmp_path, children):
    """A signal that reaches only one of them stops both after the same step."""
    code = children(
        cfg.model_copy(update={"gradient_accumulation_steps": 1}),
        tmp_path / "log",
        processes=2,
        signal_at_step=2,
        signal=signal.SIGTERM,
        only_rank="1",
    )
    assert code == 130
    assert checkpoint.newest_good(Path(cfg.output_dir))[0].name == "checkpoint-3"
