"""A penalty on directions that are not orthonormal, as a gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SlimtuneError, StructureError
from ..ops.processes import like, whole
from .base import Controller, trained_adapters

__all__ = ["Orthogonality"]


class Orthogonality(Controller):
    """Adds the gradient of coefficient * (1 / K) sum |A A^T - I|_F + |B^T B - I|_F over the K thin factors.

    The regulariser of AdaLoRA, Zhang et al. 2023, arXiv 2303.10512, eq. 4, as its code and PEFT's have it: norms not
    squared, and their mean over all A (R, I) and B (O, R). `squared=True` takes eq. 4's |.|_F^2, still averaged. It
    acts after clipping and mixed precision's unscaling, so that neither changes its strength, and it is there
    whatever computes the loss.

    A rank whose direction is zero, as one that is masked has, is none: it has no part in the penalty. Parameters
    without a gradient are left alone, and those of another optimizer to a controller attached there, though all count
    in K.

    Args:
        coefficient: gamma, at least 0. AdaLoRA's runs take 0.1 or 0.3, PEFT 0.5.
        squared: of the norm.
        adapter: name of the adapter; by default all those in training whose recipe names Orthogonality.

    Raises:
        StructureError: a coefficient that is not a number of at least 0; when attached, an adapter without thin
            factors.
        SlimtuneError: when attached to a model without such an adapter, or to an optimizer that holds no factor of it.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(4, 4, bias=False)); _ = st.adapt(model, st.adalora(rank=2))
        >>> A = model[0].adapters["default"].structure.A; A.grad = torch.zeros_like(A)
        >>> optimizer = torch.optim.SGD([A], lr=1.0)
        >>> _ = st.attach(st.Orthogonality(1.0), model, optimizer)
        >>> before = (A @ A.T - torch.eye(3)).norm().item()
        >>> optimizer.step(); (A @ A.T - torch.eye(3)).norm().item() < before
        True
    """

    def __init__(self, coefficient: float = 0.1, *, squared: bool = False, adapter: str | None = None) -> None:
        number = isinstance(coefficient, (int, float)) and not isinstance(coefficient, bool)
        if not number or not 0 <= coefficient < math.inf:
            raise StructureError(f"Orthogonality: coefficient must be a number of at least 0, got {coefficient!r}")
        if not isinstance(squared, bool):
            raise StructureError(f"Orthogonality: squared must be true or false, got {squared!r}")
        self.coefficient, self.squared, self.adapter = coefficient, squared, adapter

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._factors: list[tuple[nn.Parameter, int]] = []
        self._optimizer = optimizer
        for layer, _, a in trained_adapters(model, "Orthogonality", self.adapter):
            thin = [(getattr(a.structure, name), dim) for name, dim in a.structure.rank_dims.items()]
            thin = [(p, dim) for p, dim in thin if isinstance(p, nn.Parameter) and p.dim() == 2]
            if not thin:
                kind = type(a.structure).__name__
                raise StructureError(
                    f"Orthogonality: {layer}: {kind} has no thin factors whose ranks can be told apart"
                )
            self._factors += thin
        self._held = {p for group in optimizer.param_groups for p in group["params"]}
        if self._held.isdisjoint(p for p, _ in self._factors):
            raise SlimtuneError("Orthogonality: attach it to the optimizer that holds the adapter's factors")

    def value(self) -> Tensor:
        """The penalty itself, 0-d."""
        norms = []
        for p, dim in self._factors:
            M = p if dim == 0 else p.t()  # (R, I)
            norm = _excess(M @ M.t()).norm()
            norms.append(norm.square() if self.squared else norm)
        return self.coefficient * torch.stack(norms).mean()

    @torch.no_grad()
    def before_step(self, model: nn.Module) -> None:
        if not self.coefficient:
            return
        alike: dict[tuple[Any, ...], list[nn.Parameter]] = {}
        for p, dim in self._factors:
            if p.grad is not None and p in self._held:
                alike.setdefault((dim, p.shape, p.dtype, p.device), []).append(p)
        strength = 2 * self.coefficient / len(self._factors)
        unscale = getattr(self._optimizer, "grad_scale", None)  # a fused optimizer's gradients are still scaled
        for (dim, *_), parameters in alike.items():
            M = torch.stack([whole(p) for p in parameters])
            D = _excess(M @ M.mT if dim == 0 else M.mT @ M)  # (N, R, R)
            norms = torch.linalg.matrix_norm(D, keepdim=True)
            D *= 2 * strength if self.squared else strength
            if not self.squared:
                D /= norms.clamp_min(torch.finfo(D.dtype).tiny)
            if unscale is not None:
                D *= unscale
            G = D @ M if dim == 0 else M @ D
            for p, g in zip(parameters, G, strict=True):
                p.grad.add_(like(g, p))  # type: ignore[union-attr]


def _excess(gram: Tensor) -> Tensor:
    """What a Gram matrix (*, R, R) has beyond that of orthonormal directions; a zero direction is to stay zero."""
    return gram - torch.diag_embed((gram.diagonal(dim1=-2, dim2=-1) != 0).to(gram.dtype))
