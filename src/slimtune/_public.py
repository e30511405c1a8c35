"""Every public name, sorted; the package loads them from here when the first one is used."""

# ruff: noqa: F403
from . import (
    allocate,
    calibrate,
    compositions,
    controllers,
    errors,
    factors,
    initialisers,
    io,
    models,
    ops,
    recipes,
    structures,
)
from .app.convert import convert
from .compositions import *
from .compress import Factorized, FactorizeReport, expand, factorize
from .controllers import *
from .conversion import ConversionReport, LayerConversion, to_lora
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
from .models import *
from .peft_format import export_peft, import_peft
from .ranks import compact, resize
from .recipe import Recipe
from .recipes import *
from .structures import *
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
    "ConfigError",
    "ConversionReport",
    "DataError",
    "DivergenceError",
    "FactorizeReport",
    "Factorized",
    "FileFormatError",
    "LayerConversion",
    "LayerError",
    "MergeReport",
    "Recipe",
    "SlimtuneError",
    "StructureError",
    "Summary",
    "TargetError",
    "UninitializedError",
    "VerificationError",
    "activate",
    "adapt",
    "adapter_names",
    "allocate",
    "calibrate",
    "compact",
    "convert",
    "disabled",
    "errors",
    "expand",
    "export_peft",
    "factorize",
    "factors",
    "import_peft",
    "initialisers",
    "initialize",
    "io",
    "load",
    "merge",
    "merged",
    "models",
    "ops",
    "param_groups",
    "recipes",
    "remove",
    "resize",
    "save",
    "summary",
    "to_lora",
    "trainable_parameters",
]
__all__ += compositions.__all__
__all__ += controllers.__all__
__all__ += models.__all__
__all__ += recipes.__all__
__all__ += structures.__all__
