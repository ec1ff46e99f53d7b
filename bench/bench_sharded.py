"""What the host spends on a step over DTensor parameters, as FSDP2 and tensor parallel have them, beside plain ones."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from problems import ADAMW_PEERS, adamw_costs, check_same, copies, parameters
from torch import Tensor

import steepest


@pytest.fixture
def mesh(device):
    """One rank: what a step costs here is the same on each of many, and nothing is sent."""
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh(device, (1,))
    dist.destroy_process_group()


def sharded(params: list[Tensor], mesh) -> list[Tensor]:
    """The same values, cut along the first dimension."""
    from torch.distributed.tensor import Shard, distribute_tensor

    found = []
    for p in params:
        q = torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)]))
        q.grad = distribute_tensor(p.grad.clone(), mesh, [Shard(0)])
        found.append(q)
    return found


@pytest.mark.cases(
    quick={"300x1K": (300, 1 << 10)},
    full={"300x1K": (300, 1 << 10), "300x4K": (300, 1 << 12), "300x64K": (300, 1 << 16)},
)
def bench_sharded(race, device, mesh, case):
    """AdamW over DTensors; the peers are torch's over DTensors, and ours over plain tensors."""
    count, size = case
    params = parameters([(size,)] * count, torch.float32, device)
    mine, theirs, plain = sharded(params, mesh), sharded(params, mesh), copies(params)
    ours = steepest.optim.AdamW(mine, lr=1e-3).step
    peers = {
        "torch fused": ADAMW_PEERS["torch fused"](theirs, lr=1e-3).step,
        "steepest, plain tensors": steepest.optim.AdamW(plain, lr=1e-3).step,
    }
    ours()
    for name, other in zip(peers, (theirs, plain)):
        peers[name]()
        check_same(name, [shard(p) for p in mine], [shard(p) for p in other])
    race(ours, peers, op="adamw, DTensor", case=f"{count} x {size} float32", **adamw_costs(params))


def shard(p: Tensor) -> Tensor:
    return p.detach().to_local() if hasattr(p, "to_local") else p.detach()
