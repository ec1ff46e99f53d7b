"""Shampoo over ranks: each block belongs to one rank, which keeps its statistics, roots and momenta and does its work.

Shards of gradients go to the owners of the blocks that they overlap, and steps come back, one all-to-all each.  Blocks
and the steps in which their roots are refreshed are those of a single process, so that results are too; owners are
chosen slot by slot, so that refreshing is balanced over the ranks in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from steepest.distributed.agreement import Roster
from steepest.distributed.exchange import Exchange, Task
from steepest.distributed.layout import Layout, merged
from steepest.distributed.shards import gradient_shard, local
from steepest.optim.shampoo_blocks import Block, Bucket, make_buckets
from steepest.optim.shampoo_step import ShampooStep


class OwnedBucket(Bucket):
    """Blocks of one shape that this rank owns: gradients arrive by message, and steps leave by message."""

    arrived: dict[int, Tensor]  # id of a block -> its gradient, whole, in this step
    leaving: dict[int, Tensor]  # id of a block -> lr-free step, in the parameter's dtype
    in_place = False

    def gather(self) -> Tensor:
        dtype = torch.promote_types(self.blocks[0].param.dtype, torch.float32)
        device = self.blocks[0].param.device
        zero = torch.zeros(self.shape, dtype=self.blocks[0].param.dtype, device=device)
        return torch.stack([self.arrived.get(id(block), zero) for block in self.blocks]).to(dtype)

    def scatter(self, update: Tensor, lr: float, chosen: list[bool]) -> None:
        for block, change, yes in zip(self.blocks, update.unbind(), chosen):
            if yes:
                self.leaving[id(block)] = change.to(block.param.dtype)


def choose_owners(buckets: list[Bucket], ranks: int, frequency: int) -> dict[int, int]:
    """id of a block -> owner: to the rank with the least refreshing in the block's slot, then the least in all."""
    slots, total = np.zeros((frequency, ranks)), np.zeros(ranks)
    blocks = [(bucket.cost, block) for bucket in buckets for block in bucket.blocks]
    found = {}
    for cost, block in sorted(blocks, key=lambda pair: -pair[0]):
        slot = slots[block.slot]
        idle = np.flatnonzero(slot == slot.min())
        owner = int(idle[total[idle].argmin()])  # of equals the lowest rank
        found[id(block)] = owner
        slot[owner] += cost
        total[owner] += cost
    return found


@dataclass
class Plan:
    """Who does what, from layouts and options alone: blocks, and for each its task, with the owner, and its cost.

    A task's `tensor` is its parameter's place; views: layouts of the parameters in their merged shapes, None for those
    without elements.
    """

    buckets: list[Bucket]
    blocks: list[Block]
    tasks: list[Task]
    costs: list[int]
    views: list[Layout | None]


def make_plan(params: Sequence[Tensor], layouts: Sequence[Layout], group: dict) -> Plan:
    """group: options of a param group, with large_dim_fallback as `side_kinds` takes it."""
    place = {id(p): i for i, p in enumerate(params)}
    buckets = make_buckets([p for p in params if p.numel()], group)
    owner: dict[int, int] = {}
    for team in dict.fromkeys(layout.team for layout in layouts):
        theirs = []
        for bucket in buckets:
            blocks = [block for block in bucket.blocks if layouts[place[id(block.param)]].team == team]
            theirs += [Bucket(blocks, bucket.kinds)] if blocks else []
        owner |= choose_owners(theirs, len(team), group["precondition_frequency"])
    blocks = [block for bucket in buckets for block in bucket.blocks]
    out = Plan(buckets, blocks, [], [b.cost for b in buckets for _ in b.blocks], [None] * len(params))
    for block in blocks:
        i = place[id(block.param)]
        if out.views[i] is None:
            out.views[i] = merged(layouts[i], block.merged)
        where = tuple((s.start, s.stop) for s in block.where)
        out.tasks.append(Task(i, out.views[i], where, owner[id(block)]))
    return out


class SpreadShampooStep(ShampooStep):
    """ShampooStep for the parameters of a group that are spread over ranks."""

    op = "Shampoo.step"

    def __init__(self, group: dict, state: dict, fallback: str, process_group: dist.ProcessGroup | None):
        self.process_group = process_group
        self.roster = Roster(self.op, group["params"], process_group)
        self._exchanges: dict[tuple, list[tuple[Exchange, list[int]]]] = {}
        self._given: set[int] = set()
        super().__init__(self.roster.params, group, state, fallback)

    def make_buckets(self, group: dict) -> list[Bucket]:
        """This rank's blocks; plans who owns the others."""
        made = make_plan(self.params, self.roster.layouts, group)
        everything = made.buckets
        self.blocks, self.tasks, self.costs, self.views = made.blocks, made.tasks, made.costs, made.views
        mine = {id(b) for b, task in zip(self.blocks, self.tasks) if task.owner == task.layout.team.me}
        owned = []
        for bucket in everything:
            blocks = [block for block in bucket.blocks if id(block) in mine]
            if blocks:
                owned.append(OwnedBucket(blocks, bucket.kinds))
        self._drop_others(mine)
        return owned

    def _drop_others(self, mine: set[int]) -> None:
        """States of blocks that this rank does not own: a checkpoint may bring all of them."""
        kept = {(id(block.param), str(block.number)) for block in self.blocks if id(block) in mine}
        for p in self.params:
            for key in [key for key in self.state[p] if "." in key]:
                if (id(p), key.rsplit(".", 1)[1]) not in kept:
                    del self.state[p][key]

    def has_grad(self, p: Tensor) -> bool:
        return id(p) in self._given

    def run_agreed(self, group: dict, given: list[bool]) -> None:
        self._given = {id(p) for p, yes in zip(self.roster.params, given) if yes and p.numel()}
        targets = [local(p.detach()) for p in self.params]
        exchanges = self._exchanges_for(tuple(given))
        gradients = [
            self._seen(gradient_shard(self.op, p), view) if id(p) in self._given else None
            for p, view in zip(self.params, self.views)
        ]
        arrived = {}
        for exchange, places in exchanges:
            blocks = exchange.collected(exchange.collect(gradients))
            arrived |= {id(self.blocks[places[i]]): block for i, block in blocks.items()}
        leaving: dict[int, Tensor] = {}
        for bucket in self.buckets:
            bucket.arrived, bucket.leaving = arrived, leaving
        self.run(group)
        for exchange, places in exchanges:
            results = {i: leaving[id(self.blocks[places[i]])] for i in exchange.mine}
            self._apply(exchange, exchange.publish(results), targets, float(group["lr"]))
        torch.autograd.graph.increment_version([p for p in self.params if id(p) in self._given])

    def decay(self, given: list[Tensor], factor: float) -> None:
        filled = [shard for shard in map(local, (p.detach() for p in given)) if shard.numel()]
        if filled:
            torch._foreach_mul_(filled, factor)

    def _seen(self, shard: Tensor, view: Layout | None) -> Tensor:
        """A shard in the merged shape of its parameter."""
        region = view.regions[view.team.me]
        return shard.reshape([stop - start for start, stop in region])

    def _apply(self, exchange: Exchange, under_way, targets: list[Tensor], lr: float) -> None:
        parts, changes, copies = [], [], []
        for i, index, change in exchange.published(under_way):
            place = exchange.tasks[i].tensor
            seen = self._seen(targets[place], self.views[place])
            if targets[place].is_contiguous():
                parts.append(seen[index])
                changes.append(change)
            else:
                copies.append((targets[place], seen, index, change))
        if parts:
            torch._foreach_sub_(parts, changes, alpha=lr)
        for target, seen, index, change in copies:
            seen[index].sub_(change, alpha=lr)
            target.copy_(seen.reshape(target.shape))

    def _exchanges_for(self, given: tuple[bool, ...]) -> list[tuple[Exchange, list[int]]]:
        """One exchange per team and dtype, with the place in `blocks` of each of its tasks."""
        if given not in self._exchanges:
            alike: dict[tuple, list[int]] = {}
            for i, (block, task) in enumerate(zip(self.blocks, self.tasks)):
                if id(block.param) in self._given:
                    alike.setdefault((task.layout.team, block.param.dtype, block.param.device), []).append(i)
            self._exchanges[given] = [
                (Exchange(self.op, [self.tasks[i] for i in places], dtype, device), places)
                for (_, dtype, device), places in alike.items()
            ]
        return self._exchanges[given]

    def exchanges(self) -> list[Exchange]:
        """Of the steps so far, with what they sent."""
        return [exchange for exchanges in self._exchanges.values() for exchange, _ in exchanges]
