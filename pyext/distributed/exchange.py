"""Shards to the rank that works on the whole block, and results back to all that hold a part: one all-to-all each.

Both directions are planned from layouts alone, so that every rank knows the sizes of all messages beforehand.  Blocks
whose owner has them whole are not sent.  `traffic` is what the plan says; `sent` what really left this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from steepest.distributed.collectives import collective
from steepest.distributed.layout import Layout, Region, overlap, size, slices


@dataclass(frozen=True)
class Task:
    """A block of a tensor, and the rank of the team (its number there) that works on it."""

    tensor: int  # its place in the lists that an Exchange is given
    layout: Layout
    where: Region
    owner: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.where)

    def parts(self) -> list[tuple[int, Region]]:
        """What the owner needs: (rank, region) of the copy that it has a part of."""
        found = ((r, overlap(self.layout.regions[r], self.where)) for r in self.layout.source(self.owner))
        return [(r, region) for r, region in found if region is not None]

    def holders(self) -> list[tuple[int, Region]]:
        """Who needs the result: (rank, region) of every rank that holds a part of the block."""
        found = ((r, overlap(region, self.where)) for r, region in enumerate(self.layout.regions))
        return [(r, region) for r, region in found if region is not None]


@dataclass(frozen=True)
class Message:
    """A region that goes from one rank to another."""

    task: int
    region: Region
    source: int
    target: int


class Direction:
    """All messages of one all-to-all as one rank sees them."""

    def __init__(self, messages: Sequence[Message], ranks: int, me: int):
        key = lambda m: (m.source, m.target, m.task)  # noqa: E731
        self.own = [m for m in messages if m.source == m.target == me]
        self.out = sorted((m for m in messages if m.source == me != m.target), key=key)
        self.in_ = sorted((m for m in messages if m.target == me != m.source), key=key)
        self.out_splits = [sum(size(m.region) for m in self.out if m.target == r) for r in range(ranks)]
        self.in_splits = [sum(size(m.region) for m in self.in_ if m.source == r) for r in range(ranks)]


@dataclass(frozen=True)
class Load:
    """What one all-to-all is to each rank of a team, (ranks,): elements sent and received, messages either way.

    From layouts and owners alone, without a list of messages: the plan of thousands of ranks takes no longer.
    """

    sent: np.ndarray
    received: np.ndarray
    messages: np.ndarray  # the larger of those sent and received; several tasks' to one partner count as one at most

    @property
    def total(self) -> int:
        return int(self.sent.sum())


def loads(tasks: Sequence[Task], ranks: int) -> tuple[Load, Load]:
    """Of both directions: shards to the owners of these tasks, and results to all that hold a part."""
    # Elements and messages, each by holders (first) and by owners (second): who sends them depends on the direction.
    there, back = np.zeros((2, 2, 2, ranks), dtype=np.int64)
    for task in tasks:
        shares = task.layout.shares(task.where).copy()
        shares[task.owner] = 0  # not sent
        for found, parts in ((there, shares * task.layout.fellows(task.owner)), (back, shares)):
            for row, amount in zip(found, (parts, parts > 0)):
                row[0] += amount
                row[1][task.owner] += amount.sum()
    most = [np.minimum(messages.max(0), ranks - 1) for _, messages in (there, back)]
    return Load(*there[0], most[0]), Load(*back[0][::-1], most[1])


class Pending:
    """An all-to-all under way."""

    def __init__(self, received: Tensor, work, op: str, group):
        self._received, self._work, self._op, self._group = received, work, op, group

    def wait(self) -> Tensor:
        if self._work is not None:
            with collective(self._op, "an all-to-all of shards", self._group):
                self._work.wait()
        return self._received


class Exchange:
    """Both directions for tasks of one team and dtype."""

    def __init__(self, op: str, tasks: Sequence[Task], dtype: torch.dtype, device: torch.device):
        self.op, self.tasks, self.dtype, self.device = op, list(tasks), dtype, device
        self.team = tasks[0].layout.team
        self.me = self.team.me
        self.mine = [i for i, task in enumerate(self.tasks) if task.owner == self.me]
        inward = [Message(i, region, r, t.owner) for i, t in enumerate(self.tasks) for r, region in t.parts()]
        outward = [Message(i, region, t.owner, r) for i, t in enumerate(self.tasks) for r, region in t.holders()]
        self.inward = Direction(inward, len(self.team), self.me)
        self.outward = Direction(outward, len(self.team), self.me)
        self.loads = loads(self.tasks, len(self.team))
        self.sent = 0  # bytes that have left this rank so far

    @property
    def traffic(self) -> int:
        """Bytes that leave all ranks together in one step, both ways."""
        return sum(load.total for load in self.loads) * self.dtype.itemsize

    def _start(self, direction: Direction, load: Load, pieces: Sequence[Tensor]) -> Pending:
        """pieces: one per message of direction.out."""
        received = torch.empty(sum(direction.in_splits), dtype=self.dtype, device=self.device)
        if load.total == 0:  # nobody sends anything
            return Pending(received, None, self.op, self.team.group)
        flat = [piece.reshape(-1) for piece in pieces]
        sent = torch.cat(flat) if flat else torch.empty(0, dtype=self.dtype, device=self.device)
        self.sent += sent.numel() * sent.element_size()
        with collective(self.op, "an all-to-all of shards", self.team.group):
            work = dist.all_to_all_single(
                received, sent, direction.in_splits, direction.out_splits, group=self.team.group, async_op=True
            )
        return Pending(received, work, self.op, self.team.group)

    def collect(self, shards: Sequence[Tensor]) -> tuple[Pending, Sequence[Tensor]]:
        """Sends this rank's shards (one per tensor, of the layout's shape here) to the owners; see `collected`."""
        pieces = [self._part(shards, message) for message in self.inward.out]
        return self._start(self.inward, self.loads[0], pieces), shards

    def _part(self, shards: Sequence[Tensor], message: Message) -> Tensor:
        task = self.tasks[message.task]
        return shards[task.tensor][slices(message.region, task.layout.regions[self.me])]

    def collected(self, under_way: tuple[Pending, Sequence[Tensor]]) -> dict[int, Tensor]:
        """The blocks that this rank owns, whole, by the number of their task."""
        pending, shards = under_way
        received = pending.wait()
        blocks: dict[int, Tensor] = {}
        for message in self.inward.own:
            task, part = self.tasks[message.task], self._part(shards, message)
            if message.region == task.where:
                blocks[message.task] = part
            else:
                block = blocks[message.task] = torch.empty(task.shape, dtype=self.dtype, device=self.device)
                block[slices(message.region, task.where)] = part
        for message, piece in zip(self.inward.in_, received.split([size(m.region) for m in self.inward.in_])):
            task = self.tasks[message.task]
            if message.task not in blocks:
                blocks[message.task] = torch.empty(task.shape, dtype=self.dtype, device=self.device)
            block = blocks[message.task]
            part = slices(message.region, task.where)
            block[part] = piece.view(block[part].shape)
        return blocks

    def publish(self, results: dict[int, Tensor]) -> tuple[Pending, dict[int, Tensor]]:
        """Sends the results for this rank's blocks to all that hold a part; see `published`."""
        pieces = [results[m.task][slices(m.region, self.tasks[m.task].where)] for m in self.outward.out]
        return self._start(self.outward, self.loads[1], pieces), results

    def published(self, under_way: tuple[Pending, dict[int, Tensor]]) -> list[tuple[int, tuple[slice, ...], Tensor]]:
        """(task, index into this rank's shard of its tensor, result there) for all parts that this rank holds."""
        pending, results = under_way
        received = pending.wait()
        out = []
        for m in self.outward.own:
            task = self.tasks[m.task]
            piece = results[m.task][slices(m.region, task.where)]
            out.append((m.task, slices(m.region, task.layout.regions[self.me]), piece))
        for m, piece in zip(self.outward.in_, received.split([size(m.region) for m in self.outward.in_])):
            shape = [stop - start for start, stop in m.region]
            index = slices(m.region, self.tasks[m.task].layout.regions[self.me])
            out.append((m.task, index, piece.view(shape)))
        return out


def buffer_elements(tasks: Sequence[Task], ranks: int) -> np.ndarray:
    """Most elements that each rank holds while these tasks are exchanged: blocks, results, messages both ways."""
    held = np.zeros(ranks, dtype=np.int64)
    for task in tasks:
        held[task.owner] += 4 * size(task.where)
        held += 2 * task.layout.shares(task.where)
    return held
