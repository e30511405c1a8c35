"""Make a PyTorch model fit a task with few numbers: adapt, verify, merge.

Public names are loaded when the first one is used, so that the command line's help does not wait for torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._public import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import _public

    if name == "__all__" or name in _public.__all__:
        return getattr(_public, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    from ._public import __all__

    return list(__all__)
