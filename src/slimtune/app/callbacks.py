"""What a training run tells: its events, its progress, its best evaluation."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimtune.errors import ConfigError

if TYPE_CHECKING:
    from slimtune.app.trainer import SlimTrainer


class Run(TrainerCallback):
    """Writes events, keeps the run state, follows the best evaluation and answers stop requests."""

    def __init__(self, trainer: SlimTrainer, metric: str, greater: bool, patience: int | None, best: bool):
        self.trainer = trainer
        self.events = trainer.events
        self.metric = metric
        self.greater = greater
        self.patience = patience
        self.best = best
        self.measure_base: Callable[[], dict[str, Any]] | None = None
        self._began = 0.0
        self._ranks: dict[str, int] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.measure_base and "base" not in self.trainer.run_state:
            # not before training: an evaluation would mark the model as prepared, and DDP would leave it alone
            self.trainer.run_state["base"] = self.measure_base()
        self.trainer.attach_controllers(self.trainer.run_state.get("controllers", {}))
        if not state.global_step and not (self.trainer.run_state.get("start") or {}).get("ranks"):
            self._write_notes(0)  # ranks that attaching gave whole weights
        self.trainer.stop.deferred = True
        window = self.trainer.run_state.get("window")
        if window:  # the loss since the last log line, which a resumed run would otherwise forget
            self.trainer._tr_loss.fill_(window["loss"])
            self.trainer._globalstep_last_logged = window["since"]

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        totals = self.trainer.run_state
        totals["step_seconds"] = totals.get("step_seconds", 0.0) + time.perf_counter() - self._began
        self._write_notes(state.global_step)
        if self.trainer.stop.signal:
            control.should_save = True
            control.should_training_stop = True

    def _write_notes(self, step: int) -> None:
        """What the controllers have to say about this step; ranks only when they changed."""
        for attached in self.trainer.attached:
            note = attached.controller.note()
            if note is None:
                continue
            if "ranks" not in note:
                self.events.write("note", step, controller=type(attached.controller).__name__, **note)
            elif note["ranks"] != self._ranks:
                start = self.trainer.run_state.get("start") or {}
                if self._ranks is None and start.get("ranks"):
                    self.events.write("ranks", 0, ranks=start["ranks"])
                self._ranks = note["ranks"]
                self.events.write("ranks", step, **note)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs:
            keys = ("loss", "grad_norm", "learning_rate", "epoch")
            self.events.write("log", state.global_step, **{k: logs[k] for k in keys if k in logs})

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self.trainer.split != "validation":
            return
        values = plain(metrics or {})
        self.events.write("eval", state.global_step, **values)
        if not (self.best or self.patience):
            return
        if self.metric not in values:
            raise ConfigError(
                f"metric_for_best_model: no '{self.metric}' in the evaluation (there are {', '.join(sorted(values))})"
            )
        value = values[self.metric]
        before = state.best_metric
        better = before is None or (value > before if self.greater else value < before)
        if better and math.isfinite(value):
            state.best_metric, state.best_global_step = value, state.global_step
            self.trainer.run_state["worse"] = 0
            control.should_save = control.should_save or self.best
        else:
            self.trainer.run_state["worse"] = self.trainer.run_state.get("worse", 0) + 1
            if self.patience and self.trainer.run_state["worse"] >= self.patience:
                self.trainer.run_state["finished"] = control.should_training_stop = True
                control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.events.write("save", state.global_step, path=f"checkpoint-{state.global_step}")


class Progress(TrainerCallback):
    """A bar on a terminal, plain lines elsewhere; only on the first process."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.trainer: SlimTrainer | None = None
        self.bar: Any = None
        self._task: Any = None
        self._began = 0.0
        self._first = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began, self._first = time.perf_counter(), state.global_step
        if state.is_world_process_zero and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar:
            self.bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        pace = (time.perf_counter() - self._began) / max(state.global_step - self._first, 1)
        text = f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.1e}"
        if self.bar:
            self.bar.update(self._task, description=text)
        else:
            left = _clock(pace * (state.max_steps - state.global_step))
            self.say(f"step {state.global_step}/{state.max_steps}  {text}  {pace:.3f} s/step  {left} left")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        values = plain(metrics or {})
        if state.is_world_process_zero and self.trainer and self.trainer.split == "validation":
            shown = "  ".join(f"{name} {values[name]:.4f}" for name in sorted(values, key=self.metric.__ne__))
            self.say(f"step {state.global_step}/{state.max_steps}  validation: {shown}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def say(self, line: str) -> None:
        """One line to stderr, above the bar if there is one."""
        if self.bar:
            self.bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self.bar:
            self.bar.stop()
            self.bar = None


def plain(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics without the Trainer's prefix and its timings."""
    timings = ("runtime", "samples_per_second", "steps_per_second", "jit_compilation_time", "model_preparation_time")
    prefixes = ("eval_", "test_", "base_", "final_")
    named = {key.split("_", 1)[1]: value for key, value in metrics.items() if key.startswith(prefixes)}
    return {key: float(value) for key, value in named.items() if key not in timings}


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
