"""Sums of structures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StructureError
from .base import Structure

__all__ = ["Sum"]


class Sum(Structure):
    """dW = dW_1 + dW_2 + ..., each part a structure of its own.

    One adapter with one scale and one dropout mask of the input for all parts. R is the sum of the parts' ranks, so
    that a scale alpha / R is the same for all. Parameters are `parts.<number>.<name>`.

    Args:
        parts: one table per part: {"structure": class or its name, <its options>}. Names find classes that have been
            defined; nothing is imported.

    Raises:
        StructureError: no parts, a part that is no such table, an unknown structure, or what a part refuses.

    Example:
        >>> from slimtune import BlockLowRank, LowRank
        >>> parts = [{"structure": "BlockLowRank", "rank": 4}, {"structure": LowRank, "rank": 2}]
        >>> structure = Sum(6, 4, parts=parts)
        >>> structure.rank, [n for n, _ in structure.named_parameters()]
        (6, ['parts.0.A', 'parts.0.B', 'parts.1.A', 'parts.1.B'])
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        parts: Sequence[Mapping[str, Any]],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features)
        if isinstance(parts, (str, Mapping)) or not isinstance(parts, Sequence) or not parts:
            raise StructureError(f"Sum: parts must be a list of at least one table, got {parts!r}")
        self.parts = nn.ModuleList()
        for number, part in enumerate(parts):
            cls, options = _read(part, f"Sum, part {number}")
            self.parts.append(cls(out_features, in_features, **options, device=device, dtype=dtype))

    @property
    def fast_parameters(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"parts.{n}.{name}" for n, part in enumerate(self._all()) for name in part.fast_parameters)

    def _all(self) -> list[Structure]:
        return list(self.parts)  # type: ignore[arg-type]

    @property
    def rank(self) -> int | None:
        ranks = [part.rank for part in self._all()]
        return None if None in ranks else sum(ranks)  # type: ignore[arg-type]

    @property
    def work(self) -> float:
        return sum(part.work for part in self._all())

    def dense(self) -> Tensor:
        first, *rest = self._all()
        return sum((part.dense() for part in rest), first.dense())

    def matrix(self) -> Tensor:
        first, *rest = self._all()
        return sum((part.matrix() for part in rest), first.matrix())

    def matmul(self, V: Tensor) -> Tensor:
        first, *rest = self._all()
        return sum((part.matmul(V) for part in rest), first.matmul(V))

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self._all()
        return sum((part(x) for part in rest), first(x))

    def columns(self, index: Tensor) -> Tensor:
        first, *rest = self._all()
        return sum((part.columns(index) for part in rest), first.columns(index))

    def linear(self, x: Tensor, W: Tensor, bias: Tensor | None, scale: Tensor, dropout: float = 0.0) -> Tensor:
        first, *rest = self._all()
        if dropout or not rest or self._weight_pays(x.numel() // self.in_features):
            return super().linear(x, W, bias, scale, dropout)
        y = first.linear(x, W, bias, scale)
        change = sum((part(x) for part in rest[1:]), rest[0](x))
        return y + scale.to(y.dtype) * change

    def exact_factors(self) -> tuple[Tensor, Tensor] | None:
        pairs = [part.exact_factors() for part in self._all()]
        if any(pair is None for pair in pairs):
            return None
        tall, wide = zip(*pairs, strict=True)  # type: ignore[arg-type]
        return torch.cat(tall, 1), torch.cat(wide, 0)

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...] | None:
        each = [part.gradients(x, g) for part in self._all()]
        if any(found is None for found in each):
            return None
        return tuple(v for found in each for v in found)  # type: ignore[union-attr]

    def reset_parameters(self) -> None:
        for part in self._all():
            part.reset_parameters()

    def prepare(self, weight: Any) -> None:
        for part in self._all():
            part.prepare(weight)

    def options(self) -> dict[str, Any]:
        return {"parts": [{"structure": type(part).__name__} | part.options() for part in self._all()]}


def _read(part: object, where: str) -> tuple[Callable[..., Structure], dict[str, Any]]:
    if not isinstance(part, Mapping) or "structure" not in part:
        raise StructureError(f"{where}: expected a table with the key 'structure', got {part!r}")
    options = {key: value for key, value in part.items() if key != "structure"}
    named = {cls.__name__: cls for cls in _classes(Structure) if not inspect.isabstract(cls)}
    cls = part["structure"]
    cls = cls if isinstance(cls, type) and cls in named.values() else named.get(cls) if isinstance(cls, str) else None
    if cls is None:
        raise StructureError(f"{where}: unknown structure {part['structure']!r}; known: {', '.join(sorted(named))}")
    known = [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for key in options:
        if key not in known or key in ("device", "dtype"):
            raise StructureError(f"{where}: {cls.__name__} has no option {key!r}")
    return cls, options


def _classes(cls: type) -> list[type]:
    children: list[type] = cls.__subclasses__()
    return [found for child in children for found in (child, *_classes(child))]
