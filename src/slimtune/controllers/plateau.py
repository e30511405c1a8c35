"""When sequences have come to rest: the detector of Cuttlefish, as pure functions of the values seen."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

__all__ = ["settled", "slope", "smoothed"]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """e_0 = v_0, e_t = a v_t + (1 - a) e_{t-1} with a = 2 / (window + 1).

    Example:
        >>> smoothed([4.0, 0.0, 0.0], window=3)
        [4.0, 2.0, 1.0]
    """
    a = 2 / (window + 1)
    out = [float(values[0])]
    for v in values[1:]:
        out.append(a * v + (1 - a) * out[-1])
    return out


def slope(values: Sequence[float], window: int, tail: int, relative: bool = False) -> float:
    """The mean of |de/dt| over the last `tail` values of e = `smoothed(values)`; of |d ln e / dt| if relative.

    Derivatives are central differences, at both ends one-sided.

    Example:
        >>> slope([8.0, 8.0, 4.0, 4.0], window=1, tail=2), slope([8.0, 8.0, 4.0, 4.0], window=1, tail=1)
        (1.0, 0.0)
    """
    e = smoothed(values, window)
    last = len(e) - 1
    d = [(e[min(t + 1, last)] - e[max(t - 1, 0)]) / max(min(t + 1, last) - max(t - 1, 0), 1) for t in range(len(e))]
    d = [abs(x) / abs(y) if relative and y else abs(x) for x, y in zip(d, e, strict=True)][-tail:]
    return sum(d) / len(d)


def settled(
    history: Mapping[str, Sequence[float]],
    known: Collection[str],
    *,
    window: int = 15,
    tail: int = 11,
    tolerance: float = 0.1,
    relax: Sequence[tuple[int, float]] = ((1, 5.0), (2, 2.5)),
    relative: bool = False,
) -> list[str]:
    """Names, beyond those `known`, whose sequence has come to rest: slope <= tolerance * f, after `window` values more
    than the first.

    f is the factor of the first pair (n, f) of `relax` with at most n names not known yet, else 1.

    Cuttlefish, Wang et al. 2023, arXiv 2305.02538: by its code, on stable ranks cut to whole numbers once an epoch,
    w = 15 and tolerance 0.1 (CIFAR), w = 5 and 0.33 with relax ((3, 5), (6, 2.5)) (ResNet-50) or 0.411 with
    ((4, 5), (9, 2.5)) (DeiT).

    Example:
        >>> settled({"a": [9.0] * 16, "b": [float(t) for t in range(16)]}, known=())
        ['a']
    """
    left = [name for name in history if name not in known]
    factor = next((f for n, f in sorted(relax) if len(left) <= n), 1.0)
    return [
        name
        for name in left
        if len(history[name]) > window and slope(history[name], window, tail, relative) <= tolerance * factor
    ]
