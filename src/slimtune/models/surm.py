"""SURM's adapter placement: a residual module with a structured square matrix.

Shapes: N features, *T batch dims.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import StructureError
from ..ops import replayed_dropout
from ..recipe import Recipe
from ..structures import Kronecker, Structure
from ..structures.base import check_count

__all__ = ["SurmAdapter", "surm_adapter"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "identity": lambda x: x,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "relu": F.relu,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "tanh": torch.tanh,
}
NORMS = (None, "pre", "post")


class SurmAdapter(nn.Module):
    """y = x + phi(M drop(n(x))) + b on the last dimension; what `surm_adapter` makes. M is `structure`, b is `bias`."""

    def __init__(
        self,
        structure: Structure,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        norm: str | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if structure.out_features != structure.in_features:
            sizes = f"{structure.out_features} x {structure.in_features}"
            raise StructureError(f"surm_adapter: the structure must be square, got {sizes}")
        if norm not in NORMS:
            raise StructureError(f"surm_adapter: norm must be None, 'pre' or 'post', got {norm!r}")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise StructureError(f"surm_adapter: dropout must be a number in [0, 1), got {dropout!r}")
        self.activation_name = activation if isinstance(activation, str) else _name(activation)
        self.activation = _checked(activation, self.activation_name)
        self.norm, self.dropout, self.structure = norm, dropout, structure
        like = next(structure.parameters())
        self.bias = nn.Parameter(torch.zeros(structure.out_features, device=like.device, dtype=like.dtype))
        if norm is not None:
            self.layer_norm = nn.LayerNorm(structure.out_features, device=like.device, dtype=like.dtype)
        if not like.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw M's starting values, so that M = 0, and set the bias to 0; what `to_empty` of a meta model needs."""
        self.structure.reset_parameters()
        self.structure.prepare(_no_weight)
        self.bias.zero_()
        if self.norm is not None:
            self.layer_norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:  # (*T, N) -> (*T, N)
        z = self._normalised(x) if self.norm == "pre" else x
        if self.training and self.dropout:
            h = replayed_dropout(self.structure, z, self.dropout)
        else:
            h = self.structure(z)
        y = x + self.activation(h) + self.bias.to(x.dtype)
        return self._normalised(y) if self.norm == "post" else y

    def _normalised(self, x: Tensor) -> Tensor:
        n = self.layer_norm
        return F.layer_norm(x, n.normalized_shape, n.weight.to(x.dtype), n.bias.to(x.dtype), n.eps)

    def extra_repr(self) -> str:
        norm = "" if self.norm is None else f", {self.norm} norm"
        return f"{self.activation_name}{norm}, dropout {self.dropout}"


def surm_adapter(
    features: int,
    structure: type[Structure] = Kronecker,
    options: Mapping[str, Any] | None = None,
    activation: str | Callable[[Tensor], Tensor] = "gelu",
    norm: str | None = None,
    dropout: float = 0.0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SurmAdapter:
    """A module y = x + phi(M drop(x)) + b for the last dimension of x, with a structured N x N matrix M.

    SURM, Sehanobish et al. 2024, arXiv 2406.17740: the adapter placement, one square matrix and one activation instead
    of a way down and a way up. M = 0 and b = 0 at the start, so the module starts as the identity (without norm
    "post"). It knows nothing of its host and cannot be merged into a weight.

    Args:
        features: N.
        structure: the class of M, any structure that needs no weight below it.
        options: its keyword options.
        activation: phi, a name or a function of a tensor, with phi(0) = 0 and phi'(0) not 0.
        norm: None; "pre" for phi(M drop(LayerNorm(x))), "post" for LayerNorm(x + phi(M drop(x)) + b).
        dropout: of M's input, while training; rounded to 1/256.
        device: of the parameters.
        dtype: of the parameters; the forward computes in x's.

    Raises:
        StructureError: an activation with phi(0) != 0 (sigmoid: not the identity at the start) or phi'(0) = 0 (ReLU: no
            gradient would ever reach M, for M x = 0 at the start); an unknown norm; dropout outside [0, 1); sizes or
            options that the structure refuses; a structure that needs the weight of a layer.

    Example:
        >>> adapter = surm_adapter(6, activation="tanh")
        >>> x = torch.randn(2, 6)
        >>> torch.equal(adapter(x), x)
        True
        >>> surm_adapter(6, activation="relu")
        Traceback (most recent call last):
        ...
        slimtune.errors.StructureError: surm_adapter: relu has derivative 0 at 0: M starts at 0 and would never learn

    In BERT the published place is after the dense layer and dropout of each attention and feed-forward output, before
    the residual sum, which is where `output.dropout` stands. Training, saving and loading are plain torch::

        model.requires_grad_(False)
        for layer in model.bert.encoder.layer:
            for output in (layer.attention.output, layer.output):
                output.dropout = nn.Sequential(output.dropout, surm_adapter(model.config.hidden_size, dropout=0.15))
        model.classifier.requires_grad_(True)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW((model.get_parameter(n) for n in trained), lr=2e-3)
        ...
        torch.save({n: model.get_parameter(n) for n in trained}, "adapter.pt")
        model.load_state_dict(torch.load("adapter.pt"), strict=False)  # into a model prepared by the same lines
    """
    check_count(features, "surm_adapter: features")
    if not isinstance(structure, type) or not issubclass(structure, Structure):
        raise StructureError(f"surm_adapter: structure must be a class of Structure, got {structure!r}")
    Recipe(structure, options or {}, name="surm_adapter")  # refuses options that the structure does not have
    made: Callable[..., Structure] = structure
    M = made(features, features, **(options or {}), device=device, dtype=dtype)
    return SurmAdapter(M, activation, norm, dropout)


def _no_weight(dtype: torch.dtype | None = None) -> Tensor:
    raise StructureError("surm_adapter: this structure is made from a layer's weight, and an adapter module has none")


def _name(function: Callable[[Tensor], Tensor]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _checked(activation: str | Callable[[Tensor], Tensor], name: str) -> Callable[[Tensor], Tensor]:
    """The function, if an M that starts at zero starts as nothing and can learn through it."""
    function = ACTIVATIONS.get(activation) if isinstance(activation, str) else activation
    if function is None:
        raise StructureError(f"surm_adapter: no activation {name!r}; there are {', '.join(ACTIVATIONS)}, or a function")
    zero = torch.zeros(1, requires_grad=True)
    with torch.enable_grad():
        value = function(zero)
        slope = torch.autograd.grad(value.sum(), zero)[0] if value.requires_grad else torch.zeros(1)
    if value.item() != 0:
        raise StructureError(
            f"surm_adapter: {name} is {value.item():.4g} at 0, so the adapter would not start as the identity"
        )
    if slope.item() == 0:
        raise StructureError(f"surm_adapter: {name} has derivative 0 at 0: M starts at 0 and would never learn")
    return function
