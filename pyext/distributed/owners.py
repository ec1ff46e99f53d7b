"""Which rank works on what: by cost, the same on every rank without asking anybody."""

from __future__ import annotations

from collections.abc import Sequence


def assign(costs: Sequence[float], ranks: int, load: Sequence[float] | None = None) -> list[int]:
    """The owner of each item: costly items first, each to the rank with the least work so far, ties to the lowest.

    load: work that the ranks have already.  The busiest rank has at most 4/3 of the least possible (Graham 1969), and
    at most the mean plus one item.
    """
    load = [0.0] * ranks if load is None else list(load)
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = load.index(min(load))
        load[owners[i]] += costs[i]
    return owners


def loads(costs: Sequence[float], owners: Sequence[int], ranks: int) -> list[float]:
    out = [0.0] * ranks
    for cost, owner in zip(costs, owners):
        out[owner] += cost
    return out


def imbalance(costs: Sequence[float], owners: Sequence[int], ranks: int) -> float:
    """How much longer than the mean the busiest rank works: 0.1 for 10 % more."""
    work = loads(costs, owners, ranks)
    return max(work) * ranks / sum(work) - 1 if sum(work) else 0.0
