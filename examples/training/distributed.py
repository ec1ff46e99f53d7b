"""DDP, FSDP2 and HSDP with checkpoints that any number of ranks can load.

torchrun --nproc-per-node 4 examples/training/distributed.py --optimizer muon --checkpoint out/ckpt
torchrun --nproc-per-node 2 examples/training/distributed.py --optimizer muon --checkpoint out/ckpt --resume
"""

import argparse

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from digits import DeepNetwork, data
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import steepest


def wrapped(mode):
    """The model as the mode runs it, and the module that holds its parameters."""
    model = DeepNetwork()
    if mode == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
        return model, model.module
    ranks = dist.get_world_size()
    shape, names = ((2, ranks // 2), ("replica", "shard")) if mode == "hsdp" else ((ranks,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in (model.hidden, model.wide):
        fully_shard(layer, mesh=mesh)
    return (fully_shard(model, mesh=mesh),) * 2


def optimizer_for(name, module, mode):
    # DTensors say by themselves how they are spread.  DDP's parameters do not: with the group, ranks share the work.
    group = {"process_group": dist.group.WORLD} if mode == "ddp" else {}
    if name == "adamw":
        return steepest.optim.AdamW(module.parameters(), lr=3e-3, max_grad_norm=1.0)
    if name == "muon":
        return steepest.optim.Muon(module.named_parameters(), lr=0.02, adamw={"lr": 3e-3}, **group)
    return steepest.optim.Shampoo(module.named_parameters(), lr=3e-3, precondition_frequency=5, **group)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", choices=("ddp", "fsdp2", "hsdp"), default="fsdp2")
    parser.add_argument("--optimizer", choices=("adamw", "muon", "shampoo"), default="adamw")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--checkpoint")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model, module = wrapped(options.mode)
    optimizer = optimizer_for(options.optimizer, module, options.mode)
    if options.resume:
        weights, states = get_state_dict(module, optimizer)
        held = {"model": weights, "optimizer": states}
        dcp.load(held, checkpoint_id=options.checkpoint)
        set_state_dict(module, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    x, y = (t[dist.get_rank() :: dist.get_world_size()] for t in data())
    for step in range(options.steps):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dist.all_reduce(loss.detach(), dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
        if dist.get_rank() == 0 and step in (0, options.steps - 1):
            print(f"step {step} loss {loss.item() / dist.get_world_size():.6f}", flush=True)
    if options.checkpoint and not options.resume:
        weights, states = get_state_dict(module, optimizer)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=options.checkpoint)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
