"""95 % intervals for measured scores, and whether one score beats another. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Z95 = 1.959963984540054  # the 97.5 % point of the normal distribution
CORRELATIONS = {"pearson": 1.0, "spearman": 1.03, "spearmanr": 1.03}  # metric -> factor of the standard error


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Score interval of a proportion p = k / n, both ends in [0, 1]. Wilson 1927.

        (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)

    >>> [round(end, 4) for end in wilson(215, 250)]
    [0.8115, 0.8976]
    """
    p, n = successes / trials, trials
    middle = p + Z95**2 / (2 * n)
    half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    return max(0.0, (middle - half) / (1 + Z95**2 / n)), min(1.0, (middle + half) / (1 + Z95**2 / n))


def fisher(r: float, n: int, factor: float = 1.0) -> tuple[float, float]:
    """Interval of a correlation: tanh(atanh r -+ z factor / sqrt(n - 3)); factor 1.03 for Spearman (Fieller 1957)."""
    centre, half = math.atanh(min(max(r, -1 + 1e-12), 1 - 1e-12)), Z95 * factor / math.sqrt(max(n - 3, 1))
    return math.tanh(centre - half), math.tanh(centre + half)


def interval(metric: str, value: float, n: int | None) -> tuple[float, float] | None:
    """The 95 % interval of a metric measured on n examples; None for a metric whose counts do not give one."""
    if not n or not math.isfinite(value):
        return None
    if metric == "accuracy" and 0 <= value <= 1:
        return wilson(value * n, n)
    if metric in CORRELATIONS and -1 <= value <= 1 and n > 3:
        return fisher(value, n, CORRELATIONS[metric])
    return None


@dataclass(frozen=True)
class Difference:
    """After minus before with its 95 % interval; `tie` when the interval holds 0."""

    value: float
    low: float
    high: float

    @property
    def tie(self) -> bool:
        return self.low <= 0 <= self.high


def difference(metric: str, before: float, after: float, n: int | None) -> Difference | None:
    """after - before, both on n examples, from the two intervals by Newcombe's hybrid (1998, method 10).

    It treats the two as independent, so on the same examples it is cautious. None where there is no interval.
    """
    first, second = interval(metric, before, n), interval(metric, after, n)
    if first is None or second is None:
        return None
    low = after - before - math.hypot(after - second[0], first[1] - before)
    high = after - before + math.hypot(second[1] - after, before - first[0])
    return Difference(after - before, low, high)


def paired(gained: int, lost: int, n: int) -> Difference:
    """Change of accuracy on the same n examples: `gained` became right, `lost` became wrong.

    The exact interval (Clopper and Pearson 1934) of the share gained / (gained + lost), scaled to the change
    (2 share - 1)(gained + lost) / n: it excludes 0 exactly when McNemar's exact two-sided test has p < 0.05.

    >>> paired(40, 12, 500).tie, paired(14, 12, 500).tie
    (False, True)
    """
    changed = gained + lost
    if not changed:
        return Difference(0.0, 0.0, 0.0)
    low = 0.0 if not gained else _solve(lambda p: _tail(gained, changed, p) - 0.025)
    high = 1.0 if not lost else _solve(lambda p: 0.025 - _tail(lost, changed, 1 - p))
    scale = changed / n
    return Difference((gained - lost) / n, (2 * low - 1) * scale, (2 * high - 1) * scale)


def _tail(k: int, n: int, p: float) -> float:
    """P(X >= k) for X binomial(n, p)."""
    if p <= 0 or p >= 1:
        return float(p >= 1)
    logs = (
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(k, n + 1)
    )
    return math.fsum(map(math.exp, logs))


def _solve(rising: Callable[[float], float]) -> float:
    """The root in [0, 1] of an increasing function."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
