"""Layer 4: modules of their own, rather than changes of a layer that is there."""

from .autoencoders import lorae_64, lorae_head, lorae_mnist, lorae_shapes, to_pixels
from .latents import LatentGaussian, LatentMixture, frechet_distance
from .lorae import FoldReport, LatentReport, LoRAE, LoRAELoss, latent_report, lorae_loss, reconstruction_error
from .surm import SurmAdapter, surm_adapter

__all__ = [
    "FoldReport",
    "LatentGaussian",
    "LatentMixture",
    "LatentReport",
    "LoRAE",
    "LoRAELoss",
    "SurmAdapter",
    "frechet_distance",
    "latent_report",
    "lorae_64",
    "lorae_head",
    "lorae_loss",
    "lorae_mnist",
    "lorae_shapes",
    "reconstruction_error",
    "surm_adapter",
    "to_pixels",
]
