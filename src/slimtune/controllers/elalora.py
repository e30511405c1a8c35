"""Ranks that move between layers while they train.

Shapes: O out, I in, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Exchange", "exchange", "exchange_by_value", "moving", "outside"]


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
    """The published rule: of every layer's k worst ranks, the b worst of all go, and the b best of all tell which layers
    get one more.

    ElaLoRA, Chang et al. 2025, arXiv 2504.00254, as its code has it, with its faults mended: candidates are told apart
    by (score, layer, rank), so that ties neither remove too many nor depend on chance; as many ranks come as go; no rank
    is on both sides; a layer never goes below `floor` or above its ceiling.

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
    gone, grown = [], []
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


def exchange_by_value(
    scores: Sequence[Sequence[float]],
    k: int,
    b: int,
    costs: Sequence[int],
    slack: int = 0,
    fresh: Sequence[Sequence[bool]] | None = None,
    ceilings: Sequence[int] | None = None,
    floor: int = 1,
) -> Exchange:
    """The improved rule: ranks go where a parameter is worth more, and only if it is.

    Ours. The value of a rank is sqrt(score) / cost, a score being about the square of what the loss would lose. A layer's
    worst rank says what one more would be worth there, also where the layer has none to give, so that a layer of
    rank 1 can grow. For each of at most b additions, the most valuable first, the least valuable ranks of all are given
    up until its cost is free, as long as each is worth less than what comes. Ranks that are `fresh` are neither given
    up nor asked. With equal costs as many come as go; otherwise what is left over is the next round's `slack`.

    Args:
        scores: of every live rank, per layer.
        k: how many ranks a layer gives or gets, at most.
        b: how many ranks come, at most.
        costs: of one rank in each layer: its parameters, or 1.
        slack: what may be spent beyond what is given up.
        fresh: which ranks are too young to be judged.
        ceilings: the largest rank of each layer; none when None.
        floor: ranks that a layer keeps.

    Example:
        >>> exchange_by_value([(4.0, 9.0), (1.0, 1.0), (9.0,)], k=1, b=1, costs=[1, 1, 1])
        ([(1, 0)], [2])
    """
    givers, askers = [], []
    for i, row in enumerate(scores):
        old = [j for j in range(len(row)) if fresh is None or not fresh[i][j]]
        ranked = sorted((math.sqrt(row[j]) / costs[i], i, j) for j in old)[:k]
        givers += ranked[: max(len(row) - floor, 0)]
        if ranked:
            room = k if ceilings is None else min(k, ceilings[i] - len(row))
            askers += [(ranked[0][0], i)] * room
    givers.sort()
    askers.sort(key=lambda a: (-a[0], a[1]))
    gone: list[tuple[int, int]] = []
    grown: list[int] = []
    for value, receiver in askers:
        if len(grown) == b:
            break
        if any(i == receiver for i, _ in gone):
            continue  # a layer that gives does not get
        taken, free = [], slack
        for less, i, j in givers:
            if free >= costs[receiver] or less >= value:
                break
            if (i, j) not in gone and i not in (receiver, *grown):
                taken.append((i, j))
                free += costs[i]
        if free >= costs[receiver]:
            gone += taken
            grown.append(receiver)
            slack = free - costs[receiver]
    return sorted(gone), sorted(grown)


def outside(M: Tensor, v: Tensor, exact: bool = True) -> Tensor:
    """v without what the columns of M span, of length 1.

    Args:
        M: (I, R); fewer columns than rows.
        v: (I,).
        exact: by an orthonormal basis of M, twice, which leaves 1e-8; else v - M M^T v once, which is that only if the
            columns are orthonormal, as in the published code: with rows of N(0, 0.02^2) up to 9 % of a row stay in.
    """
    if exact:
        Q = torch.linalg.qr(M)[0]
        for _ in range(2):
            v = v - Q @ (Q.t() @ v)
    else:
        v = v - M @ (M.t() @ v)
    return v / (v.norm() + 1e-6)
