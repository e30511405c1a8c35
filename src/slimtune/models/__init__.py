"""Layer 4: modules of their own, rather than changes of a layer that is there."""

from .surm import SurmAdapter, surm_adapter

__all__ = ["SurmAdapter", "surm_adapter"]
