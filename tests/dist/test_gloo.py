"""DistributedDataParallel over gloo: every rank takes the same step, and it is the single process's step."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import steepest

STEPS, BATCH = 5, 8


def build():
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))


def make_optimizer(kind, model):
    if kind == "adamw":
        return steepest.optim.AdamW(model.parameters(), lr=1e-2)
    return steepest.optim.Muon(model.named_parameters(), lr=1e-2)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 12, generator=generator), torch.randn(BATCH, 4, generator=generator)


def train(kind, model, rank, world):
    optimizer = make_optimizer(kind, model.module if world > 1 else model)
    for step in range(STEPS):
        x, y = (t[rank::world] for t in batch(step))
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def worker(rank, world, port, kind, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    out[rank] = train(kind, torch.nn.parallel.DistributedDataParallel(build()), rank, world)
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_two_ranks_equal_each_other_bitwise_and_one_process_closely(kind):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        out = manager.dict()
        mp.spawn(worker, args=(2, port, kind, out), nprocs=2)
        ranks = [out[0], out[1]]
    assert torch.equal(*ranks)
    alone = train(kind, build(), 0, 1)
    # Averaging two half-batch means rounds differently from one mean, by a few units in the last place of the gradient;
    # AdamW and Muon normalise the gradient, so relative errors of 1e-6 reach the update of size lr = 1e-2 per step.
    assert (ranks[0] - alone).abs().max() <= STEPS * 1e-2 * 1e-3
    assert (ranks[0] - torch.cat([p.detach().flatten() for p in build().parameters()])).abs().max() > 1e-3
