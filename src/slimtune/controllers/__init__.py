"""Layer 4: what happens around the optimizer's step."""

from .adalora import AdaLoRA
from .ard import ARD
from .base import Attached, Controller, attach, controllers_of
from .cuttlefish import Cuttlefish
from .elalora import ElaLoRA
from .lorapro import LoRAPro
from .nuclear import NuclearNorm
from .orthogonality import Orthogonality
from .ramp import Ramp
from .trp import TRP

__all__ = [
    "ARD",
    "TRP",
    "AdaLoRA",
    "Attached",
    "Controller",
    "Cuttlefish",
    "ElaLoRA",
    "LoRAPro",
    "NuclearNorm",
    "Orthogonality",
    "Ramp",
    "attach",
    "controllers_of",
]
