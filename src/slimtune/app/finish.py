"""The end of a run: the weights to keep, what they score, and everything written down."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

import slimtune as st
from slimtune.app import checkpoint, resume
from slimtune.app.callbacks import plain
from slimtune.app.config import TrainConfig
from slimtune.app.evaluate import evaluate
from slimtune.app.method import Method, trained_rows
from slimtune.app.setup import write_text
from slimtune.app.tasks import Task
from slimtune.app.trainer import SlimTrainer
from slimtune.app.weights import ADAPTER, save_weights
from slimtune.compress import structured_layers
from slimtune.compressed import save_compressed
from slimtune.errors import SlimtuneError


def measure(cfg: TrainConfig, trainer: SlimTrainer, task: Task) -> dict[str, Any]:
    """The table of metrics.json, from the weights to keep: the best ones if asked for, else the last; the controllers
    are done with them then."""
    state, step = trainer.run_state, trainer.state.global_step
    kept = _take_best(trainer) if cfg.load_best_model_at_end else step
    tidied = trainer.finish_controllers()
    known = [e for e in trainer.state.log_history if e.get("step") == kept and "eval_loss" in e]
    if known and not tidied:
        validation = {**plain(known[-1]), "samples": len(task.validation)}
    else:
        validation = evaluate(trainer, task.validation, "final")
    base = state.get("base") or {}
    return {
        "task": cfg.task,
        "metric": task.metric,
        "base": base.get("validation"),
        "base_test": base.get("test"),
        "validation": validation,
        "test": evaluate(trainer, task.test, "test") if task.test is not None else None,
        "best_step": kept if cfg.load_best_model_at_end else None,
        "steps": step,
        "calibration": state.get("calibration") or None,
        "train_runtime": round(state.get("train_runtime", 0.0), 3),
        "seconds_per_step": state.get("step_seconds", 0.0) / max(step, 1),
        "peak_memory_bytes": _peak_memory(),
    }


def sizes(trainer: SlimTrainer) -> dict[str, int]:
    """How many parameters train and are in all, as the ranks are now; and how many trained at the start."""
    parameters = list(trainer.model.parameters())
    return {
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "trainable_parameters_at_start": trainer.run_state["start"]["trainable_parameters"],
        "total_parameters": sum(p.numel() for p in parameters),
    }


def _take_best(trainer: SlimTrainer) -> int:
    """Load the weights of the best evaluation; returns their step."""
    step, path = trainer.state.global_step, trainer.best_checkpoint
    if path is None or trainer.state.best_global_step == step:
        return step
    problems = checkpoint.verify(path)
    if problems:
        reason = f"the best checkpoint is damaged, the last weights are kept: {'; '.join(problems)}"
        trainer.events.write("skip", trainer.state.best_global_step, path=path.name, reason=reason)
        print(f"{path}: {reason}", file=sys.stderr)
        return step
    trainer.take(path)
    return trainer.state.best_global_step


def write_results(
    run: Path, cfg: TrainConfig, task: Task, method: Method, trainer: SlimTrainer, metrics: dict[str, Any]
) -> Path | None:
    """Write the final weights, ranks.json, metrics.json and the report; returns the report's path.

    Raises:
        SlimtuneError: the run folder cannot be written; the checkpoints are not touched.
    """
    try:
        if method.recipe is not None:
            st.save(trainer.model, run / ADAPTER, base=cfg.model_name_or_path or cfg.model_factory)
            size = sum(file.stat().st_size for file in (run / ADAPTER).glob("*.safetensors"))
        else:
            size = _save_model(trainer, task, run / "model")
        write_text(
            run / "ranks.json", json.dumps(trained_rows(trainer.model, method, trainer.run_state["start"]), indent=1)
        )
        metrics["adapter_bytes"] = size
        trainer.events.write("end", metrics["steps"], seconds=metrics["train_runtime"])
        write_text(run / resume.METRICS, json.dumps(metrics | {"info": task.info}, indent=1, default=str))
    except OSError as error:
        raise SlimtuneError(f"cannot write the results to {run}: {error.strerror}") from error
    return report(run)


def report(run: Path) -> Path | None:
    """Write the report of a run, finished or not, if its plots can be drawn; returns its path."""
    try:
        from slimtune.app.report import write_report

        return write_report(run)
    except ImportError as error:
        print(f"no report: {error} (pip install 'slimtune[plot]', then slimtune report {run})", file=sys.stderr)
        return None


def _save_model(trainer: SlimTrainer, task: Task, final: Path) -> int:
    """The whole model, sealed: compressed where layers hold structures, else as transformers stores it, or one
    safetensors file. Returns the weights' bytes."""
    with checkpoint.failing_clearly(final, final.parent):
        folder = checkpoint.prepare(final)
        tokenizer = task.processing if hasattr(task.processing, "save_pretrained") else None
        if structured_layers(trainer.model):
            save_compressed(
                trainer.model, folder, processing=tokenizer, facts={"method": trainer.run_state["config"]["method"]}
            )
        elif hasattr(trainer.model, "save_pretrained"):
            trainer.model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        else:
            save_weights(trainer.model, folder, False, [""])
        checkpoint.seal(folder, trainer.state.global_step)
        checkpoint.publish(folder, final)
    return sum(file.stat().st_size for file in final.glob("*.safetensors"))


def _peak_memory() -> int:
    """Bytes: of the device, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
