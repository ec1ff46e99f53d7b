"""What steepest.planning predicts is what ranks do: bytes sent and states kept, rank by rank, for every kind of mesh."""

from __future__ import annotations

import math
import os
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from worlds import check

import steepest
from steepest.distributed import local
from steepest.planning import Machine, Mesh, predict
from steepest.planning.inventories import gpt2
from steepest.traffic import counted_traffic

# STEEPEST_REPORT=1 python worlds.py checks_plan 2: also prints predicted and measured times, of larger matrices.
REPORT = bool(os.environ.get("STEEPEST_REPORT"))
# Width 48: uneven vocabulary, matrices cut into blocks of 32 with remainders.
SHAPES = gpt2(layers=4, shrink=2) if REPORT else gpt2(layers=2, shrink=16)
STEPS = 2
OPTIONS = {"shampoo": dict(block_size=256 if REPORT else 32, precondition_frequency=2, momentum=0.5)}


def meshes(world):
    found = [Mesh(replicas=world), Mesh(shards=world), Mesh(tensor=world)]
    return found + ([Mesh(replicas=2, shards=2), Mesh(shards=2, tensor=2)] if world == 4 else [])


def tensors(mesh, seed):
    """The inventory's parameters, or gradients, as the mesh lays them out."""
    generator = torch.Generator().manual_seed(seed)
    device_mesh = None if mesh.plain else init_device_mesh("cpu", mesh.shape)
    found = {}
    for name, shape in SHAPES.items():
        t = torch.randn(shape, generator=generator)
        if not mesh.plain:
            region = mesh.layout(name, shape).regions[dist.get_rank()]
            part = t[tuple(slice(a, b) for a, b in region)].contiguous()
            placements = mesh.placements(name, shape)
            t = DTensor.from_local(part, device_mesh, placements, run_check=False, shape=t.shape, stride=t.stride())
        found[name] = t
    return found


def make(optimizer, mesh, named):
    if optimizer == "adamw":
        return steepest.optim.AdamW(named)
    group = {"process_group": dist.group.WORLD} if mesh.plain else {}
    kind = steepest.optim.Muon if optimizer == "muon" else steepest.optim.Shampoo
    return kind(named, **OPTIONS.get(optimizer, {}), **group)


def sent(ours, optimizer):
    if optimizer == "muon":
        return sum(lane.sent for lane in ours._spread.lanes())
    if optimizer == "shampoo":
        return sum(e.sent for _, spread in ours._steps.values() if spread for e in spread.exchanges())
    return 0


def states(ours):
    """Bytes that this rank keeps."""
    kept = [local(t) for entry in ours.state.values() for t in entry.values()]
    return sum(t.numel() * t.element_size() for t in kept)


@check(2, 4)
def traffic_and_memory_of_a_step_are_those_predicted(rank):
    for mesh in meshes(rank.world):
        for optimizer in ("adamw", "muon", "shampoo"):
            params = {name: torch.nn.Parameter(t) for name, t in tensors(mesh, 0).items()}
            ours = make(optimizer, mesh, list(params.items()))
            for step in range(STEPS):
                for p, g in zip(params.values(), tensors(mesh, step + 1).values()):
                    p.grad = g
                began = time.perf_counter()
                ours.step()
                took = time.perf_counter() - began
            # Rates of a rank that shares two cores with the others, and of loopback: times are only reported.
            machine = Machine(bandwidth=1e9, latency=1e-4, copy=2e10, matmul=9e10, matrix_bytes=4)
            told = predict(SHAPES, mesh, optimizer, machine, device="cpu", **OPTIONS.get(optimizer, {}))
            where = (str(mesh), optimizer)
            mine = sent(ours, optimizer)
            assert abs(mine - STEPS * told.sent[rank.rank]) <= STEPS, (*where, mine, told.sent)
            everyone = torch.tensor(mine, dtype=torch.float64)
            dist.all_reduce(everyone)
            assert abs(float(everyone) - STEPS * told.traffic) <= 1e-6 * told.traffic, (*where, everyone, told.traffic)
            assert (told.traffic > 0) == (optimizer != "adamw")
            assert states(ours) == told.memory["states"][rank.rank], (*where, states(ours), told.memory["states"])
            held = sum(local(p.detach()).numel() * 4 for p in params.values())
            assert held == told.memory["parameters"][rank.rank], where
            if rank.rank == 0 and REPORT:
                print(f"{mesh!s:20} {optimizer:8} predicted {told.seconds['step'] * 1e3:7.2f} ms, took {took * 1e3:7.2f}")


@check(2, 4)
def elementwise_bytes_are_those_of_the_plan(rank):
    """The same formula as the compiled library's count, for this rank's shards."""
    mesh = Mesh(shards=rank.world)
    for optimizer, make_it in (("adamw", steepest.optim.AdamW), ("lion", steepest.optim.Lion)):
        params = [torch.nn.Parameter(t) for t in tensors(mesh, 0).values()]
        ours = make_it(params)
        for p, g in zip(params, tensors(mesh, 1).values()):
            p.grad = g
        ours.step()
        with counted_traffic() as counted:
            ours.step()
        elements = torch.tensor([sum(local(p.detach()).numel() for p in params)] * rank.world)
        told = predict(SHAPES, mesh, optimizer, Machine(copy=1.0), device="cpu").seconds["elementwise"]
        most = torch.tensor(counted.bytes)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        assert told == int(most) and elements.max() > 0


class Block(torch.nn.Module):
    """Linear layers whose names are an inventory's."""

    def __init__(self):
        super().__init__()
        self.c_fc = torch.nn.Linear(16, 32)
        self.mlp = torch.nn.ModuleDict({"c_proj": torch.nn.Linear(32, 16)})


@check(4)
def meshes_lay_parameters_out_as_torch_does(rank):
    """fully_shard over parallelize_module: the placements and shards that planning takes for granted."""
    mesh = Mesh(shards=2, tensor=2)
    ranks = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    model = Block()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    plan = {"c_fc": ColwiseParallel(), "mlp.c_proj": RowwiseParallel()}
    parallelize_module(model, ranks["tensor"], plan)
    fully_shard(model, mesh=ranks["shard"])
    for name, p in model.named_parameters():
        assert p.placements == mesh.placements(name, shapes[name]), (name, p.placements)
        region = mesh.layout(name, shapes[name]).regions[rank.rank]
        assert math.prod(b - a for a, b in region) == p.to_local().numel(), name
