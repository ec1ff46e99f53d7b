"""Shampoo over ranks: blocks belong to ranks, and results are those of one process; checkpoints move between worlds."""

from __future__ import annotations

import torch
import torch.distributed as dist
from checks_elementwise import batch, meshes, same_bits, whole
from checks_muon import Network, train_under_tensor_parallel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from worlds import check

import steepest

# With blocks of 8: whole blocks, remainders, a kernel whose last dimensions are merged; vectors go to AdamW.
SHAPES = [(16, 8), (12, 20), (8, 8), (6, 2, 2, 2), (1, 8), (12,)]


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def make(params, **options):
    """Roots to 1e-6: one process and several may compute them in batches of other sizes, by other methods."""
    given = dict(lr=0.05, block_size=8, precondition_frequency=2, momentum=0.5, weight_decay=0.1, tol=1e-6, ridge=1e-4)
    return steepest.optim.Shampoo(params, **{**given, **options})


# Relative error of a root: tol 1e-6, and float32 rounding 2^-24 amplified by at most 1 / ridge^(1/4) = 10 in each of
# 20 products: 1.2e-5.  Two roots, and grafting keeps the length; momentum adds 1 / (1 - 0.5); steps of 0.05.
CLOSE = 2 * 2 * 1.3e-5 * 0.05


def run_both(distribute, steps=6, skip=(), **options):
    spread = [torch.nn.Parameter(distribute(t)) for t in tensors(0)]
    alone = [torch.nn.Parameter(t) for t in tensors(0)]
    process_group = options.pop("process_group", None)
    ours, expected = make(spread, process_group=process_group, **options), make(alone, **options)
    for step in range(steps):
        for i, (p, q, g) in enumerate(zip(spread, alone, tensors(step + 1))):
            p.grad, q.grad = (None, None) if (i, step) in skip else (distribute(g), g)
        ours.step()
        expected.step()
    for p, q in zip(spread, alone):
        assert (whole(p) - q).abs().max() <= steps * CLOSE * q.abs().max(), (tuple(q.shape), (whole(p) - q).abs().max())
        assert not torch.equal(q, tensors(0)[[a is q for a in alone].index(True)])
    return spread, ours, expected


def check_traffic(ours, steps):
    exchanges = [e for _, spread in ours._steps.values() if spread for e in spread.exchanges()]
    sent = torch.tensor(float(sum(e.sent for e in exchanges)), dtype=torch.float64)
    dist.all_reduce(sent)
    assert float(sent) == steps * sum(e.traffic for e in exchanges)
    return sum(e.traffic for e in exchanges)


@check(1, 2, 4)
def blocks_with_owners_follow_one_process(rank):
    for grafting in ("adam", "none"):
        for mesh, placements in meshes(rank.world).values():
            _, ours, expected = run_both(lambda t: distribute_tensor(t, mesh, placements(min(2, t.ndim))), grafting=grafting)  # noqa: B023
            check_traffic(ours, 6)
            # Every block's states are on one rank, and nowhere else.
            mine = sum(key.startswith("refreshed.") for entry in ours.state.values() for key in entry)
            every = sum(key.startswith("refreshed.") for entry in expected.state.values() for key in entry)
            counted = torch.tensor(mine)
            dist.all_reduce(counted)
            assert int(counted) == every and mine <= -(-every // rank.world) + 2


@check(2)
def packed_statistics_follow_one_process(rank):
    mesh = init_device_mesh("cpu", (rank.world,))
    _, ours, _ = run_both(lambda t: distribute_tensor(t, mesh, [Shard(0)]), packed_statistics=True)
    kept = [v for entry in ours.state.values() for k, v in entry.items() if k.startswith("statistic.")]
    assert kept and all(v.dim() == 1 for v in kept)


@check(2, 4)
def replicas_share_the_blocks_and_stay_equal(rank):
    spread, ours, _ = run_both(torch.clone, process_group=dist.group.WORLD)
    for p in spread:
        all_of_them = [torch.empty_like(p) for _ in range(rank.world)]
        dist.all_gather(all_of_them, p.detach())
        assert all(same_bits(q, p) for q in all_of_them)
    numel = sum(t.numel() for t in tensors(0) if t.ndim > 1 and min(t.shape) > 1)
    assert check_traffic(ours, 6) == (rank.world - 1) * numel * 4


@check(2, 4)
def refreshing_is_balanced_over_ranks_in_every_step(rank):
    mesh = init_device_mesh("cpu", (rank.world,))
    params = [torch.nn.Parameter(distribute_tensor(torch.randn(32, 32), mesh, [Shard(0)])) for _ in range(4)]
    ours = make(params, precondition_frequency=4)
    for p in params:
        p.grad = p.detach().clone()
    ours.step()
    spread = ours._steps[0][1]
    for slot in range(4):
        work = [0] * rank.world
        for block, task, cost in zip(spread.blocks, spread.tasks, spread.costs):
            work[task.owner] += cost * (block.slot == slot)
        assert max(work) == min(work) > 0


@check(2, 4)
def missing_gradients_step_nothing(rank):
    mesh = init_device_mesh("cpu", (rank.world,))
    run_both(lambda t: distribute_tensor(t, mesh, [Shard(0)]), skip={(0, 0), (1, 2), (2, 1), (3, 3)})


@check(2)
def a_rank_that_refuses_stops_all_before_any_change(rank):
    mesh = init_device_mesh("cpu", (rank.world,))
    p = torch.nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh, [Shard(0)]))
    ours = make([p])
    p.grad = distribute_tensor(torch.ones(8, 8), mesh, [Shard(0)])
    if rank.rank == 1:
        ours.param_groups[0]["momentum"] = 2.0
    try:
        ours.step()
    except (ValueError, RuntimeError) as error:
        assert ("momentum" if rank.rank == 1 else "rank 1 refused this step") in str(error), error
    else:
        raise AssertionError("not refused")
    assert (whole(p) == 1).all()


@check(2, 4)
def training_under_ddp_fsdp2_and_hsdp_follows_one_process(rank):
    """All ranks see the same batch; differences of CLOSE per step come back through five layers with slopes below 2."""

    def train(model, inner, **options):
        optimizer = make(inner.named_parameters(), **options)
        for step in range(3):
            optimizer.zero_grad()
            x, y = batch(step)
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()

    alone = Network()
    train(alone, alone)
    ddp = torch.nn.parallel.DistributedDataParallel(Network())
    models = {"ddp": (ddp, ddp.module), "fsdp2": (fully_shard(Network()),) * 2}
    if rank.world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
        models["hsdp"] = (fully_shard(Network(), mesh=square),) * 2
    for name, (model, inner) in models.items():
        train(model, inner, **({"process_group": dist.group.WORLD} if name == "ddp" else {}))
        for (parameter, p), q in zip(inner.named_parameters(), alone.parameters()):
            assert torch.allclose(whole(p), q, rtol=0, atol=3 * CLOSE * 2**5), (name, parameter)


@check(2, 4)
def training_under_tensor_parallel_follows_one_process(rank):
    """Row-parallel layers add partial sums in another order: gradients are rounded as products are, so the bound is that
    of other products, as under FSDP2."""
    alone, spread, optimizer = train_under_tensor_parallel(rank.world, make)
    check_traffic(optimizer, 3)
    for (parameter, p), q in zip(spread.named_parameters(), alone.parameters()):
        assert torch.allclose(whole(p), q, rtol=0, atol=3 * CLOSE * 2**5), (parameter, (whole(p) - q).abs().max())