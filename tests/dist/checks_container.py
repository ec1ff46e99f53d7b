"""The example container over several model parts: one flattened checkpoint, whose states are DTensors."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from checks_elementwise import same_bits, whole
from resharding import Network, advance
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from worlds import check

import steepest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples/training"))


class Part(torch.nn.Module):
    """Parameters with names of their own in each part."""

    def __init__(self, name):
        super().__init__()
        self.add_module(name, Network())


@check(2)
def a_container_of_two_parts_saves_and_loads(rank):
    from torchtitan_container import OptimizersContainer

    def start():
        parts = [fully_shard(Part(name)) for name in ("first", "last")]
        return parts, OptimizersContainer(parts, lambda named: steepest.optim.Muon(named, lr=0.05, adamw={"lr": 0.1}))

    def step(parts, container, steps):
        for number in steps:
            for part in parts:
                advance(part, Nothing(), [number])  # gradients only
            container.step()

    parts, container = start()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(container, 0.5)
    step(parts, container, range(2))
    scheduler.step()
    assert all(group["lr"] in (0.025, 0.05) for o in container.optimizers for group in o.param_groups)
    folder = os.path.join(rank.folder, "container")
    dcp.save({"optimizer": container.state_dict(), "model": [part.state_dict() for part in parts]}, checkpoint_id=folder)
    assert any(isinstance(value, DTensor) for value in container.state_dict().values())
    again, other = start()
    held = {"optimizer": other.state_dict(), "model": [part.state_dict() for part in again]}
    dcp.load(held, checkpoint_id=folder)
    other.load_state_dict(held["optimizer"])
    for part, weights in zip(again, held["model"]):
        part.load_state_dict(weights)
    step(parts, container, [2])
    step(again, other, [2])
    for mine, theirs in zip(parts, again):
        assert all(same_bits(whole(p), whole(q)) for p, q in zip(mine.parameters(), theirs.parameters()))


class Nothing:
    def step(self):
        pass
