"""`slimtune train`: one configuration in, one run folder out."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.app import checkpoint, resume
from slimtune.app.config import TrainConfig
from slimtune.app.events import Events
from slimtune.app.signals import StopRequest
from slimtune.errors import DivergenceError, SlimtuneError

if TYPE_CHECKING:
    from slimtune.app.method import Method
    from slimtune.app.tasks import Task
    from slimtune.app.trainer import SlimTrainer


@dataclass
class RunResult:
    """What a run came to. `interrupted`: stopped by a signal, to be continued by the same command."""

    output_dir: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False
    report: Path | None = None


def train(cfg: TrainConfig) -> RunResult:
    """Train, evaluate, save and report; continue an interrupted run where it stopped.

    The run folder holds config.yaml (resolved), events.jsonl, metrics.json, ranks.json, report.html, `adapter/` (or
    `model/` for methods full and head) and sealed `checkpoint-N/` folders.

    Raises:
        ConfigError, DataError, TargetError, FileFormatError: before anything is trained.
        DivergenceError: a loss or gradient is not finite; the last checkpoint is kept.
        SlimtuneError: the run folder cannot be written, or memory runs out.
    """
    with StopRequest() as stop:
        return _train(cfg, stop)


def _train(cfg: TrainConfig, stop: StopRequest) -> RunResult:
    run, main = Path(cfg.output_dir), int(os.environ.get("RANK", "0")) == 0
    beginning = resume.find_beginning(cfg)
    if beginning.finished is not None:
        if main:
            print(f"{run} is finished; resume_from_checkpoint=false trains it again", file=sys.stderr)
        report = run / "report.html"
        return RunResult(run, beginning.finished, report=report if report.exists() else None)

    import torch

    from slimtune.app import finish, setup
    from slimtune.app.calibration import calibrate
    from slimtune.app.method import apply_method, check_alone, start_of
    from slimtune.app.tasks import build_task

    arguments = setup.arguments(cfg)  # starts the process group under torchrun
    check_alone(cfg, arguments.world_size)
    if main:
        setup.check_folder(run)
    setup.barrier()
    events = Events(run, enabled=main)
    setup.seed(cfg.seed)
    task = build_task(cfg)
    setup.seed(cfg.seed)
    method = apply_method(
        cfg,
        task.model,
        task.head,
        calibrate=lambda recipe: calibrate(cfg, task, recipe, arguments.device),
        fresh=beginning.path is None,
    )
    steps = setup.plan_steps(cfg, arguments, len(task.train))
    setup.check_space(run, task.model)
    trainer = setup.trainer(cfg, task, method, arguments, events, stop)
    here = {"train_examples": len(task.train), "world_size": arguments.world_size}
    resume.check_surroundings(beginning, here)
    if main:  # nothing of an earlier run is touched before this one is known to be sound
        setup.open_folder(run, cfg)
    setup.barrier()
    for path, reason in beginning.skipped:
        events.write("skip", checkpoint.step_of(path), path=path.name, reason=reason)
        if main:
            print(f"damaged checkpoint skipped: {path}: {reason}", file=sys.stderr)
    start = start_of(task.model, method)  # of a continued run: what it was at first
    first = {"start": start, "calibration": method.calibration}
    trainer.run_state = {**first, **beginning.state, "config": resume.relevant(cfg), **here}
    facts = {
        "method": cfg.method,
        "learning_rate": method.learning_rate,
        "trainable_parameters": trainer.run_state["start"]["trainable_parameters"],
        "total_parameters": sum(p.numel() for p in task.model.parameters()),
        "train_examples": len(task.train),
        "max_steps": steps,
    }
    if beginning.path:
        events.write("resume", beginning.step, path=str(beginning.path), **facts)
        if main:
            print(f"continuing from {beginning.path}", file=sys.stderr)
    else:
        events.write("start", 0, **facts)
        if method.calibration:
            events.write("calibration", 0, **method.calibration)
    try:
        return _fit(cfg, task, method, trainer, beginning, facts)
    except DivergenceError as error:
        events.write("stop", trainer.state.global_step, reason=f"diverged: not finite: {error}")
        if main:
            finish.report(run)
        kept = next(iter(checkpoint.checkpoints(run)), None)
        raise DivergenceError(f"{error}; the last good state is {kept or 'the untouched model'}") from None
    except torch.OutOfMemoryError as error:
        raise SlimtuneError(
            "out of memory: lower per_device_train_batch_size (and raise gradient_accumulation_steps), lower "
            f"max_length, or set gradient_checkpointing: true ({str(error).splitlines()[0]})"
        ) from error
    except KeyboardInterrupt:
        events.write("stop", trainer.state.global_step, reason="interrupted at once")
        raise
    finally:
        trainer.progress.close()


def _fit(
    cfg: TrainConfig,
    task: Task,
    method: Method,
    trainer: SlimTrainer,
    beginning: resume.Beginning,
    facts: dict[str, Any],
) -> RunResult:
    from slimtune.app import finish, setup

    run, state, stop = Path(cfg.output_dir), trainer.run_state, trainer.stop
    if beginning.path and (beginning.step >= facts["max_steps"] or state.get("finished")):
        trainer.restore(beginning.path)
    else:
        spent, began = state.get("train_runtime", 0.0), time.perf_counter()
        trainer.clock = lambda: spent + time.perf_counter() - began
        trainer.train(resume_from_checkpoint=str(beginning.path) if beginning.path else None)
        stop.deferred = False
        state["train_runtime"] = trainer.clock()
    if stop.signal:
        step = trainer.state.global_step
        trainer.events.write("stop", step, reason=f"interrupted by {stop.signal}", path=f"checkpoint-{step}")
        return RunResult(run, interrupted=True, report=finish.report(run) if trainer.args.should_save else None)

    metrics = finish.measure(cfg, trainer, task) | facts | finish.sizes(trainer)
    report = finish.write_results(run, cfg, task, method, trainer, metrics) if trainer.args.should_save else None
    setup.barrier()
    return RunResult(run, metrics, report=report)
