"""What a training run needs before its first step: folder, arguments, schedule, room on the disk, the Trainer."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
import yaml
from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainingArguments

from slimtune.app import checkpoint, resume
from slimtune.app.callbacks import Progress, Run
from slimtune.app.config import TrainConfig
from slimtune.app.evaluate import measure_base
from slimtune.app.events import Events
from slimtune.app.method import Method, controllers_for, make_groups
from slimtune.app.signals import StopRequest
from slimtune.app.tasks import Task
from slimtune.app.trainer import SlimTrainer
from slimtune.errors import ConfigError, SlimtuneError
from slimtune.files import write_synced
from slimtune.hf.trainer import fix_shapes


def arguments(cfg: TrainConfig) -> TrainingArguments:
    """The Trainer's arguments; making them starts the process group under torchrun.

    Raises:
        ConfigError: something this machine cannot do, such as a tracker that is not installed.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        made = TrainingArguments(
            output_dir=cfg.output_dir,
            per_device_train_batch_size=cfg.per_device_train_batch_size,
            per_device_eval_batch_size=cfg.per_device_eval_batch_size,
            gradient_accumulation_steps=cfg.gradient_accumulation_steps,
            **_recompute(cfg.gradient_checkpointing),
            warmup_steps=cfg.warmup_ratio,
            lr_scheduler_type=cfg.lr_scheduler_type,
            max_grad_norm=cfg.max_grad_norm,
            weight_decay=cfg.weight_decay,
            optim=cfg.optim,
            seed=cfg.seed,
            data_seed=cfg.data_seed,
            bf16=cfg.bf16,
            torch_compile=cfg.torch_compile,
            use_cpu=not torch.accelerator.is_available(),  # without it processes on CPUs do not find each other
            logging_strategy="steps",
            logging_steps=cfg.logging_steps,
            logging_nan_inf_filter=False,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            dataloader_num_workers=cfg.dataloader_num_workers,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=cfg.report_to or "none",
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        made.device  # noqa: B018  (a property that sets up the devices)
    except (ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(str(error)) from error
    return made


def _recompute(wanted: bool) -> dict[str, Any]:
    """Activation checkpointing, under the name this transformers has for it."""
    if not wanted:
        return {}
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def plan_steps(cfg: TrainConfig, made: TrainingArguments, examples: int) -> int:
    """Fill in the schedule, all of it in optimizer steps, and return their number."""
    batches = math.ceil(math.ceil(examples / cfg.per_device_train_batch_size) / made.world_size)
    epoch = math.ceil(batches / cfg.gradient_accumulation_steps)
    made.max_steps = cfg.max_steps or math.ceil(cfg.num_train_epochs * epoch)
    made.eval_steps = cfg.eval_steps or epoch
    made.save_steps = cfg.save_steps or made.eval_steps
    return made.max_steps


def trainer(
    cfg: TrainConfig, task: Task, method: Method, made: TrainingArguments, events: Events, stop: StopRequest
) -> SlimTrainer:
    """Put the Trainer together.

    Raises:
        ConfigError: the model cannot do what the configuration asks, or a tracker is not installed.
    """
    if cfg.gradient_checkpointing and not hasattr(task.model, "gradient_checkpointing_enable"):
        raise ConfigError(f"gradient_checkpointing: {type(task.model).__name__} does not support it")
    made.label_names = task.label_names
    progress = Progress(task.metric)
    controllers = controllers_for(cfg, method, made.max_steps)
    if made.world_size > 1 or cfg.torch_compile:
        fix_shapes(controllers)
    try:
        built = SlimTrainer(
            make_groups=lambda model: make_groups(cfg, model, method, task.head),
            adapter=method.recipe is not None,
            whole=method.whole,
            loss=task.loss,
            save_total_limit=cfg.save_total_limit,
            keep_best=cfg.load_best_model_at_end,
            stop=stop,
            events=events,
            progress=progress,
            controllers=controllers,
            model=task.model,
            args=made,
            data_collator=task.collator,
            train_dataset=task.train,
            eval_dataset=task.validation,
            compute_metrics=task.compute_metrics,
            preprocess_logits_for_metrics=task.preprocess_logits,
            callbacks=[*task.callbacks, progress],
        )
    except (RuntimeError, ImportError) as error:
        raise ConfigError(f"report_to: {error}") from error
    built.remove_callback(PrinterCallback)
    built.remove_callback(ProgressCallback)
    progress.trainer = built
    patience = cfg.early_stopping_patience
    follow = Run(built, task.metric, task.greater_is_better, patience, cfg.load_best_model_at_end)
    if not task.fresh if cfg.evaluate_base is None else cfg.evaluate_base:
        follow.measure_base = lambda: measure_base(built, task, adapter=method.recipe is not None)
    built.add_callback(follow)
    built.make_groups(task.model)  # raises now, not at the first step
    return built


def check_folder(run: Path) -> None:
    """Make the run folder if need be. Raises SlimtuneError if it cannot be written."""
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SlimtuneError(f"output_dir: cannot write to {run}: {error.strerror}") from error
    if not os.access(run, os.W_OK):
        raise SlimtuneError(f"output_dir: cannot write to {run}: permission denied")


def open_folder(run: Path, cfg: TrainConfig) -> None:
    """Make the run folder ready: leftovers of killed saves removed, the resolved configuration written."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        checkpoint.clean(run)
        if cfg.resume_from_checkpoint is False or not checkpoint.checkpoints(run):
            resume.start_afresh(run)
        (run / resume.METRICS).unlink(missing_ok=True)
        resolved = cfg.resolved() | {"resume_from_checkpoint": "auto"}  # run again, this file continues
        write_text(run / resume.CONFIG, yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise SlimtuneError(f"output_dir: cannot write to {run}: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    new = path.with_name(f".{path.name}.tmp")
    write_synced(new, text.encode())
    os.replace(new, path)


def check_space(run: Path, model: nn.Module) -> None:
    """Raises SlimtuneError unless one checkpoint (weights and two moments of what trains) fits on the disk."""
    need = 3 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    free = shutil.disk_usage(run).free
    if free < need:
        raise SlimtuneError(
            f"output_dir: a checkpoint takes about {need / 2**20:,.0f} MiB, but {run} has {free / 2**20:,.0f} MiB free"
        )


def seed(value: int) -> None:
    """Seed every random generator."""
    transformers.set_seed(value)


def barrier() -> None:
    """Wait for all processes of a distributed run."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
