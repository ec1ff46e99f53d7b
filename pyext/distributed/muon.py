"""Muon over ranks: each matrix goes whole to one owner, or, cut along its long side only, its Gram matrix is added up.

The owner of a matrix computes what a single process would, on the same numbers: the polar factor does not depend on
the number of ranks.  Work goes round by round, so that the shards of the next round and the results of the last travel
while one is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from steepest.distributed import gram, owners
from steepest.distributed.agreement import Roster
from steepest.distributed.exchange import Exchange, Task, buffer_elements
from steepest.distributed.layout import Layout, size
from steepest.distributed.shards import cuts_of, gradient_shard, local, reach_of
from steepest.matrix import muon_rule
from steepest.matrix.polar import plan
from steepest.optim.muon_matrices import Piece, pieces

ROUND_ELEMENTS = 1 << 24  # of matrices that one owner works on in a round, unless one alone is larger
ROUNDS = 4  # at least, where there are as many matrices: what is sent can only hide behind another round's work


@dataclass(frozen=True)
class Entry:
    """A matrix of a Muon group."""

    number: int  # of its group
    p: Tensor
    layout: Layout
    cuts: tuple[int, ...] = ()  # sizes of the mesh dimensions over which it is cut
    device: torch.device | None = None  # where its rank works on it, if not where p is

    @property
    def place(self) -> torch.device:
        return self.device or self.p.device


@dataclass
class Plan:
    """Who does what, for matrices of one team and dtype; from layouts and options alone, so the same on every rank.

    tasks: one per matrix, or stack of matrices in a parameter, that has an owner, `tensor` its place in entries; costs:
    their FLOPs; pieces: what each is in its parameter.  rounds: places in tasks.  grams: places in entries of the
    matrices whose Gram matrix is added up; gram_bytes: what that sends.
    """

    entries: list[Entry]
    tasks: list[Task] = field(default_factory=list)
    costs: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    rounds: list[list[int]] = field(default_factory=list)
    grams: list[int] = field(default_factory=list)
    gram_bytes: int = 0

    def key(self, i: int) -> tuple:
        """Tasks of one key are orthogonalised in one batch: group, rows, columns."""
        return self.entries[self.tasks[i].tensor].number, self.pieces[i].rows, self.pieces[i].columns

    def imbalance(self) -> float:
        """How much longer than the mean the busiest owner works, as a fraction."""
        return owners.imbalance(self.costs, [task.owner for task in self.tasks], len(self.entries[0].layout.team))

    def buffer_elements(self, rank: int) -> int:
        """Most elements that a rank holds beside shards, momentum and updates: those of two neighbouring rounds."""
        return int(self.buffers()[rank])

    def buffers(self) -> np.ndarray:
        """The same of all ranks."""
        ranks = len(self.entries[0].layout.team)
        rounds = [buffer_elements([self.tasks[i] for i in places], ranks) for places in self.rounds]
        nothing = np.zeros(ranks, dtype=np.int64)
        return np.max([a + b for a, b in zip(rounds, [*rounds[1:], nothing])], axis=0) if rounds else nothing


def make_plan(entries: Sequence[Entry], groups: dict[int, dict], added_up: bool | None = None) -> Plan:
    """groups: number of a group -> its param group, of which schedule and steps are read.

    added_up: whether Gram matrices are added up wherever they can be (True), nowhere, or (None) where less is sent.
    """
    out = Plan(list(entries))
    ranks = len(entries[0].layout.team)
    for i, entry in enumerate(entries):
        layout, group = entry.layout, groups[entry.number]
        held = pieces(layout.shape, group["matrices"])
        sent = None if added_up is False else _gram_bytes(entry, group)
        if sent is not None and (added_up or sent <= _owned_bytes(entry)):
            out.grams.append(i)
            out.gram_bytes += sent
            continue
        for piece in held:
            where = ((piece.start, piece.start + piece.length), *((0, n) for n in layout.shape[1:]))
            out.tasks.append(Task(i, layout, where, 0))
            out.pieces.append(piece)
            shape = (piece.batch, piece.rows, piece.columns)
            out.costs.append(plan(shape, torch.float32, entry.place, **muon_rule.polar_options(group)).flops)
    found = owners.assign(out.costs, ranks)
    out.tasks = [Task(t.tensor, t.layout, t.where, owner) for t, owner in zip(out.tasks, found)]
    out.rounds = _rounds(out, ranks)
    return out


def _gram_bytes(entry: Entry, group: dict) -> int | None:
    """None when the parameter is no single matrix that is cut along its long side alone."""
    single = group["matrices"] == "whole" and len(entry.layout.shape) == 2
    if not single or not entry.cuts or gram.long_side(entry.layout) is None:
        return None
    device = entry.place
    options = muon_rule.polar_options(group)
    runs = gram.gram_plan(entry.layout.shape, device, options, muon_rule.working_dtype(device)).grams
    return 4 * gram.sent_elements(entry.layout, entry.cuts, runs)


def _owned_bytes(entry: Entry) -> int:
    """What is sent when the first rank owns the matrix: its other shards there, and all other shards back."""
    layout = entry.layout
    there = sum(size(layout.regions[r]) for r in layout.source(0) if r)
    return (there + sum(size(region) for region in layout.regions[1:])) * entry.p.element_size()


def _rounds(made: Plan, ranks: int) -> list[list[int]]:
    """Each owner's tasks, batches of one key together, cut into as many rounds of equal size as the largest needs."""
    numel = [math.prod(task.shape) for task in made.tasks]
    mine = [[i for i, task in enumerate(made.tasks) if task.owner == r] for r in range(ranks)]
    total = [sum(numel[i] for i in places) for places in mine]
    if not made.tasks:
        return []
    count = max(-(-max(total) // ROUND_ELEMENTS), min(ROUNDS, max(map(len, mine))))
    rounds: list[list[int]] = [[] for _ in range(count)]
    for places, elements in zip(mine, total):
        before = 0
        for i in sorted(places, key=lambda i: (-made.costs[i], made.key(i), i)):
            rounds[min(count - 1, before * count // max(1, elements))].append(i)
            before += numel[i]
    return [sorted(places) for places in rounds if places]


class MuonStep:
    """All Muon matrices of an optimizer that are spread over ranks."""

    def __init__(self, op: str, groups: dict[int, dict], process_group: dist.ProcessGroup | None):
        self.op, self.groups = op, groups
        params = [p for group in groups.values() for p in group["params"]]
        number = {id(p): n for n, group in groups.items() for p in group["params"]}
        self.roster = Roster(op, params, process_group)
        self.entries = [
            Entry(number[id(p)], p, lay, cuts_of(p)) for p, lay in zip(self.roster.params, self.roster.layouts)
        ]
        self._lanes: dict[tuple, list[Lane]] = {}
        self._settings = self._read_settings()

    def _read_settings(self) -> tuple:
        options = ("schedule", "steps", "norm", "matrices", "momentum_dtype")
        return tuple((n, *(g[name] for name in options), tuple(map(id, g["params"]))) for n, g in self.groups.items())

    def fits(self, groups: dict[int, dict]) -> bool:
        same = groups.keys() == self.groups.keys() and all(groups[n] is group for n, group in self.groups.items())
        return same and self._settings == self._read_settings()

    def check(self) -> None:
        """Raises for options that need whole matrices where only shards are."""
        for number in {entry.number for entry in self.entries}:
            if self.groups[number]["normuon"] is not None:
                raise NotImplementedError(
                    f"Muon: param group {number}: normuon={self.groups[number]['normuon']} is not supported for "
                    "parameters that are spread over ranks, expected None"
                )

    def run(self, given: list[bool], buffer: Callable[[dict, Tensor], Tensor]) -> None:
        """buffer: from group and parameter to its momentum."""
        key = tuple(given)
        if key not in self._lanes:
            self._lanes[key] = self._make_lanes([e for e, yes in zip(self.entries, given) if yes and e.p.numel()])
        for lane in self._lanes[key]:
            lane.run(buffer)

    def _make_lanes(self, entries: list[Entry]) -> list[Lane]:
        alike: dict[tuple, list[Entry]] = {}
        for entry in entries:
            kept = self.groups[entry.number]["momentum_dtype"] or entry.p.dtype
            dtype = entry.p.dtype if kept == entry.p.dtype else torch.float32  # see muon_rule.with_momentum
            alike.setdefault((entry.layout.team, entry.p.dtype, dtype, entry.p.device), []).append(entry)
        return [
            Lane(self.op, make_plan(same, self.groups), self.groups, dtype) for (_, _, dtype, _), same in alike.items()
        ]

    def lanes(self) -> list[Lane]:
        """The plans of the steps so far, with what they sent."""
        return [lane for lanes in self._lanes.values() for lane in lanes]


class Lane:
    """Executes one plan; dtype: of the updates, in which shards and factors travel."""

    def __init__(self, op: str, made: Plan, groups: dict[int, dict], dtype: torch.dtype):
        self.op, self.plan, self.groups = op, made, groups
        device = made.entries[0].p.device
        self.exchanges = [Exchange(op, [made.tasks[i] for i in r], dtype, device) for r in made.rounds]
        self.gram_factors = gram.GramFactors(op)

    @property
    def sent(self) -> float:
        """Bytes that have left this rank so far."""
        return sum(exchange.sent for exchange in self.exchanges) + self.gram_factors.sent

    @property
    def traffic(self) -> int:
        """Bytes that leave all ranks together in one step, beside norms and gradient flags."""
        return sum(exchange.traffic for exchange in self.exchanges) + self.plan.gram_bytes

    def run(self, buffer: Callable[[dict, Tensor], Tensor]) -> None:
        entries = self.plan.entries
        params = [local(entry.p.detach()) for entry in entries]
        updates = self._updates(params, buffer)
        self._add_up_grams(params, updates)
        self._rounds(params, updates)
        torch.autograd.graph.increment_version([entry.p for entry in entries])

    def _by(self, key, places) -> dict:
        out: dict = {}
        for i in places:
            out.setdefault(key(self.plan.entries[i]), []).append(i)
        return out

    def _updates(self, params: list[Tensor], buffer: Callable[[dict, Tensor], Tensor]) -> list[Tensor]:
        """Each shard of U: what momentum makes of the gradient, elementwise."""
        entries = self.plan.entries
        grads = [gradient_shard(self.op, entry.p) for entry in entries]
        buffers = [local(buffer(self.groups[entry.number], entry.p)) for entry in entries]
        out = list(params)
        for number, places in self._by(lambda entry: entry.number, range(len(entries))).items():
            filled = [i for i in places if params[i].numel()]
            if filled:
                group = self.groups[number]
                found = muon_rule.with_momentum(group, [grads[i] for i in filled], [buffers[i] for i in filled])
                for i, update in zip(filled, found):
                    out[i] = update
        return out

    def _add_up_grams(self, params: list[Tensor], updates: list[Tensor]) -> None:
        entries = self.plan.entries
        for (number, layout, reach), places in self._by(
            lambda entry: (entry.number, entry.layout, reach_of(entry.p)), self.plan.grams
        ).items():
            group = self.groups[number]
            at_once = max(1, ROUND_ELEMENTS // math.prod(layout.shape))
            for first in range(0, len(places), at_once):
                some = places[first : first + at_once]
                working = muon_rule.working_dtype(entries[some[0]].p.device)
                options = muon_rule.polar_options(group)
                found = self.gram_factors([updates[i] for i in some], layout, reach, options, working)
                muon_rule.apply(group, *layout.shape, [params[i] for i in some], found)

    def _rounds(self, params: list[Tensor], updates: list[Tensor]) -> None:
        """Shards in, factors out; the next round's shards and the last round's factors travel meanwhile."""
        coming = self.exchanges[0].collect(updates) if self.exchanges else None
        going = None
        for k, exchange in enumerate(self.exchanges):
            arrived = coming
            if k + 1 < len(self.exchanges):
                coming = self.exchanges[k + 1].collect(updates)
            blocks = exchange.collected(arrived)
            under_way = exchange.publish(self._factors(k, blocks))
            if going is not None:
                self._apply(k - 1, going, params)
            going = under_way
        if going is not None:
            self._apply(len(self.exchanges) - 1, going, params)

    def _factors(self, k: int, blocks: dict[int, Tensor]) -> dict[int, Tensor]:
        """Of this rank's blocks in round k, by their number there."""
        alike: dict[tuple, list[int]] = {}
        for i in blocks:
            alike.setdefault(self.plan.key(self.plan.rounds[k][i]), []).append(i)
        out = {}
        for (number, rows, columns), places in sorted(alike.items()):
            parts = [blocks[i].reshape(-1, rows, columns) for i in places]
            for i, found in zip(places, muon_rule.factors(self.groups[number], parts)):
                out[i] = found.reshape(blocks[i].shape)
        return out

    def _apply(self, k: int, under_way, params: list[Tensor]) -> None:
        alike: dict[tuple, tuple[list[Tensor], list[Tensor]]] = {}
        for i, index, factor in self.exchanges[k].published(under_way):
            place = self.plan.rounds[k][i]
            targets, changes = alike.setdefault(self.plan.key(place), ([], []))
            targets.append(params[self.plan.tasks[place].tensor][index])
            changes.append(factor)
        for (number, rows, columns), (targets, changes) in alike.items():
            muon_rule.apply(self.groups[number], rows, columns, targets, changes)
