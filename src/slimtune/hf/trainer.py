"""Controllers under transformers' Trainer and TRL's trainers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from ..controllers import Attached, Controller, attach, controllers_of
from ..controllers.base import adapters
from ..errors import SlimtuneError

__all__ = ["ControllerCallback"]


class ControllerCallback(TrainerCallback, ExportableState):
    """Attaches the controllers that the recipe being trained names, such as SingLoRA's ramp, when training begins.

    Their state goes into every checkpoint's `trainer_state.json`, and a resumed run goes on from it. What they have to
    say about a step, such as {"ranks": {layer: R}}, goes into the log history; at the end of training, after the best
    checkpoint has been loaded where that is wanted, they tidy up the model. Under `torch_compile` and with several
    processes, those that change ranks mask them instead. Recipes that name none are left alone, so it does no harm to
    pass it always:
    `SFTTrainer(..., peft_config=SlimtuneConfig(recipe=st.singlora()), callbacks=[ControllerCallback()])`.

    Raises:
        SlimtuneError: a run resumed from a checkpoint that was written without it.
    """

    def __init__(self) -> None:
        self.attached: list[Attached] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        made = _controllers(model, state.max_steps)
        if args.torch_compile or args.world_size > 1:
            fix_shapes(made)
        if made and state.global_step:
            _put_back(made, state.stateful_callbacks.get(type(self).__name__))
        self.attached = [attach(c, model, optimizer) for c in made]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            return
        for attached in self.attached:
            if (note := attached.controller.note()) is not None:
                state.log_history.append({**note, "epoch": state.epoch, "step": state.global_step})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best = state.best_model_checkpoint
        if self.attached and args.load_best_model_at_end and best:  # the model is that of another step
            self._go_back(Path(best), kwargs["model"])
        for attached in self.attached:
            attached.finish()

    def _go_back(self, folder: Path, model: nn.Module) -> None:
        """Make the controllers what they were at a checkpoint whose weights the model has."""
        try:
            saved = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SlimtuneError(f"{folder}: its controllers' state cannot be read: {error}") from None
        _put_back([a.controller for a in self.attached], saved["stateful_callbacks"].get(type(self).__name__))
        for attached in self.attached:
            attached.optimizer.state.clear()  # the moments of the last step, perhaps of other shapes
            attached.controller.begin(model, attached.optimizer)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"args": {}, "attributes": {"controllers": [a.state_dict() for a in self.attached]}}


def fix_shapes(controllers: Sequence[Controller]) -> None:
    """Let controllers that change ranks, and have not been told how, mask them: graphs and buckets hold shapes."""
    for controller in controllers:
        if getattr(controller, "masked", False) is None:
            controller.masked = True  # type: ignore[attr-defined]


def _controllers(model: nn.Module, steps: int) -> list[Controller]:
    trained = [a for _, _, a in adapters(model) if any(p.requires_grad for p in a.parameters())]
    recipes = {repr(a.recipe.controllers): a.recipe for a in trained}
    return [c for recipe in recipes.values() for c in controllers_of(recipe, steps)]


def _put_back(controllers: Sequence[Controller], saved: dict[str, Any] | None) -> None:
    states = saved["attributes"]["controllers"] if saved else []
    if len(states) != len(controllers):
        raise SlimtuneError(
            f"resume: the checkpoint holds the state of {len(states)} controllers, the recipe names {len(controllers)}"
        )
    for controller, before in zip(controllers, states, strict=True):
        controller.load_state_dict(before)
