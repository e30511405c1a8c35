"""Every public name, sorted; the package loads them from here when the first one is used."""

from . import errors, io, ops, recipes
from .compositions import Additive, Composition, LinearMap, Magnitude
from .controllers import Attached, Controller, attach
from .errors import (
    AdapterNameError,
    ConfigError,
    DataError,
    DivergenceError,
    FileFormatError,
    SlimtuneError,
    StructureError,
    TargetError,
    UninitializedError,
    VerificationError,
)
from .groups import param_groups
from .io import load, save
from .merging import LayerError, MergeReport, merge, merged
from .peft_format import export_peft, import_peft
from .recipe import Recipe
from .recipes import dora, lora, rslora
from .structures import Factored, LowRank, Structure
from .targets import adapter_names, trainable_parameters
from .verbs import (
    Summary,
    activate,
    adapt,
    disabled,
    initialize,
    remove,
    summary,
)

__all__ = [
    "AdapterNameError",
    "Additive",
    "Attached",
    "Composition",
    "ConfigError",
    "Controller",
    "DataError",
    "DivergenceError",
    "Factored",
    "FileFormatError",
    "LayerError",
    "LinearMap",
    "LowRank",
    "Magnitude",
    "MergeReport",
    "Recipe",
    "SlimtuneError",
    "Structure",
    "StructureError",
    "Summary",
    "TargetError",
    "UninitializedError",
    "VerificationError",
    "activate",
    "adapt",
    "adapter_names",
    "attach",
    "disabled",
    "dora",
    "errors",
    "export_peft",
    "import_peft",
    "initialize",
    "io",
    "load",
    "lora",
    "merge",
    "merged",
    "ops",
    "param_groups",
    "recipes",
    "remove",
    "rslora",
    "save",
    "summary",
    "trainable_parameters",
]
