"""Layer 4: what happens around the optimizer's step."""

from .base import Attached, Controller, attach, controllers_of
from .ramp import Ramp

__all__ = ["Attached", "Controller", "Ramp", "attach", "controllers_of"]
