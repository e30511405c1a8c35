"""How much a model's own metric suffers when one type of layer is compressed and the rest is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..compress import part_of
from ..errors import ConfigError
from ..factors import Factors, svd
from ..recipe import matches
from ..substitutes import substituted
from ..taps import Progress, counter
from ..targets import own_modules
from .compression import Price, prices, uniform

__all__ = ["Sensitivity", "sensitivity", "type_of"]


def type_of(layer: str) -> str:
    """The glob of layers in the same place of other blocks: numbers in a name count as one.

    Example:
        >>> type_of("model.layers.11.self_attn.q_proj")
        'model.layers.*.self_attn.q_proj'
    """
    return ".".join("*" if part.isdigit() else part for part in layer.split("."))


@dataclass
class Sensitivity:
    """What `sensitivity` measured.

    Attributes:
        base: the metric of the model as it is.
        metric: {type: {share kept: metric}}; a type that no rank makes smaller by that much has no entry.
        layers: {type: its layers}.
    """

    base: float
    metric: dict[str, dict[float, float]]
    layers: dict[str, list[str]]

    def keeps(self, limit: float) -> dict[str, float]:
        """{type: the smallest share kept, of those tried, at which the metric is worse by no more than `limit`}, 1 for
        none of them; as `uniform` takes it.

        Example:
            >>> Sensitivity(4.0, {"*.q": {0.9: 4.0, 0.5: 4.1}, "*.v": {0.9: 5.0, 0.5: 9.0}}, {}).keeps(0.2)
            {'*.q': 0.5, '*.v': 1.0}
        """
        return {
            kind: min((keep for keep, value in found.items() if value - self.base <= limit), default=1.0)
            for kind, found in self.metric.items()
        }


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    metric: Callable[[nn.Module], float],
    factors: Factors | None = None,
    targets: str | Sequence[str] = "all-linear",
    *,
    exclude: str | Sequence[str] = (),
    keeps: Sequence[float] = (0.9, 0.75, 0.5),
    types: Mapping[str, Sequence[str]] | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """The metric with one type of layer at a smaller size and all others as they are, for every type and size.

    The sweep of LORD, Kaushal et al. 2023, arXiv 2309.14021, by parameters kept. Afterwards every parameter is the
    object that it was, and no bit of it has changed. It calls `metric` once for the model and once for each type and
    share.

    Args:
        metric: metric(model), such as a loss or perplexity on held-out data; smaller is better.
        factors: what takes the weights' places; `svd()` when None.
        keeps: shares of a type's parameters, in (0, 1).
        types: {name: globs of its layers}; layers in the same place of every block (`type_of`) when None.
        progress: progress(metrics taken, all of them).

    Raises:
        ConfigError: a share outside (0, 1]. TargetError: as `factorize`.

    Example:
        >>> import slimtune as st
        >>> model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), torch.randn(64, 32)
        >>> y = model(x).detach()
        >>> found = st.allocate.sensitivity(model, lambda m: float((m(x) - y).square().mean()), keeps=[0.5])
        >>> found.base, list(found.metric)
        (0.0, ['*'])
    """
    make = factors or svd()
    known = prices(model, make, targets, exclude=exclude)
    own = own_modules(model)
    kinds: dict[str, list[str]] = {}
    for name in known:
        kinds.setdefault(type_of(name), []).append(name)
    if types is not None:
        kinds = {kind: _fitting(known, globs) for kind, globs in types.items()}
    done = counter(progress, 1 + len(kinds) * len(keeps))
    base = float(metric(model))
    done()
    found: dict[str, dict[float, float]] = {kind: {} for kind in kinds}
    for kind, layers in kinds.items():
        for keep in keeps:
            ranks = uniform({n: known[n] for n in layers}, keep)
            if ranks:
                with substituted(model, {n: make(part_of(own[n], n), r) for n, r in ranks.items()}):
                    found[kind][keep] = float(metric(model))
            done()
    return Sensitivity(base, found, kinds)


def _fitting(known: Mapping[str, Price], globs: Any) -> list[str]:
    layers = [n for n in known if any(matches(n, glob) for glob in ([globs] if isinstance(globs, str) else globs))]
    if not layers:
        raise ConfigError(f"sensitivity: {globs!r} fits none of the {len(known)} layers")
    return layers
