"""Layer 4: what happens around the optimizer's step."""

from .adalora import AdaLoRA
from .ard import ARD
from .base import Attached, Controller, attach, controllers_of
from .elalora import ElaLoRA
from .lorapro import LoRAPro
from .orthogonality import Orthogonality
from .ramp import Ramp

__all__ = [
    "ARD",
    "AdaLoRA",
    "Attached",
    "Controller",
    "ElaLoRA",
    "LoRAPro",
    "Orthogonality",
    "Ramp",
    "attach",
    "controllers_of",
]
