"""Muon over ranks: the owner of a matrix does what one process would, so results are its bits; traffic is the plan's."""

from __future__ import annotations

import torch
import torch.distributed as dist
from checks_elementwise import batch, meshes, same_bits, whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from worlds import check

import steepest

# Sides are multiples of 4, where a product's bits do not depend on what else is in its batch; the last is a vector.
SHAPES = [(8, 12), (12, 8), (16, 16), (8, 12), (4, 64), (40, 8), (12,)]


def tensors(seed, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def make(params, **options):
    return steepest.optim.Muon(params, lr=0.05, momentum=0.9, **options)


def run_both(rank, distribute, gradient, skip=(), steps=3, **options):
    """The same steps over ranks and alone; returns both lists of parameters and the optimizer over ranks."""
    spread = [torch.nn.Parameter(distribute(t)) for t in tensors(0)]
    alone = [torch.nn.Parameter(t) for t in tensors(0)]
    ours, expected = make(spread, **options), make(alone)
    for step in range(steps):
        for i, (p, q, g) in enumerate(zip(spread, alone, tensors(step + 1))):
            present = (i, step) not in skip
            p.grad = gradient(g) if present else None
            q.grad = g if present else None
        ours.step()
        expected.step()
    return spread, alone, ours


def check_traffic(ours, steps):
    """What left the ranks is what the plans say."""
    lanes = ours._spread.lanes()
    sent = torch.tensor(sum(lane.sent for lane in lanes), dtype=torch.float64)
    dist.all_reduce(sent)
    assert abs(float(sent) - steps * sum(lane.traffic for lane in lanes)) <= 1e-6 * float(sent)
    return sum(lane.traffic for lane in lanes)


def owned(ours):
    return [task.tensor for lane in ours._spread.lanes() for task in lane.plan.tasks]


@check(1, 2, 4)
def matrices_with_owners_have_the_bits_of_one_process(rank):
    for name, (mesh, placements) in meshes(rank.world).items():
        distribute = lambda t: distribute_tensor(t, mesh, placements(t.ndim))  # noqa: E731, B023
        spread, alone, ours = run_both(rank, distribute, distribute)
        lane = ours._spread.lanes()[0]
        summed = {id(lane.plan.entries[i].p) for i in lane.plan.grams}
        for p, q in zip(spread, alone):
            if id(p) in summed:
                # The parts' Gram matrices are added in another order: float32 rounding, amplified by at most the
                # schedule's slope (1e3) in directions whose singular values are small; steps of at most lr = 0.05.
                assert torch.allclose(whole(p), q, rtol=0, atol=3 * 0.05 * 1e3 * 2.0**-23), name
            else:
                assert same_bits(whole(p), q), (name, tuple(q.shape))
            if q.ndim == 2:
                mine = ours.state[p]["momentum_buffer"]
                assert isinstance(mine, DTensor) and mine.placements == p.placements
        check_traffic(ours, 3)


@check(2, 4)
def replicas_share_the_work_and_stay_equal(rank):
    spread, alone, ours = run_both(rank, torch.clone, torch.clone, process_group=dist.group.WORLD)
    for p, q in zip(spread, alone):
        assert same_bits(p, q)
    numel = sum(t.numel() for t in tensors(0) if t.ndim == 2)
    assert check_traffic(ours, 3) == (rank.world - 1) * numel * 4  # each factor once to every other rank
    assert {task.owner for lane in ours._spread.lanes() for task in lane.plan.tasks} == set(range(rank.world))


@check(2, 4)
def traffic_of_fsdp_is_twice_all_but_one_share(rank):
    """Square matrices, cut evenly: (ranks - 1) / ranks of all elements to the owners, and as many back."""
    mesh = init_device_mesh("cpu", (rank.world,))
    params = [torch.nn.Parameter(distribute_tensor(torch.randn(16, 16), mesh, [Shard(0)])) for _ in range(5)]
    ours = make(params)
    for p in params:
        p.grad = p.detach().clone()
    ours.step()
    assert check_traffic(ours, 1) == 2 * (rank.world - 1) / rank.world * 5 * 256 * 4


@check(2, 4)
def long_matrices_add_up_gram_matrices(rank):
    """Cut along a long side of 64 (or 128) against 4: less is sent than whole matrices would take."""
    mesh = init_device_mesh("cpu", (rank.world,))
    for shape, placement in (((4, 64), [Shard(1)]), ((129, 4), [Shard(0)])):
        alone = torch.nn.Parameter(torch.randn(shape))
        p = torch.nn.Parameter(distribute_tensor(alone.detach(), mesh, placement))
        ours, expected = make([p]), make([alone])
        for step in range(3):
            g = tensors(step, [shape])[0]
            p.grad, alone.grad = distribute_tensor(g, mesh, placement), g
            ours.step()
            expected.step()
        lane = ours._spread.lanes()[0]
        assert lane.plan.grams == [0] and not lane.plan.tasks
        runs = lane.plan.gram_bytes // (2 * (rank.world - 1) * 16 * 4)
        assert 1 <= runs <= 3 and check_traffic(ours, 3) == runs * 2 * (rank.world - 1) * 16 * 4
        assert check_traffic(ours, 3) < 2 * (rank.world - 1) / rank.world * shape[0] * shape[1] * 4
        # Gaussian 4 x 64: all singular values within a factor 3, where errors shrink; 4 x 2^-24 per product, 20 of them.
        assert torch.allclose(whole(p), alone, rtol=0, atol=3 * 0.05 * 2e-5)
    for value in (0.0, float("nan")):
        p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 64), mesh, [Shard(1)]))
        p.grad = distribute_tensor(torch.full((4, 64), value), mesh, [Shard(1)])
        make([p], weight_decay=0.0).step()
        assert (whole(p) == 1).all() if value == 0 else whole(p).isnan().all()


@check(2, 4)
def gradients_may_be_missing_on_some_ranks(rank):
    """Missing everywhere: no step.  Missing on some ranks: their shards count as zero."""
    mesh = init_device_mesh("cpu", (rank.world,))
    distribute = lambda t: distribute_tensor(t, mesh, [Shard(0)])  # noqa: E731
    skip = {(0, 0), (2, 1), (6, 0)}
    spread, alone, _ = run_both(rank, distribute, distribute, skip=skip)
    assert all(same_bits(whole(p), q) for p, q in zip(spread, alone) if q.shape not in ((40, 8), (4, 64)))
    w, g = torch.randn(16, 16), torch.randn(16, 16)
    p, q = torch.nn.Parameter(distribute(w)), torch.nn.Parameter(w.clone())
    ours, expected = make([p]), make([q])
    if rank.rank:
        p.grad = distribute_tensor(g, mesh, [Shard(0)], src_data_rank=None)
    q.grad = g.clone()
    q.grad[: 16 // rank.world] = 0
    ours.step()
    expected.step()
    assert same_bits(whole(p), q)


@check(2, 4)
def a_rank_that_refuses_stops_all_before_any_change(rank):
    mesh = init_device_mesh("cpu", (rank.world,))
    p = torch.nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh, [Shard(0)]))
    bias = torch.nn.Parameter(torch.ones(8))
    ours = make([p, bias])
    p.grad, bias.grad = distribute_tensor(torch.ones(8, 8), mesh, [Shard(0)]), torch.ones(8)
    if rank.rank == 1:
        ours.param_groups[0]["momentum"] = 2.0
    try:
        ours.step()
    except (ValueError, RuntimeError) as error:
        assert ("momentum" if rank.rank == 1 else "rank 1 refused this step") in str(error), error
    else:
        raise AssertionError("not refused")
    assert (whole(p) == 1).all() and (bias == 1).all() and ours.state[bias].get("step", 0) == 0


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.first = torch.nn.Linear(6, 16)
        self.hidden = torch.nn.Linear(16, 16)
        self.frozen = torch.nn.Linear(16, 16).requires_grad_(False)
        self.wide = torch.nn.Linear(16, 20)
        self.head = torch.nn.Linear(20, 3)

    def forward(self, x):
        for layer in (self.first, self.hidden, self.frozen, self.wide):
            x = torch.tanh(layer(x))
        return self.head(x)


def train(model, optimizer, steps=3):
    for step in range(steps):
        optimizer.zero_grad()
        x, y = batch(step)
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


@check(1, 2, 4)
def training_under_ddp_fsdp2_and_hsdp_follows_one_process(rank):
    """All ranks see the same batch.  The 16 x 6 matrix is cut along its long side: its bits may differ, and so, a little,
    all that follows; the bound is that of rounding in the polar factor, lr * 1e3 * 2^-23 per step, times 10 for the way
    back through the network."""
    alone = Network()
    train(alone, make(alone.named_parameters()))
    ddp = torch.nn.parallel.DistributedDataParallel(Network())
    models = {"ddp": (ddp, ddp.module), "fsdp2": (fully_shard(Network()),) * 2}
    if rank.world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
        models["hsdp"] = (fully_shard(Network(), mesh=square),) * 2
    for name, (model, inner) in models.items():
        options = {"process_group": dist.group.WORLD} if name == "ddp" else {}
        train(model, make(inner.named_parameters(), **options))
        for (parameter, p), q in zip(inner.named_parameters(), alone.parameters()):
            close = 0 if name == "ddp" or rank.world == 1 else 3 * 0.05 * 1e3 * 2.0**-23 * 10
            assert torch.allclose(whole(p), q, rtol=0, atol=close), (name, parameter, (whole(p) - q).abs().max())


@check(2, 4)
def fused_projections_kernels_and_other_momenta_have_the_bits_of_one_process(rank):
    """Every matrix inside a parameter has an owner of its own; decay that looks at the step is done by each shard."""
    mesh = init_device_mesh("cpu", (rank.world,))
    cases = [
        ((24, 16), dict(matrices=(8, 8, 8))),
        ((24, 16), dict(matrices=((16, 2), 8), cautious=True)),
        ((32, 16), dict(matrices=4, momentum_dtype=torch.bfloat16)),
        ((8, 4, 3, 3), dict(matrices="flatten")),
        ((6, 8, 12), dict(matrices="stack", cautious=True)),
        ((16, 16), dict(norm="schatten4", nesterov=False)),
    ]
    for shape, options in cases:
        group = dict(algorithm="muon", **options)
        alone = torch.nn.Parameter(torch.randn(shape))
        p = torch.nn.Parameter(distribute_tensor(alone.detach(), mesh, [Shard(0)]))
        ours, expected = make([{"params": [p], **group}]), make([{"params": [alone], **group}])
        for step in range(3):
            g = tensors(step, [shape])[0]
            p.grad, alone.grad = distribute_tensor(g, mesh, [Shard(0)]), g
            ours.step()
            expected.step()
        assert same_bits(whole(p), alone), (shape, options, (whole(p) - alone).abs().max())
    ours.param_groups[0]["normuon"] = 0.95
    try:
        ours.step()
    except NotImplementedError as error:
        assert "normuon=0.95 is not supported" in str(error)
    else:
        raise AssertionError("not refused")


def train_under_tensor_parallel(world, make):
    """A network with a column- and a row-parallel layer, and the same alone, after three steps; and the optimizer of the
    former."""
    mesh = init_device_mesh("cpu", (world,))
    alone, spread = Network(), Network()
    parallelize_module(spread, mesh, {"hidden": ColwiseParallel(), "wide": RowwiseParallel()})
    assert spread.hidden.weight.placements == (Shard(0),) and spread.wide.weight.placements == (Shard(1),)
    for model in (alone, spread):
        optimizer = make(model.named_parameters())
        for step in range(3):
            optimizer.zero_grad()
            x, y = batch(step)
            hidden = torch.tanh(model.hidden(torch.tanh(model.first(x))))
            hidden = torch.tanh(model.wide(hidden))
            torch.nn.functional.mse_loss(model.head(hidden), y).backward()
            optimizer.step()
    assert (alone.wide.weight - Network().wide.weight).abs().max() > 1e-3
    return alone, spread, optimizer


@check(2, 4)
def training_under_tensor_parallel_follows_one_process(rank):
    """Row-parallel layers add partial sums in another order: gradients are rounded as products are, so the bound is that
    of rounding in the polar factor, as under FSDP2."""
    alone, spread, optimizer = train_under_tensor_parallel(rank.world, make)
    check_traffic(optimizer, 3)
    close = 3 * 0.05 * 1e3 * 2.0**-23 * 10
    for (parameter, p), q in zip(spread.named_parameters(), alone.parameters()):
        assert torch.allclose(whole(p), q, rtol=0, atol=close), (parameter, (whole(p) - q).abs().max())