"""Shampoo over ranks: each block belongs to one rank, which keeps its statistics, roots and momenta and does its work.

Shards of gradients go to the owners of the blocks that they overlap, and steps come back, one all-to-all each.  Blocks
and the steps in which their roots are refreshed are those of a single process, so that results are too; owners are
chosen slot by slot, so that refreshing is balanced over the ranks in every step.
"""

from __future__ import annotations

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
    slots = [[0.0] * ranks for _ in range(frequency)]
    total = [0.0] * ranks
    blocks = [(bucket.cost, block) for bucket in buckets for block in bucket.blocks]
    found = {}
    for cost, block in sorted(blocks, key=lambda pair: -pair[0]):
        slot = slots[block.slot]
        owner = min(range(ranks), key=lambda r: (slot[r], total[r], r))
        found[id(block)] = owner
        slot[owner] += cost
        total[owner] += cost
    return found


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
        layouts = {id(p): layout for p, layout in zip(self.roster.params, self.roster.layouts)}
        place = {id(p): i for i, p in enumerate(self.params)}
        everything = make_buckets([p for p in self.params if p.numel()], group)
        self.blocks: list[Block] = [block for bucket in everything for block in bucket.blocks]
        self.tasks: list[Task] = []
        self.costs = [bucket.cost for bucket in everything for _ in bucket.blocks]
        owner = self._owners(everything, layouts, group["precondition_frequency"])
        self.views: list[Layout | None] = [None] * len(self.params)
        for block in self.blocks:
            i = place[id(block.param)]
            if self.views[i] is None:
                self.views[i] = merged(layouts[id(block.param)], block.merged)
            where = tuple((s.start, s.stop) for s in block.where)
            self.tasks.append(Task(i, self.views[i], where, owner[id(block)]))
        mine = {id(b) for b, task in zip(self.blocks, self.tasks) if task.owner == task.layout.team.me}
        owned = []
        for bucket in everything:
            blocks = [block for block in bucket.blocks if id(block) in mine]
            if blocks:
                owned.append(OwnedBucket(blocks, bucket.kinds))
        self._drop_others(mine)
        return owned

    def _owners(self, buckets: list[Bucket], layouts: dict[int, Layout], frequency: int) -> dict[int, int]:
        found: dict[int, int] = {}
        for team in dict.fromkeys(layout.team for layout in self.roster.layouts):
            theirs = []
            for bucket in buckets:
                blocks = [block for block in bucket.blocks if layouts[id(block.param)].team == team]
                theirs += [Bucket(blocks, bucket.kinds)] if blocks else []
            found |= choose_owners(theirs, len(team), frequency)
        return found

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
