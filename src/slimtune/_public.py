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
from .compressed import CompressedWriter, Expanded, load_compressed, save_compressed, save_expanded
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
from .oneshot import LordLayer, LordReport, lord
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
    "CompressedWriter",
    "ConfigError",
    "ConversionReport",
    "DataError",
    "DivergenceError",
    "Expanded",
    "FactorizeReport",
    "Factorized",
    "FileFormatError",
    "LayerConversion",
    "LayerError",
    "LordLayer",
    "LordReport",
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
    "load_compressed",
    "lord",
    "merge",
    "merged",
    "models",
    "ops",
    "param_groups",
    "recipes",
    "remove",
    "resize",
    "save",
    "save_compressed",
    "save_expanded",
    "summary",
    "to_lora",
    "trainable_parameters",
]
__all__ += compositions.__all__
__all__ += controllers.__all__
__all__ += models.__all__
__all__ += recipes.__all__
__all__ += structures.__all__
