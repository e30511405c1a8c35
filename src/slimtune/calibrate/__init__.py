"""Layer 4: what a model's data say about its layers: mean gradients and inputs before training, and covariances before
compressing."""

from .adapters import fit, gradients, inputs
from .covariances import errors, fisher, moments

__all__ = ["errors", "fisher", "fit", "gradients", "inputs", "moments"]
