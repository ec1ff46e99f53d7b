"""Elementwise optimizers over DTensors: the bits of one process with whole tensors, whatever the layout."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from worlds import check

import steepest
from steepest.distributed import local, reduce_norm
from steepest.distributed.layout import layout_of, size

OPTIMIZERS = {
    "sgd": lambda p, **o: steepest.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, **o),
    "adagrad": lambda p, **o: steepest.optim.Adagrad(p, lr=0.1, **o),
    "rmsprop": lambda p, **o: steepest.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True, **o),
    "adam": lambda p, **o: steepest.optim.Adam(p, lr=0.1, amsgrad=True, **o),
    "adamw": lambda p, **o: steepest.optim.AdamW(p, lr=0.1, **o),
    "lion": lambda p, **o: steepest.optim.Lion(p, lr=0.1, weight_decay=0.1, **o),
}
# Uneven shards, shards [0, N] and [1, N], a vector, an empty tensor, a matrix that is large enough for several ranks.
SHAPES = [(7, 5), (1, 8), (3, 6), (0, 3), (5,), (16, 12), (2, 3, 4)]


def meshes(world):
    """name -> (mesh, placements of a tensor with `ndim` dimensions)."""
    flat = init_device_mesh("cpu", (world,))
    found = {
        "rows": (flat, lambda ndim: [Shard(0)]),
        "last": (flat, lambda ndim: [Shard(ndim - 1)]),
        "whole": (flat, lambda ndim: [Replicate()]),
    }
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
        found["replicated rows"] = (square, lambda ndim: [Replicate(), Shard(0)])
        found["rows and last"] = (square, lambda ndim: [Shard(0), Shard(ndim - 1)])
        found["rows twice"] = (square, lambda ndim: [Shard(0), Shard(0)])
    return found


def whole_tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def gradients(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def same_bits(a, b):
    """Equal, and as tensors of integers: -0.0 is not 0.0."""
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


def compare(make, mesh, placements, dtype, steps=4, skip=()):
    spread = [torch.nn.Parameter(distribute_tensor(t, mesh, placements(t.ndim))) for t in whole_tensors(dtype)]
    alone = [torch.nn.Parameter(t) for t in whole_tensors(dtype)]
    ours, expected = make(spread), make(alone)
    for step in range(steps):
        for i, (p, q, g) in enumerate(zip(spread, alone, gradients(step, dtype))):
            present = (i, step) not in skip
            p.grad = distribute_tensor(g, mesh, placements(g.ndim)) if present else None
            q.grad = g if present else None
        ours.step()
        expected.step()
        for p, q in zip(spread, alone):
            assert same_bits(p.full_tensor(), q)
    for p, q in zip(spread, alone):
        if q not in expected.state:
            continue
        for key, value in expected.state[q].items():
            mine = ours.state[p][key]
            if key == "step":
                assert torch.equal(mine, value)
            else:
                assert isinstance(mine, DTensor) and mine.placements == p.placements
                if value.dtype == torch.int16:  # gloo sends none
                    mine, value = mine.to(torch.int32), value.to(torch.int32)
                assert same_bits(mine.full_tensor(), value), key
    return ours


@check(1, 2, 4)
def every_rule_and_layout_gives_the_bits_of_one_process(rank):
    for mesh, placements in meshes(rank.world).values():
        for make in OPTIMIZERS.values():
            ours = compare(make, mesh, placements, torch.float32, skip={(0, 1), (0, 2), (5, 0)})
            # The compiled walk took the shards in place: nothing was prepared in Python.
            assert all(table.lists is None for tables in ours._tables.values() for table in tables.tables)
        compare(OPTIMIZERS["adamw"], mesh, placements, torch.bfloat16)


@check(1, 2, 4)
def layouts_are_those_of_dtensor(rank):
    for mesh, placements in meshes(rank.world).values():
        for t in whole_tensors():
            d = distribute_tensor(t, mesh, placements(t.ndim))
            layout = layout_of(d, None)
            region = layout.regions[layout.team.me]
            assert size(region) == d.to_local().numel()
            assert torch.equal(t[tuple(slice(a, b) for a, b in region)].flatten(), d.to_local().flatten())


@check(1, 2, 4)
def norms_count_every_shard_once(rank):
    for mesh, placements in meshes(rank.world).values():
        alone = [torch.nn.Parameter(t) for t in whole_tensors()]
        spread = [torch.nn.Parameter(distribute_tensor(t, mesh, placements(t.ndim))) for t in whole_tensors()]
        ours, expected = (OPTIMIZERS["adamw"](p, max_grad_norm=0.5) for p in (spread, alone))
        for step in range(3):
            for p, q, g in zip(spread, alone, gradients(step)):
                p.grad, q.grad = distribute_tensor(g, mesh, placements(g.ndim)), g
            ours.step()
            expected.step()
            # Both are sums of float64 squares, grouped differently: equal but for one rounding to float32.
            assert abs(ours.grad_norm - expected.grad_norm) <= 2.0**-23 * expected.grad_norm
            # A relative change c of all gradients moves Adam's ratio m / sqrt(v) by about c, and a step by lr c; each
            # of the following roundings is one unit in the last place of a parameter below 8.
            for p, q in zip(spread, alone):
                assert torch.allclose(p.full_tensor(), q, rtol=0, atol=(step + 1) * 2.0**-20)
        for q in (1.0, 2.0, 3.0, float("inf")):
            found = steepest.survey([p.grad for p in spread], q=q)
            whole = steepest.survey([p.grad for p in alone], q=q)
            assert torch.allclose(found.norm, whole.norm, rtol=2.0**-22, atol=0)
            assert torch.equal(found.max_abs, whole.max_abs) and not found.nonfinite
            norms = [torch.linalg.vector_norm(local(p.grad), q) if local(p.grad).numel() else 0.0 for p in spread]
            assert torch.allclose(reduce_norm(norms, spread, q), whole.norm, rtol=2.0**-20, atol=0)
        steepest.clip_grad_norm_(spread, 1.0)
        assert torch.allclose(steepest.survey([p.grad for p in spread]).norm, torch.tensor(1.0), rtol=1e-5)


@check(2, 4)
def one_bad_element_is_seen_by_all(rank):
    mesh, placements = meshes(rank.world)["rows"]
    g = torch.ones(8, 3)
    g[7, 0] = float("inf")
    found = steepest.survey([distribute_tensor(g, mesh, placements(2))])
    assert found.nonfinite and found.max_abs == float("inf")
    g[7, 0] = float("nan")
    assert steepest.survey([distribute_tensor(g, mesh, placements(2))]).max_abs.isnan()


@check(2, 4)
def a_rank_may_lack_gradients(rank):
    """The others' norm does not wait for it, and it counts as nothing."""
    mesh, placements = meshes(rank.world)["rows"]
    p = torch.nn.Parameter(distribute_tensor(torch.ones(8, 3), mesh, placements(2)))
    optimizer = OPTIMIZERS["adamw"]([p], max_grad_norm=100.0)
    if rank.rank:
        p.grad = distribute_tensor(torch.ones(8, 3), mesh, placements(2), src_data_rank=None)
    optimizer.step()
    shares = 24 * (rank.world - 1) / rank.world
    assert abs(optimizer.grad_norm - shares**0.5) < 1e-6 * shares**0.5
    assert (local(p.detach()) == 1).all() == (rank.rank == 0)
    assert ("step" in optimizer.state[p]) == (rank.rank > 0)


@check(2)
def other_layouts_of_gradients_are_added_up_or_moved(rank):
    mesh = init_device_mesh("cpu", (2,))
    w, g = torch.randn(6, 4), torch.randn(6, 4)
    for placement, gradient in (
        ([Replicate()], DTensor.from_local(g / 2, mesh, [Partial()])),
        ([Shard(0)], DTensor.from_local(g / 2, mesh, [Partial()])),
        ([Shard(0)], distribute_tensor(g, mesh, [Shard(1)])),
    ):
        p, q = torch.nn.Parameter(distribute_tensor(w, mesh, placement)), torch.nn.Parameter(w.clone())
        ours, expected = OPTIMIZERS["adamw"]([p]), OPTIMIZERS["adamw"]([q])
        p.grad, q.grad = gradient, g
        for _ in range(2):
            ours.step()
            expected.step()
        assert same_bits(p.full_tensor(), q)
        assert p.grad is gradient


@check(2)
def wrong_layouts_are_refused_before_any_change(rank):
    mesh = init_device_mesh("cpu", (2,))
    w = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
    lists = [[w.clone()], [w.clone()], [w.clone()], [w.clone()]]
    wrong = {
        "exp_avgs[0] has placements": (2, w.redistribute(placements=[Shard(1)])),
        "exp_avgs[0] is a Tensor": (2, torch.zeros(2, 4)),
        "grads[0] is a Tensor": (1, torch.zeros(2, 4)),
        "params[0] is a DTensor with placements": (0, DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])),
    }
    for message, (role, tensor) in wrong.items():
        given = [list(role) for role in lists]
        given[role] = [tensor]
        before = [local(role[0]).clone() for role in given]
        try:
            steepest.adamw_(*given, lr=0.1, step=1)
        except (ValueError, TypeError) as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"not refused: {message}")
        assert all(torch.equal(local(role[0]), old) for role, old in zip(given, before))
    steepest.adamw_(*lists, lr=0.1, step=1)
    assert (local(lists[0][0]) != 1).all()


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.first = torch.nn.Linear(6, 12)
        self.second = torch.nn.Linear(12, 3)
        self.frozen = torch.nn.Linear(3, 3).requires_grad_(False)
        self.unused = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.frozen(self.second(torch.tanh(self.first(x))))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)


def train(model, optimizer, steps=4):
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def whole(p):
    return p.full_tensor() if isinstance(p, DTensor) else p.detach()


def stacks(world):
    """Models as DDP, FSDP2 and HSDP hold them."""
    ddp = torch.nn.parallel.DistributedDataParallel(Network(), find_unused_parameters=True)
    found = {"ddp": (ddp, ddp.module), "fsdp2": (fully_shard(Network()),) * 2}
    per_layer = Network()
    for layer in (per_layer.first, per_layer.second):
        fully_shard(layer)
    found["fsdp2 per layer"] = (fully_shard(per_layer),) * 2
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
        found["hsdp"] = (fully_shard(Network(), mesh=square),) * 2
    return found


@check(1, 2, 4)
def training_under_ddp_fsdp2_and_hsdp_gives_the_bits_of_one_process(rank):
    """All ranks see the same batch: averaging 1, 2 or 4 equal gradients is exact, so nothing may differ."""
    for make in OPTIMIZERS.values():
        alone = Network()
        train(alone, make(alone.parameters()))
        assert not torch.equal(alone.first.weight, Network().first.weight)
        for name, (model, inner) in stacks(rank.world).items():
            train(model, make(inner.parameters()))
            for (parameter, p), q in zip(inner.named_parameters(), alone.parameters()):
                assert same_bits(whole(p), q), (name, parameter)


@check(2, 4)
def training_under_tensor_parallel_follows_one_process(rank):
    """Row-parallel products add partial sums of 12 / ranks terms: gradients differ by a few units of 2^-24.

    Adam divides by |g|, so an element of relative error e in g moves by up to lr e more; elements below 1e-4 of the
    largest gradient have relative errors of at most 12 * 2^-24 * 1e4 < 1e-2.
    """
    alone, spread = Network(), Network()
    mesh = init_device_mesh("cpu", (rank.world,))
    parallelize_module(spread, mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()})
    train(alone, OPTIMIZERS["sgd"](alone.parameters()))
    train(spread, OPTIMIZERS["sgd"](spread.parameters()))
    for p, q in zip(spread.parameters(), alone.parameters()):
        assert torch.allclose(whole(p), q, rtol=0, atol=1e-5)  # sgd is linear in the gradients: no amplification
    alone, spread = Network(), Network()
    parallelize_module(spread, mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()})
    train(alone, OPTIMIZERS["adamw"](alone.parameters()))
    train(spread, OPTIMIZERS["adamw"](spread.parameters()))
    for p, q in zip(spread.parameters(), alone.parameters()):
        assert torch.allclose(whole(p), q, rtol=0, atol=4 * 0.1 * 1e-2)
    dist.barrier()


@check(2, 4)
def masters_correction_bits_and_random_rounding_do_not_depend_on_shards(rank):
    """Random numbers belong to elements of the whole tensor: cut along the first dimension, bits are one process's."""
    found = meshes(rank.world)
    for options in (
        dict(master_weights=True),
        dict(correction_bits=16),
        dict(stochastic_rounding=True, state_dtype=torch.bfloat16),
        dict(gradient_noise=(0.1, 0.5), ema_decay=0.9),
    ):
        for name in ("rows", "replicated rows", "rows twice"):
            if name in found:
                compare(lambda p: OPTIMIZERS["adamw"](p, **options), *found[name], torch.bfloat16)  # noqa: B023
    w = torch.nn.Parameter(distribute_tensor(torch.ones(8, 8), *found["rows"][:1], [Shard(0)]))
    w.grad = w.detach().clone()
    try:
        OPTIMIZERS["adamw"]([w], state_dtype="block8").step()
    except NotImplementedError as error:
        assert "8-bit states of DTensor parameters" in str(error)
    else:
        raise AssertionError("not refused")
