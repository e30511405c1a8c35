"""What a round of ElaLoRA moves: the published rule and an improved one, as pure functions of scores and gains."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["Exchange", "exchange", "exchange_by_gain", "moving"]

Exchange = tuple[list[tuple[int, int]], list[int]]
"""The ranks to take away, as (layer, rank), and the layers that get one, each as often as it gets one."""


def moving(t: int, b: int, warmup: int, final: int, total: int, schedule: bool = True) -> int:
    """b(t) = round(b (1 - clip((t - t_w) / (T - t_f - t_w), 0, 1)^3)): how many ranks a round at step t moves.

    ElaLoRA, Chang et al. 2025, arXiv 2504.00254, the rank scheduler of its code. Without `schedule` it is b.

    Example:
        >>> [moving(t, 4, 300, 500, 2000) for t in (300, 500, 900, 1100, 1300, 1400, 1450, 1490)]
        [4, 4, 4, 3, 2, 1, 0, 0]
    """
    if not schedule:
        return b
    share = (t - warmup) / max(total - final - warmup, 1)
    return round(b * (1 - min(max(share, 0.0), 1.0) ** 3))


def exchange(
    scores: Sequence[Sequence[float]],
    k: int,
    b: int,
    ceilings: Sequence[int] | None = None,
    floor: int = 1,
) -> Exchange:
    """The published rule: of every layer's k worst ranks the b worst go, and the b best say which layers get one more.

    ElaLoRA, Chang et al. 2025, arXiv 2504.00254, as its code has it, with its faults mended: candidates are told apart
    by (score, layer, rank), so that ties neither remove too many nor depend on chance; as many ranks come as go; no
    rank is on both sides; a layer never goes below `floor` or above its ceiling.

    Args:
        scores: of every live rank, per layer.
        k: how many ranks a layer puts up, at most.
        b: how many ranks move, at most.
        ceilings: the largest rank of each layer; none when None.
        floor: ranks that a layer keeps.

    Example:
        >>> exchange([(0.1, 0.2, 0.9), (0.3, 0.4, 0.5), (2.0, 3.0, 4.0)], k=2, b=2)
        ([(0, 0), (0, 1)], [2, 2])
    """
    worst = []
    for i, row in enumerate(scores):
        ranked = sorted((s, i, j) for j, s in enumerate(row))
        worst += ranked[: max(min(k, len(row) - floor), 0)]
    worst.sort()
    room = [math.inf if ceilings is None else ceilings[i] - len(row) for i, row in enumerate(scores)]
    gone: list[tuple[int, int]] = []
    grown: list[int] = []
    low, high = 0, len(worst) - 1
    while len(grown) < b and low < high:
        _, i, j = worst[low]
        receiver = worst[high][1]
        if room[receiver] + (i == receiver) < 1:
            high -= 1  # a full layer passes its turn on
            continue
        gone.append((i, j))
        grown.append(receiver)
        room[i] += 1
        room[receiver] -= 1
        low, high = low + 1, high - 1
    return gone, grown[::-1]


def exchange_by_gain(
    scores: Sequence[Sequence[float]],
    gains: Sequence[Sequence[float]],
    k: int,
    b: int,
    costs: Sequence[int],
    slack: int = 0,
    ceilings: Sequence[int] | None = None,
    floor: int = 1,
) -> Exchange:
    """The improved rule: ranks go where a parameter more would gain most, from where it is missed least.

    Ours. What a layer would gain by one more rank comes from its gradient (`gains`), not from how good its present
    ranks are. For each of at most b additions, the largest gain / cost first, the ranks with the smallest
    sqrt(score) / cost are given up until its cost is free, a score being about the square of what the loss would lose.
    A layer gives only to one that gains more by a rank than itself would, and no layer both gives and gets. With equal
    costs as many come as go; otherwise what is left over is the next round's `slack`.

    Args:
        scores: of every live rank, per layer.
        gains: of one more rank, of a second one, ..., per layer; 0 or none where nothing can be gained.
        k: how many ranks a layer gives or gets, at most.
        b: how many ranks come, at most.
        costs: of one rank in each layer: its parameters, or 1.
        slack: what may be spent beyond what is given up.
        ceilings: the largest rank of each layer; none when None.
        floor: ranks that a layer keeps.

    Example:
        >>> exchange_by_gain([(4.0, 9.0), (1.0, 1.0), (9.0,)], [[0.1], [0.2], [5.0]], k=1, b=1, costs=[1, 1, 1])
        ([(1, 0)], [2])
    """
    givers, askers = [], []
    for i, row in enumerate(scores):
        ranked = sorted((math.sqrt(s) / costs[i], i, j) for j, s in enumerate(row))
        givers += ranked[: max(min(k, len(row) - floor), 0)]
        room = k if ceilings is None else min(k, ceilings[i] - len(row))
        askers += [(gain / costs[i], i) for gain in gains[i][: max(room, 0)] if gain > 0]
    givers.sort()
    askers.sort(key=lambda a: (-a[0], a[1]))
    own = [max(row, default=0.0) / cost for row, cost in zip(gains, costs, strict=True)]
    gone: list[tuple[int, int]] = []
    grown: list[int] = []
    for gain, receiver in askers:
        if len(grown) == b:
            break
        if any(i == receiver for i, _ in gone):
            continue
        taken, free = [], slack
        for _, i, j in givers:
            if free >= costs[receiver]:
                break
            if (i, j) not in gone and i not in grown and own[i] < gain:
                taken.append((i, j))
                free += costs[i]
        if free >= costs[receiver]:
            gone += taken
            grown.append(receiver)
            slack = free - costs[receiver]
    return sorted(gone), sorted(grown)
