"""Controllers under transformers' Trainer and TRL's trainers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..controllers import Attached, attach, controllers_of
from ..errors import SlimtuneError
from ..layers import Adapter
from ..targets import hosts

__all__ = ["ControllerCallback"]


class ControllerCallback(TrainerCallback, ExportableState):
    """Attaches the controllers that the recipe being trained names, such as SingLoRA's ramp, when training begins.

    Their state goes into every checkpoint's `trainer_state.json`, and a resumed run goes on from it. Recipes that name
    none are left alone, so it does no harm to pass it always:
    `SFTTrainer(..., peft_config=SlimtuneConfig(recipe=st.singlora()), callbacks=[ControllerCallback()])`.

    Raises:
        SlimtuneError: a run resumed from a checkpoint that was written without it.
    """

    def __init__(self) -> None:
        self.attached: list[Attached] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        parts = [a for host in hosts(model).values() for a in host.adapters.values() if isinstance(a, Adapter)]
        trained = [a for a in parts if any(p.requires_grad for p in a.parameters())]
        recipes = {repr(a.recipe.controllers): a.recipe for a in trained}
        made = [c for recipe in recipes.values() for c in controllers_of(recipe, state.max_steps)]
        self.attached = [attach(c, model, optimizer) for c in made]
        if made and state.global_step:
            saved = state.stateful_callbacks.get(type(self).__name__, {"attributes": {"controllers": []}})
            states = saved["attributes"]["controllers"]
            if len(states) != len(made):
                raise SlimtuneError(
                    f"resume: the checkpoint holds the state of {len(states)} controllers, the recipe names {len(made)}"
                )
            for attached, before in zip(self.attached, states, strict=True):
                attached.load_state_dict(before)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for attached in self.attached:
            attached.remove()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"args": {}, "attributes": {"controllers": [a.state_dict() for a in self.attached]}}
