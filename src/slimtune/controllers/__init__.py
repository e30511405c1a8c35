"""Layer 4: what happens around the optimizer's step."""

from .base import Attached, Controller, attach

__all__ = ["Attached", "Controller", "attach"]
