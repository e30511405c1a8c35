"""Layer 4: parameter groups for torch optimizers."""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import ConfigError
from .layers import Adapter
from .targets import extended

__all__ = ["param_groups"]


HEAD_RATE = 1e-3
"""AdamW's rate for modules trained in full beside an adapter, such as a new head."""


def param_groups(
    model: nn.Module, *, lr: float | None = None, b_ratio: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Trainable parameters grouped for a torch optimizer, by the role they play.

    LoRA+ (Hayou et al. 2024, arXiv 2402.12354, section 4) gives the factor that starts at zero a learning rate
    `b_ratio` times larger; the paper suggests 16. Biases, norms and parameters of a composition (DoRA's
    magnitudes) get no weight decay.

    Args:
        lr: learning rate of everything but the zero-started factors. None takes what each adapter's recipe wants
            of AdamW, and 1e-3 for modules trained in full.
        b_ratio: the rate of the zero-started factors as a multiple of the adapter's.
        weight_decay: decay of all matrices.

    Returns:
        Groups with keys "params", "lr", "weight_decay" and "name" ("base", "fast", "plain", "saved",
        "saved_plain"); empty ones are left out. Adapters of recipes with different rates have groups of their own.

    Raises:
        ConfigError: nothing is trainable, a rate is not positive, or `lr` is None and parameters train that belong to
            no adapter.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(4, 4)); _ = st.adapt(model, st.lora(rank=2))
        >>> [(g["name"], g["lr"]) for g in st.param_groups(model, b_ratio=4)]
        [('base', 0.0005), ('fast', 0.002)]
    """
    for key, value in (("lr", lr), ("b_ratio", b_ratio)):
        if value is not None and not value > 0:
            raise ConfigError(f"param_groups: {key} must be positive, got {value!r}")
    role: dict[int, tuple[str, float | None]] = {}
    for _, module in extended(model):
        for part in module.adapters.values():
            if isinstance(part, Adapter):
                wanted = part.recipe.learning_rate
                fast, plain = part.structure.fast_parameters, part.structure.plain_parameters
                for key, p in part.structure.named_parameters():
                    role[id(p)] = ("fast" if key in fast else "plain" if key in plain else "base", wanted)
                for p in part.composition.parameters():
                    role[id(p)] = ("plain", wanted)
            else:
                for p in part.parameters():
                    role[id(p)] = ("saved" if p.dim() > 1 else "saved_plain", HEAD_RATE)
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind, own = role.get(id(p), ("base" if p.dim() > 1 else "plain", None))
            rate = own if lr is None else lr
            if rate is None:
                raise ConfigError(f"param_groups: {name} trains but belongs to no adapter; give lr")
            groups.setdefault((kind, rate), []).append(p)
    if not groups:
        raise ConfigError("param_groups: the model has no trainable parameter; call adapt or load first")
    order = ("base", "fast", "plain", "saved", "saved_plain")
    return [
        {
            "params": params,
            "lr": rate * b_ratio if kind == "fast" else rate,
            "weight_decay": 0.0 if kind in ("plain", "saved_plain") else weight_decay,
            "name": kind,
        }
        for (kind, rate), params in sorted(groups.items(), key=lambda item: order.index(item[0][0]))
    ]
