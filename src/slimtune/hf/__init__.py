"""Layer 5: models and trainers of the Hugging Face ecosystem.

`from slimtune.hf import SlimtuneConfig` makes PEFT know slimtune; `import slimtune.hf` alone loads nothing.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .peft import SlimtuneConfig

__all__ = ["SlimtuneConfig"]


def __getattr__(name: str) -> object:
    if name == "SlimtuneConfig":
        from .peft import SlimtuneConfig

        return SlimtuneConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
