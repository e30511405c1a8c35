"""Layer 5: models and trainers of the Hugging Face ecosystem.

`from slimtune.hf import SlimtuneConfig` makes PEFT know slimtune; `import slimtune.hf` alone loads nothing.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .peft import SlimtuneConfig
    from .trainer import ControllerCallback

__all__ = ["ControllerCallback", "SlimtuneConfig"]

_HOMES = {"ControllerCallback": "trainer", "SlimtuneConfig": "peft"}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
