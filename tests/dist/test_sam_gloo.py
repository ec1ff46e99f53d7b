"""SAM over two gloo ranks: each on its own gradient (m-sharpness), on the averaged one, and over shards."""

from __future__ import annotations

import math
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import steepest

STEPS, WORLD, RHO, LR = 4, 2, 0.5, 0.1


def build():
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))


def batch(step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(8, 12, generator=generator), torch.randn(8, 4, generator=generator)


def backward(model, step, rank):
    model.zero_grad()
    x, y = batch(step, rank)
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    return loss


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(rank, per_rank):
    model = torch.nn.parallel.DistributedDataParallel(build())
    optimizer = steepest.optim.SAM(
        steepest.optim.SGD(model.parameters(), lr=LR, momentum=0.9), rho=RHO, model=model, per_rank=per_rank
    )
    for step in range(STEPS):
        optimizer.step(lambda step=step: backward(model, step, rank))
    return flat(model)


def shards(rank, p):
    """Each rank has half of the elements of one vector; returns its half after perturb."""
    generator = torch.Generator().manual_seed(1)
    w, g = (torch.randn(64, generator=generator) for _ in range(2))
    param = torch.nn.Parameter(w[32 * rank : 32 * rank + 32].clone())
    param.grad = g[32 * rank : 32 * rank + 32].clone()

    def reduce_norm(norm, q):
        total = norm.clone() if math.isinf(q) else norm**q
        dist.all_reduce(total, dist.ReduceOp.MAX if math.isinf(q) else dist.ReduceOp.SUM)
        return total if math.isinf(q) else total ** (1 / q)

    optimizer = steepest.optim.SAM(torch.optim.SGD([param], lr=0.0), rho=RHO, p=p, reduce_norm=reduce_norm)
    optimizer.first_step()
    moved = param.detach().clone()
    optimizer.second_step()
    return moved, w, g


def worker(rank, port, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    found = {per_rank: train(rank, per_rank) for per_rank in (True, False)}
    found |= {("shards", p): shards(rank, p) for p in (1.0, 2.0, 3.0)}
    out[rank] = found
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        out = manager.dict()
        mp.spawn(worker, args=(port, out), nprocs=WORLD)
        return [out[0], out[1]]


def transcription(per_rank):
    """Both ranks' work in one process, in the same float32 operations: halving is exact, so are sums of two terms."""
    model = build()
    params = list(model.parameters())
    base = steepest.optim.SGD(params, lr=LR, momentum=0.9)

    def gradient(step, rank):
        backward(model, step, rank)
        return [p.grad.clone() for p in params]

    def mean(grads):
        return [x / 2 + y / 2 for x, y in zip(*grads)]

    for step in range(STEPS):
        clean = [gradient(step, rank) for rank in range(WORLD)]
        climbed = clean if per_rank else [mean(clean)] * WORLD
        ascended = []
        for rank in range(WORLD):
            backups = [torch.empty_like(p) for p in params]
            steepest.perturb_(params, climbed[rank], [b.detach() for b in backups], rho=RHO)
            ascended.append(gradient(step, rank))
            steepest.restore_(params, [b.detach() for b in backups])
        for p, g in zip(params, mean(ascended)):
            p.grad = g
        base.step()
    return flat(model)


@pytest.mark.parametrize("per_rank", [True, False])
def test_two_ranks_equal_their_transcription_in_one_process(ranks, per_rank):
    assert torch.equal(ranks[0][per_rank], ranks[1][per_rank])
    assert torch.equal(ranks[0][per_rank], transcription(per_rank))


def test_the_two_modes_differ(ranks):
    assert (ranks[0][True] - ranks[0][False]).abs().max() > 1e-4


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_shards_move_as_the_whole(ranks, p):
    moved = torch.cat([ranks[rank]["shards", p][0] for rank in range(WORLD)])
    _, w, g = ranks[0]["shards", p]
    steepest.perturb_([w], [g], [torch.empty_like(w)], rho=RHO, p=p)
    # Largest and coefficient are rounded apart: three roundings more or less of each element's move of at most rho.
    assert (moved - w).abs().max() <= 4 * 2.0**-24 * (w.abs().max() + RHO)


def test_a_distributed_model_needs_the_choice():
    class Distributed(torch.nn.Linear):
        def no_sync(self):
            raise AssertionError

    model = Distributed(2, 2)
    with pytest.raises(ValueError, match="say per_rank=True"):
        steepest.optim.SAM(torch.optim.SGD(model.parameters()), model=model)
