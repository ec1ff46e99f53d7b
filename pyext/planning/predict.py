"""Traffic, memory and time of one optimizer step, predicted with the plans that the optimizers themselves make.

Owners, messages, rounds and Gram sums come from steepest.distributed; nothing here decides who does what.  What is
predicted is the step alone: the stack's own messages (gradients, parameters) and the norm of clipping are not in it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from steepest.distributed import gram, muon, owners
from steepest.distributed import shampoo as spread_shampoo
from steepest.distributed.exchange import Load, buffer_elements, loads
from steepest.distributed.layout import Layout, size
from steepest.matrix import muon_rule, root_plan
from steepest.matrix.polar import plan as polar_plan
from steepest.optim import SGD, Adagrad, Adam, AdamW, Lion, Muon, RMSprop, Shampoo
from steepest.optim.shampoo import FALLBACKS
from steepest.optim.shampoo_blocks import FULL, Bucket, order_of
from steepest.optim.shampoo_step import state_names
from steepest.planning.mesh import Mesh

ELEMENTWISE = {"sgd": SGD, "adagrad": Adagrad, "rmsprop": RMSprop, "adam": Adam, "adamw": AdamW, "lion": Lion}
# Where Gram matrices are added up: where that sends less, nowhere, wherever it can be.
MUONS = {"muon": None, "muon-owners": False, "muon-grams": True}
OPTIMIZERS = (*ELEMENTWISE, *MUONS, "shampoo")


@dataclass(frozen=True)
class Machine:
    """Rates of one rank.  The defaults are round numbers for a GPU of 2023 and its network; nothing was measured.

    bandwidth: bytes per second each way, of the slowest link between ranks.  latency: seconds per message.  copy: bytes
    per second, read and written.  matmul: FLOP/s of matrix products.  matrix_bytes: per element of their operands.
    """

    bandwidth: float = 50e9
    latency: float = 10e-6
    copy: float = 2.5e12
    matmul: float = 400e12
    matrix_bytes: int = 2

    def __post_init__(self):
        for name in ("bandwidth", "copy", "matmul", "matrix_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Machine: {name} is {getattr(self, name)!r}, expected a number > 0")
        if not self.latency >= 0:
            raise ValueError(f"Machine: latency is {self.latency!r}, expected a number >= 0")

    def products(self, flops: float, elements: float, itemsize: int | None = None) -> float:
        """Seconds of matrix products: arithmetic, or reading and writing `elements`, whichever takes longer."""
        return max(flops / self.matmul, elements * (itemsize or self.matrix_bytes) / self.copy)

    def all_to_all(self, load: Load, itemsize: int) -> float:
        if not load.total:
            return 0.0
        busiest = int(np.maximum(load.sent, load.received).max())
        return busiest * itemsize / self.bandwidth + int(load.messages.max()) * self.latency

    def all_reduce(self, elements: int, ranks: int, itemsize: int) -> float:
        """A ring's bytes and a tree's latency, the better of what libraries choose from."""
        moved = 2 * (ranks - 1) / ranks * elements * itemsize
        return moved / self.bandwidth + 2 * math.ceil(math.log2(ranks)) * self.latency


@dataclass
class Prediction:
    """traffic: bytes that leave all ranks together in a step, beside norms and gradient flags; sent: by each rank.

    seconds: "elementwise", "products", "messages", each of the rank that it takes longest, and "step": together, where
    messages hide behind products as far as they can.  memory: bytes per rank of "parameters" (as much again are
    gradients), "states" and "buffers".  imbalance: how much longer than the mean the busiest rank multiplies.
    """

    mesh: Mesh
    optimizer: str
    traffic: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TIMES, 0.0))
    sent: np.ndarray = None
    memory: dict[str, np.ndarray] = field(default_factory=dict)
    imbalance: float = 0.0

    def peak(self) -> int:
        """Bytes of the rank that holds most."""
        return int((2 * self.memory["parameters"] + self.memory["states"] + self.memory["buffers"]).max())


TIMES = ("elementwise", "products", "messages", "step")


def predict(
    shapes: dict[str, tuple[int, ...]], mesh: Mesh, optimizer: str = "adamw", machine: Machine = Machine(), *,
    dtype: torch.dtype = torch.float32, device: str = "cuda", **options,
) -> Prediction:  # fmt: skip
    """One step of `optimizer` (one of OPTIMIZERS, with its options) for parameters of these names and shapes.

    dtype: of parameters and gradients.  device: "cuda" or "cpu", for which the optimizers plan differently.  Every
    parameter has a gradient; roots of Shampoo's blocks are refreshed in turn, and the step is the longest of them.

    Raises ValueError for an unknown optimizer and for what it refuses, NotImplementedError for parameters whose cut
    dimension Shampoo merges with an earlier one.  Cost: 1 to 2 s for 8e9 parameters on 10,000 ranks.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"predict: optimizer is {optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
    out = Prediction(mesh, optimizer)
    nothing = np.zeros(mesh.ranks, dtype=np.int64)
    out.sent, out.memory = nothing.copy(), {name: nothing.copy() for name in ("parameters", "states", "buffers")}
    named = [(name, torch.nn.Parameter(torch.empty(s, dtype=dtype, device="meta"))) for name, s in shapes.items()]
    make = ELEMENTWISE.get(optimizer) or (Muon if optimizer in MUONS else Shampoo)
    made = make(named, **options)
    job = _Job(out, machine, torch.device(device), {id(p): name for name, p in named})
    for number, group in enumerate(made.param_groups):
        algorithm = group.get("algorithm", "elementwise")
        if algorithm == "muon":
            job.muon(number, group, MUONS[optimizer])
        elif algorithm == "shampoo":
            job.shampoo(group)
        else:
            job.elementwise(group, made.kind if algorithm == "elementwise" else AdamW.kind)
    out.seconds["step"] += out.seconds["elementwise"]
    return out


class _Job:
    """Adds up what the param groups of one optimizer cost."""

    def __init__(self, out: Prediction, machine: Machine, device: torch.device, names: dict[int, str]):
        self.out, self.machine, self.device, self.names = out, machine, device, names
        self.mesh, self.ranks = out.mesh, out.mesh.ranks

    def layout(self, p) -> Layout:
        return self.mesh.layout(self.names[id(p)], tuple(p.shape))

    def held(self, group: dict) -> np.ndarray:
        """Elements of the group's parameters on each rank."""
        alike = Counter(self.layout(p) for p in group["params"])
        return sum(count * layout.shares(tuple((0, n) for n in layout.shape)) for layout, count in alike.items())

    def keep(self, group: dict, per_element: int, moved: int) -> None:
        """per_element: bytes of states; moved: read and written per element."""
        held, itemsize = self.held(group), group["params"][0].dtype.itemsize
        self.out.memory["parameters"] += held * itemsize
        self.out.memory["states"] += held * per_element
        self.out.seconds["elementwise"] += int(held.max()) * moved / self.machine.copy

    def elementwise(self, group: dict, kind) -> None:
        rule, itemsize = kind.rule(group), group["params"][0].dtype.itemsize
        self.keep(group, len(rule.states) * itemsize, rule.moved([itemsize] * len(rule.names)))
        self.out.memory["states"] += 4 * len(group["params"])  # step counters

    def agree(self, group: dict) -> None:
        """All ranks learn which gradients there are."""
        if self.ranks > 1:
            self.wait(self.machine.all_reduce(1 + len(group["params"]), self.ranks, 4))

    def wait(self, seconds: float) -> None:
        """Messages that nothing hides."""
        self.out.seconds["messages"] += seconds
        self.out.seconds["step"] += seconds

    def work(self, seconds: float) -> None:
        self.out.seconds["products"] += seconds
        self.out.seconds["step"] += seconds

    def send(self, both: tuple[Load, Load], itemsize: int) -> None:
        for load in both:
            self.out.traffic += load.total * itemsize
            self.out.sent += load.sent * itemsize

    def muon(self, number: int, group: dict, added_up: bool | None) -> None:
        params, itemsize = group["params"], group["params"][0].dtype.itemsize
        kept = (group["momentum_dtype"] or params[0].dtype).itemsize
        travels = itemsize if kept == itemsize else 4
        self.keep(group, kept, muon_rule.elements_moved(group) * itemsize)
        self.out.memory["buffers"] += self.held(group) * travels  # the updates
        self.agree(group)
        entries = [
            muon.Entry(number, p, self.layout(p), self.mesh.cuts(self.names[id(p)], tuple(p.shape)), self.device)
            for p in params
        ]
        made = muon.make_plan(entries, {number: group}, added_up)
        self.out.memory["buffers"] += made.buffers() * travels
        self._grams(made, group)
        self._rounds(made, group, travels)

    def _grams(self, made: muon.Plan, group: dict) -> None:
        working, options = muon_rule.working_dtype(self.device), muon_rule.polar_options(group)
        self.out.traffic += made.gram_bytes
        self.out.sent += made.gram_bytes // self.ranks  # every rank of a ring sends the same
        alike = Counter((made.entries[i].layout, made.entries[i].cuts) for i in made.grams)
        for (layout, cuts), count in alike.items():
            todo = gram.gram_plan(layout.shape, self.device, options, working)
            calls = math.ceil(count / max(1, muon.ROUND_ELEMENTS // math.prod(layout.shape))) * todo.grams
            n, part = min(layout.shape), max(map(size, layout.regions)) // min(layout.shape)
            flops = gram.local_flops(layout, options, self.device, working)
            self.work(count * self.machine.products(flops, product_elements(todo, n, part)))
            for k in cuts:
                self.wait(calls * self.machine.all_reduce(count * todo.grams * n * n // calls, k, 4))

    def _rounds(self, made: muon.Plan, group: dict, itemsize: int) -> None:
        """As muon.Lane runs them: the next round's shards and the last round's results travel while one is computed."""
        inward, outward, busy = [], [], []
        total = np.zeros(self.ranks)
        for places in made.rounds:
            both = loads([made.tasks[i] for i in places], self.ranks)
            self.send(both, itemsize)
            inward.append(self.machine.all_to_all(both[0], itemsize))
            outward.append(self.machine.all_to_all(both[1], itemsize))
            work = np.zeros(self.ranks)
            for i in places:
                piece = made.pieces[i]
                shape = piece.batch, piece.rows, piece.columns
                todo = polar_plan(shape, torch.float32, self.device, **muon_rule.polar_options(group))
                elements = piece.batch * product_elements(todo, *sorted(shape[1:]))
                work[made.tasks[i].owner] += self.machine.products(made.costs[i], elements)
            busy.append(float(work.max()))
            total += work
        if not busy:
            return
        self.out.imbalance = owners.imbalance(made.costs, [task.owner for task in made.tasks], self.ranks)
        self.out.seconds["products"] += sum(busy)
        self.out.seconds["messages"] += sum(inward) + sum(outward)
        meanwhile = [a + b for a, b in zip([*inward[1:], 0.0], [0.0, *outward[:-1]])]
        self.out.seconds["step"] += inward[0] + sum(map(max, busy, meanwhile)) + outward[-1]

    def shampoo(self, group: dict) -> None:
        params, itemsize = group["params"], group["params"][0].dtype.itemsize
        self.keep(group, 0, 0)
        self.out.memory["states"] += 4 * len(params)  # step counters
        self.agree(group)
        group = {**group, "large_dim_fallback": FALLBACKS[group["large_dim_fallback"]]}
        made = spread_shampoo.make_plan(params, [self.layout(p) for p in params], group)
        both = loads(made.tasks, self.ranks)
        self.send(both, itemsize)
        for load in both:
            self.wait(self.machine.all_to_all(load, itemsize))
        self.out.memory["buffers"] += buffer_elements(made.tasks, self.ranks) * itemsize
        work = np.zeros((group["precondition_frequency"], self.ranks))  # by refresh slot
        places = iter(made.tasks)
        for bucket in made.buckets:
            always, refresh = block_seconds(bucket, group, self.machine, self.device)
            always += 4 * bucket_moved(group) * math.prod(bucket.shape) / self.machine.copy
            bucket.packed = group["packed_statistics"]
            kept = 4 * sum(math.prod(shape) for shape in bucket.state_shapes(state_names(group)).values())
            for block in bucket.blocks:
                owner = next(places).owner
                self.out.memory["states"][owner] += kept
                work[:, owner] += always
                work[block.slot, owner] += refresh
        longest = work.max(1)
        self.out.imbalance = float((longest / work.mean(1)).max() - 1)
        self.work(float(longest.max()))


def product_elements(todo, n: int, m: int) -> int:
    """Elements that the products of a polar factor read and write for one n x m matrix, n the number of Gram rows."""
    gram_ones, squares, long_ones = todo.grams, todo.symmetric_products, todo.long_products
    return gram_ones * (n * m + n * n) + squares * 3 * n * n + long_ones * (2 * n * m + n * n)


def block_seconds(bucket: Bucket, group: dict, machine: Machine, device: torch.device) -> tuple[float, float]:
    """Matrix products for one block: in every step (statistics, application), and when its roots are refreshed."""
    always, refresh, numel = 0.0, 0.0, math.prod(bucket.shape)
    for i in bucket.sides:
        n = bucket.shape[i]
        if bucket.kinds[i] != FULL:
            continue
        always += machine.products(numel * (n + 1), numel + 3 * n * n, 4)  # one triangle, added to the statistic
        always += machine.products(2 * numel * n, 2 * numel + n * n, 4)
        p = group["exponent"] or 2 * order_of(bucket.kinds)
        options = {"ridge": group["ridge"], "absolute": group["absolute_ridge"], "tol": group["tol"]}
        todo = root_plan.plan((1, n, n), torch.float32, device, p=p, **options)
        refresh += machine.products(todo.flops, 3 * todo.products * n * n, 4)
    return always, refresh


def bucket_moved(group: dict) -> int:
    """float32 elements that the elementwise parts of a block's step read and write, per element of the block."""
    names = state_names(group)
    graft = 3 if "graft_sq" in names else 0
    return 3 * len(names) + graft + 2 + 3  # two norms are read; the step is scaled, and taken from the parameter
