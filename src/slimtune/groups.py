"""Layer 4: parameter groups for torch optimizers."""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import ConfigError
from .layers import Adapter
from .targets import extended

__all__ = ["param_groups"]


def param_groups(
    model: nn.Module, *, lr: float, b_ratio: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Trainable parameters grouped for a torch optimizer, by the role they play.

    LoRA+ (Hayou et al. 2024, arXiv 2402.12354, section 4) gives the factor that starts at zero a learning rate
    `b_ratio` times larger; the paper suggests 16. Biases, norms and parameters of a composition (DoRA's
    magnitudes) get no weight decay.

    Args:
        lr: learning rate of everything but the zero-started factors.
        b_ratio: their learning rate as a multiple of `lr`.
        weight_decay: decay of all matrices.

    Returns:
        Groups with keys "params", "lr", "weight_decay" and "name" ("base", "fast", "plain", "saved",
        "saved_plain"); empty ones are left out.

    Raises:
        ConfigError: nothing is trainable, or a rate is not positive.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(4, 4)); _ = st.adapt(model, st.lora(rank=2))
        >>> [(g["name"], g["lr"]) for g in st.param_groups(model, lr=1e-3, b_ratio=4)]
        [('base', 0.001), ('fast', 0.004)]
    """
    for key, value in (("lr", lr), ("b_ratio", b_ratio)):
        if not value > 0:
            raise ConfigError(f"param_groups: {key} must be positive, got {value!r}")
    role: dict[int, str] = {}
    for _, module in extended(model):
        for part in module.adapters.values():
            if isinstance(part, Adapter):
                for key, p in part.structure.named_parameters():
                    role[id(p)] = "fast" if key in part.structure.fast_parameters else "base"
                for p in part.composition.parameters():
                    role[id(p)] = "plain"
            else:
                for p in part.parameters():
                    role[id(p)] = "saved" if p.dim() > 1 else "saved_plain"
    groups: dict[str, list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            groups.setdefault(role.get(id(p), "base" if p.dim() > 1 else "plain"), []).append(p)
    if not groups:
        raise ConfigError("param_groups: the model has no trainable parameter; call adapt or load first")
    undecayed = ("plain", "saved_plain")
    return [
        {
            "params": groups[name],
            "lr": lr * b_ratio if name == "fast" else lr,
            "weight_decay": 0.0 if name in undecayed else weight_decay,
            "name": name,
        }
        for name in ("base", "fast", "plain", "saved", "saved_plain")
        if name in groups
    ]
