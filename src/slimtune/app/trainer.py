"""The Hugging Face Trainer with sealed checkpoints, exact resume and a stop at the first number that is not finite."""

from __future__ import annotations

import contextlib
import json
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from slimtune.app import checkpoint
from slimtune.app.callbacks import Progress
from slimtune.app.events import Events
from slimtune.app.finite import culprit, first_bad_gradient
from slimtune.app.resume import RUN_STATE, read_state
from slimtune.app.signals import StopRequest
from slimtune.app.weights import inside, load_weights, save_weights
from slimtune.controllers import Attached, Controller, attach
from slimtune.errors import DivergenceError, SlimtuneError


class SlimTrainer(Trainer):
    """What it changes, and nothing else:

    - the optimizer gets `param_groups` as they are;
    - batch norms keep their running statistics, unless everything in their module trains: they are the base's;
    - before each optimizer step loss and gradients are checked; the step does not happen if one is not finite;
    - the method's controllers are attached to the optimizer; they count its steps, not batches or epochs;
    - a checkpoint holds what trains, optimizer, schedule, random state and `run_state.json`, and is sealed;
    - evaluation leaves the random state as it found it, so that when it happens does not change the training;
    - a stop request is answered after the step, by a checkpoint, on all processes together.
    """

    def __init__(
        self,
        *,
        make_groups: Callable[[nn.Module], list[dict[str, Any]]],
        adapter: bool,
        whole: Sequence[str],
        loss: Callable[..., Any] | None,
        save_total_limit: int,
        keep_best: bool,
        stop: StopRequest,
        events: Events,
        progress: Progress,
        controllers: Sequence[Controller] = (),
        **options: Any,
    ):
        super().__init__(**options)
        self.make_groups = make_groups
        self.adapter = adapter
        self.whole = whole
        self.task_loss = loss
        self.save_total_limit = save_total_limit
        self.keep_best = keep_best
        self.stop = stop
        self.events = events
        self.progress = progress
        self.controllers = {type(c).__name__: c for c in controllers}
        self.attached: list[Attached] = []
        self.clock: Callable[[], float] = lambda: 0.0  # seconds of training, those before a resume included
        self.run_state: dict[str, Any] = {}
        self.split = "validation"
        self._frozen_norms = [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase) and not inside(name, whole)
        ]
        self._window: list[Any] = []
        self._losses: list[Tensor] = []
        if loss is not None:
            self.model_accepts_loss_kwargs = True

    # ---- the step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:  # type: ignore[has-type]
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer: torch.optim.Optimizer = cls(self.make_groups(self.model), **options)
        return self.optimizer

    def attach_controllers(self, states: Mapping[str, Any]) -> None:
        """Connect the method's controllers, their state put back, once weights and optimizer are as they were."""
        for name, controller in self.controllers.items():
            if name in states:
                controller.load_state_dict(states[name])
        self.attached = [attach(c, self.model, self.optimizer) for c in self.controllers.values()]

    def finish_controllers(self) -> bool:
        """Let the controllers tidy up the model that is kept; whether any of them does more than nothing."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            for attached in self.attached:
                attached.finish()
        if self.args.should_save:
            for text in dict.fromkeys(str(warning.message) for warning in told):
                print(f"warning: {text}", file=sys.stderr)
        self.attached = []
        return any(type(c).end is not Controller.end for c in self.controllers.values())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        for norm in self._frozen_norms:
            norm.eval()
        if self.task_loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        found = self.task_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        if num_items_in_batch is None or not self.args.average_tokens_across_devices:
            return found
        loss, outputs = found if return_outputs else (found, None)
        loss = loss * self.accelerator.num_processes  # a share of the sum over all; gradients will be averaged
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        self._window.append(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        if self.accelerator.sync_gradients:
            self._agree()
            self._window, self._losses = [], []
        return loss

    def _agree(self) -> None:
        """One answer for all processes: is every number finite, and has anyone been asked to stop?"""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients) + torch.stack(self._losses).sum()
        flags = torch.stack([~torch.isfinite(total), torch.tensor(bool(self.stop.signal), device=total.device)])
        if self.args.world_size > 1:
            flags = self.accelerator.reduce(flags.int(), reduction="sum")
        diverged, stopped = flags.bool().tolist()
        if stopped:
            self.stop.signal = self.stop.signal or "SIGTERM"
        if diverged:
            step = self.state.global_step + 1
            raise DivergenceError(f"step {step}: {self._explain()}; stopped before this step changed a weight")

    def _explain(self) -> str:
        for inputs, loss in zip(self._window, self._losses, strict=True):
            if not torch.isfinite(loss):
                where = culprit(self.model, self._prepare_inputs(inputs), self._forward)
                return f"the loss is {loss.item()}; first seen in {where}"
        return first_bad_gradient(self.model)

    def _forward(self, inputs: dict[str, Any]) -> None:
        with self.compute_loss_context_manager():
            self.compute_loss(self.model, inputs)

    # ---- evaluation

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        with random_state_kept():
            found = super().evaluate(*args, **options)
        loss = found.get(f"{options.get('metric_key_prefix', 'eval')}_loss")
        if loss is not None and not math.isfinite(loss):
            raise DivergenceError(f"step {self.state.global_step}: the {self.split} loss is {loss}")
        return found

    # ---- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        for name, p in self.model.named_parameters():
            if p.requires_grad and not torch.isfinite(p).all():
                raise DivergenceError(f"step {self.state.global_step}: after it the weight '{name}' is not finite")
        run = Path(self.args.output_dir)
        final = run / f"checkpoint-{self.state.global_step}"
        self.store_flos()
        window = self.accelerator.gather(self._tr_loss.reshape(1)).mean().item()
        self.run_state["window"] = {"loss": window, "since": self._globalstep_last_logged}
        self.run_state["train_runtime"] = self.clock()
        self.run_state["controllers"] = {name: c.state_dict() for name, c in self.controllers.items()}
        self._together(final, lambda: checkpoint.prepare(final) if self.args.should_save else None)
        self._together(final, lambda: self._write(checkpoint.staging(final)))
        self._together(final, lambda: self._publish(run, final) if self.args.should_save else None)

    def _write(self, folder: Path) -> None:
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        self._save_scaler(str(folder))
        if self.args.should_save:
            save_weights(self.model, folder, self.adapter, self.whole)
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            (folder / RUN_STATE).write_text(json.dumps(self.run_state, indent=1), encoding="utf-8")

    def _publish(self, run: Path, final: Path) -> None:
        folder = checkpoint.staging(final)
        checkpoint.seal(folder, self.state.global_step)
        checkpoint.publish(folder, final)
        checkpoint.rotate(run, self.save_total_limit, [self.best_checkpoint] if self.best_checkpoint else [])

    def _together(self, final: Path, action: Callable[[], object]) -> None:
        """Do a part of the save on every process and wait for all; if it fails on one, it fails on all."""
        problem: SlimtuneError | None = None
        try:
            with checkpoint.failing_clearly(final, Path(self.args.output_dir)):
                action()
        except SlimtuneError as error:
            problem = error
        failed = torch.tensor(int(problem is not None), device=self.args.device)
        if self.args.world_size > 1:
            failed = self.accelerator.reduce(failed, reduction="sum")
        if problem:
            raise problem
        if failed.item():
            raise SlimtuneError(f"cannot write checkpoint {final}: another process failed")

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint of the best evaluation, if such are kept."""
        if not self.keep_best or not self.state.best_global_step:
            return None
        return Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        for part, file in ((self.optimizer, OPTIMIZER_NAME), (self.lr_scheduler, SCHEDULER_NAME)):
            part.load_state_dict(_read(Path(checkpoint) / file))

    def load(self, path: Path) -> None:
        """Take over the weights of a checkpoint; its ranks may be others than the model's."""
        load_weights(self.model, path, self.adapter, self.whole)

    def take(self, path: Path) -> None:
        """Take over the weights of a checkpoint to keep them, the controllers as they were when it was written."""
        self.load(path)
        if self.controllers:
            for attached in self.attached:
                attached.remove()
            self.optimizer = None  # type: ignore[assignment]  # that of other parameters
            self.create_optimizer().load_state_dict(_read(path / OPTIMIZER_NAME))
            self.attach_controllers(read_state(path).get("controllers", {}))

    def restore(self, path: Path) -> None:
        """Take over the weights and the history of a checkpoint after which there is nothing left to train."""
        self.take(path)
        self.state = TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))


def _read(file: Path) -> Any:
    # to "cpu" first, always: transformers 5.17 cannot restore to the "cpu:0" of a distributed run
    return torch.load(file, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Within: any use of random numbers. Afterwards: every generator is where it was."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
