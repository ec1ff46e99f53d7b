"""Checks for test_resharding.py: a run that is saved in one world and goes on in another."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checks_elementwise import same_bits, whole
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from worlds import Rank

import steepest
from steepest.distributed import exchange, norms

STEPS = 3  # before the checkpoint, and again after it


class Network(torch.nn.Module):
    """Matrices that are cut evenly and unevenly, square ones, a vector; never run: gradients are given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(11)
        self.square = torch.nn.Linear(16, 16)
        self.uneven = torch.nn.Linear(12, 12)
        self.tiny = torch.nn.Linear(8, 3, bias=False)


MAKE = {
    "adamw": lambda named: steepest.optim.AdamW([p for _, p in named], lr=0.1, amsgrad=True, max_grad_norm=100.0),
    "sgd": lambda named: steepest.optim.SGD([p for _, p in named], lr=0.1, momentum=0.9),
    "muon": lambda named: steepest.optim.Muon(named, lr=0.05, momentum=0.9),
    "shampoo": lambda named: steepest.optim.Shampoo(
        named, lr=0.05, block_size=8, precondition_frequency=2, momentum=0.5, tol=1e-6, ridge=1e-4
    ),
}


def gradient(step, name, p):
    generator = torch.Generator().manual_seed(1000 * step + len(name))
    return torch.randn(p.shape, generator=generator)


def advance(model, optimizer, steps):
    for step in steps:
        for name, p in model.named_parameters():
            g = gradient(step, name, p)
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if hasattr(p, "device_mesh") else g
        optimizer.step()


def started(kind):
    model = fully_shard(Network())
    return model, MAKE[kind](list(model.named_parameters()))


def resumed(rank, kind):
    model, optimizer = started(kind)
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().fill_(7)
    weights, states = get_state_dict(model, optimizer)
    held = {"model": weights, "optimizer": states}
    dcp.load(held, checkpoint_id=os.path.join(rank.folder, kind))
    set_state_dict(model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    return model, optimizer


def save(rank: Rank):
    for kind in MAKE:
        model, optimizer = started(kind)
        advance(model, optimizer, range(STEPS))
        weights, states = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=os.path.join(rank.folder, kind))


def go_on(rank: Rank):
    for kind, make in MAKE.items():
        alone = Network()
        uninterrupted = make(list(alone.named_parameters()))
        advance(alone, uninterrupted, range(2 * STEPS))
        model, optimizer = resumed(rank, kind)
        advance(model, optimizer, range(STEPS, 2 * STEPS))
        for (name, p), q in zip(model.named_parameters(), alone.parameters()):
            if kind == "shampoo":  # see CLOSE in checks_shampoo.py
                assert (whole(p) - q).abs().max() <= 2 * STEPS * 2.6e-6 * q.abs().max(), (kind, name)
            else:
                assert same_bits(whole(p), q), (kind, name, (whole(p) - q).abs().max())
            step = optimizer.state[p].get("step")
            assert step is None or step == 2 * STEPS
    dist.barrier()


def lose_a_rank(rank: Rank, kind: str):
    """The last rank dies in the middle of a step, where the others already wait for it."""
    model, optimizer = resumed(rank, kind)
    advance(model, optimizer, [STEPS])
    if rank.rank == rank.world - 1:
        exchange.Exchange._start = norms.gather_over = lambda *args, **kwargs: os._exit(3)
    try:
        advance(model, optimizer, [STEPS + 1])
    except RuntimeError as error:
        message = str(error)
        assert ".step: " in message and "restart from the last checkpoint" in message, message
        return
    raise AssertionError("the loss of a rank was not noticed")


def lose_adamw(rank: Rank):
    lose_a_rank(rank, "adamw")


def lose_muon(rank: Rank):
    lose_a_rank(rank, "muon")


def lose_shampoo(rank: Rank):
    lose_a_rank(rank, "shampoo")
