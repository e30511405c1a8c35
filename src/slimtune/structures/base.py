"""The noun `Structure`: a parametrised matrix dW.

Shapes: O out, I in, R rank, *T batch dims.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import StructureError
from ..ops import lowrank_linear, patched_linear, replayed_dropout
from ..ops.convolution import Convolution

__all__ = ["Factored", "Pair", "Structure", "check_count", "check_dropout"]


def check_count(value: object, what: str, least: int = 1) -> None:
    """Raise StructureError, naming `what` it is and what came, unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise StructureError(f"{what} must be a whole number of at least {least}, got {value!r}")


def check_dropout(value: float, what: str) -> None:
    """Raise StructureError, naming `what` it is and what came, unless `value` is a probability below 1."""
    if not 0 <= value < 1:
        raise StructureError(f"{what} must be in [0, 1), got {value!r}")


class Structure(nn.Module, ABC):
    """An (O, I) matrix dW with few parameters. Subclasses are final and take `(out_features, in_features,
    *, <options>, device=None, dtype=None)`.

    Parameters are allocated, not filled, by `__init__`; `reset_parameters` makes dW = 0 with gradients that
    are not all zero. What else a structure knows by heart (frozen factors, permutations) is filled by `prepare`;
    a persistent buffer of it is saved with the parameters, any other is made again when the adapter is loaded.
    """

    fast_parameters: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters that start at zero and like a larger step (LoRA+'s B)."""

    plain_parameters: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters that weight decay leaves alone."""

    rank_dims: ClassVar[Mapping[str, int]] = {}
    """{parameter or buffer: the dimension of it that counts ranks}; empty if ranks cannot be added or taken away."""

    rank_dropout: float = 0.0
    """Probability of dropping an entry of the (T, R) product, for factored structures."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features

    @property
    def rank(self) -> int | None:
        """The number R that a scale alpha / R**power divides by; None where rank has no meaning."""
        return None

    @classmethod
    def fit(cls, options: Mapping[str, Any], layer: str, module: nn.Module, model: nn.Module) -> Mapping[str, Any]:
        """The options for one layer of a model, with what they leave to the model (heads, ...) filled in."""
        return options

    def new_ranks(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Values of `count` ranks to add that leave dW as it is: {name in `rank_dims`: tensor}.

        `generator` lives on the CPU, so that a seed gives the same ranks on every device.

        Raises:
            StructureError: ranks cannot be added.
        """
        raise StructureError(f"{type(self).__name__}: ranks cannot be added")

    @property
    def work(self) -> float:
        """What `forward` costs per row of x, in multiply-adds of a GEMM (slower operations count for more)."""
        return self.out_features * self.in_features

    @abstractmethod
    def dense(self) -> Tensor:
        """dW, (O, I): the definition."""

    def matrix(self) -> Tensor:
        """dW, (O, I), as `linear` builds it. Override with a faster way of computing `dense`."""
        return self.dense()

    def forward(self, x: Tensor) -> Tensor:  # (*T, I) -> (*T, O)
        """x dW^T. Override with a faster way of computing the same."""
        return F.linear(x, self.matrix().to(x.dtype))

    def convolve(self, x: Tensor, by: Convolution, bias: Tensor | None = None) -> Tensor | None:
        """dW as the flattened kernel of a convolution of x, plus bias; None where this has no faster way than that."""
        return None

    def matmul(self, V: Tensor) -> Tensor:  # (I, R) -> (O, R)
        """dW V in at least fp32, without any dropout: for maps on top of this one."""
        V = V.to(torch.promote_types(V.dtype, torch.float32))
        return self(V.t()).t()

    def columns(self, index: Tensor) -> Tensor:  # (*T) of 0 .. I-1 -> (*T, O)
        """dW[:, index], the change of an embedding's entries. Override where a column costs less than dW."""
        return F.embedding(index, self.matrix().t())

    def linear(
        self,
        x: Tensor,  # (*T, I)
        W: Tensor,  # (O, I), frozen
        bias: Tensor | None,  # (O,), frozen
        scale: Tensor,  # 0-d
        dropout: float = 0.0,
    ) -> Tensor:
        """x W^T + s drop(x) dW^T + bias, (*T, O).

        By default one product with W + s dW when there are rows enough in x to pay for building dW, and two
        products otherwise. Override with a faster way of computing the same.
        """
        if not dropout and self._weight_pays(x.numel() // self.in_features):
            own = dict(self.named_parameters())
            if own:  # a replica of DataParallel has none
                return patched_linear(
                    x,
                    W,
                    bias,
                    scale,
                    list(own.values()),
                    lambda new: self._with(list(own), new, self.matrix),
                    lambda new, x, g: self._with(list(own), new, lambda: self.gradients(x, g)),
                )
        y = F.linear(x, W, bias)
        change = replayed_dropout(self, x, dropout) if dropout else self(x)
        return y + scale.to(y.dtype) * change

    def exact_factors(self) -> tuple[Tensor, Tensor] | None:
        """(B, A), (O, R) and (R, I) with dW = B A exactly, at the rank that algebra gives; None where only a dense dW
        is known. What a conversion to LoRA writes."""
        return None

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...] | None:  # (T, I), (T, O)
        """Gradients of sum(g * x dW^T) in the parameters, in their order; None to take them from g^T x.

        Override where they cost less than that (O, I) product.
        """
        return None

    def _weight_pays(self, rows: int) -> bool:
        # building dW twice costs about as much as 32 rows of x; thrice `forward` or one product g^T x
        size = self.out_features * self.in_features
        return rows * (3 * self.work - size) > 32 * size

    def _with(self, names: Sequence[str], tensors: Sequence[Tensor], function: Callable[[], Any]) -> Any:
        """function() while the named parameters are these tensors."""
        with _swapped(self, dict(zip(names, tensors, strict=True))):
            return function()

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the starting values from torch's global generator; afterwards dW = 0."""

    def prepare(self, weight: Callable[[torch.dtype | None], Tensor]) -> None:
        """Fill own buffers; `weight(dtype)` gives the (O, I) weight below. Called after `reset_parameters` and after
        parameters have been loaded, on the parameters' device."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The constructor's keyword options that rebuild this structure at its present size."""

    def extra_repr(self) -> str:
        return f"{self.out_features} x {self.in_features}"


@contextmanager
def _swapped(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Within: these tensors are the module's parameters, unless they already are."""
    homes = []
    for name, tensor in tensors.items():
        path, _, key = name.rpartition(".")
        own: dict[str, Any] = module.get_submodule(path)._parameters
        if own[key] is not tensor:
            homes.append((own, key, own[key]))
            own[key] = tensor
    try:
        yield
    finally:
        for own, key, before in homes:
            own[key] = before


class Pair(NamedTuple):
    """The two factors of a dW that is bilinear in them, and the parameters that carry them, each up to a constant."""

    B_parameter: nn.Parameter
    A_parameter: nn.Parameter
    B: Tensor  # (O, R)
    A: Tensor  # (R, I)


class Factored(Structure):
    """A structure whose dW = B A is best applied as two thin products."""

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """(B, A): (O, R) and (R, I), differentiable in the parameters."""

    def pair(self) -> Pair | None:
        """What a change of the parameters does to dW to first order: d(dW) = dB A + B dA. None where it is not so."""
        return None

    def rank_sizes(self) -> Tensor:
        """|dW_j|_F of the share dW_j of every rank in dW, (R,)."""
        B, A = self.factors()
        return B.norm(dim=0) * A.norm(dim=1)

    @property
    def work(self) -> float:
        rank = self.rank
        return super().work if rank is None else rank * (self.out_features + self.in_features)

    def exact_factors(self) -> tuple[Tensor, Tensor] | None:
        return self.factors()

    def dense(self) -> Tensor:
        B, A = self.factors()
        return B @ A

    def forward(self, x: Tensor) -> Tensor:
        B, A = self.factors()
        h = F.linear(x, A.to(x.dtype))
        if self.training and self.rank_dropout:
            h = F.dropout(h, self.rank_dropout)
        return F.linear(h, B.to(x.dtype))

    def matmul(self, V: Tensor) -> Tensor:
        B, A = self.factors()
        return B @ (A @ V.to(A.dtype))

    def columns(self, index: Tensor) -> Tensor:
        B, A = self.factors()
        h = F.embedding(index, A.t())
        if self.training and self.rank_dropout:
            h = F.dropout(h, self.rank_dropout)
        return F.linear(h, B)

    def linear(self, x: Tensor, W: Tensor, bias: Tensor | None, scale: Tensor, dropout: float = 0.0) -> Tensor:
        B, A = self.factors()
        rank_dropout = self.rank_dropout if self.training else 0.0
        return lowrank_linear(x, W, bias, B, A, scale, None, dropout, rank_dropout)
