"""Every error slimtune raises on purpose. `exit_code` is what the command line returns for it."""


class SlimtuneError(Exception):
    """Base class: something the user can act on, said in one message."""

    exit_code = 1


class ConfigError(SlimtuneError, ValueError):
    """A configuration or command line that cannot be used as written."""

    exit_code = 2


class DataError(SlimtuneError, ValueError):
    """A dataset that does not hold what the task needs."""

    exit_code = 2


class TargetError(SlimtuneError, ValueError):
    """`targets` match nothing, or match a layer that cannot be adapted."""

    exit_code = 2


class AdapterNameError(SlimtuneError, ValueError):
    """An adapter name that is taken, unknown, or not a plain name."""

    exit_code = 2


class StructureError(SlimtuneError, ValueError):
    """Sizes or options that a structure or composition cannot take."""

    exit_code = 2


class UninitializedError(SlimtuneError, RuntimeError):
    """An adapter still on the meta device was asked to compute."""


class FileFormatError(SlimtuneError, ValueError):
    """A file that is damaged, unsafe, or does not fit the model."""


class VerificationError(SlimtuneError, RuntimeError):
    """A result that was measured and found wrong."""

    exit_code = 3


class DivergenceError(SlimtuneError, RuntimeError):
    """Training produced a loss or gradient that is not finite."""
