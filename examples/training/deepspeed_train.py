"""DeepSpeed: an optimizer of this library as client optimizer, over ZeRO stage 0, 1 or 2; checkpoints resume it.

torchrun --nproc-per-node 2 examples/training/deepspeed_train.py out/deepspeed --stage 2

ZeRO flattens parameters: elementwise optimizers do not mind (their bits do not depend on shapes), while Muon and
Shampoo need matrices and so stage 0, where every rank has all of them.  bfloat16 parameters have DeepSpeed's own
float32 masters: leave master_weights alone.
"""

import argparse
import os

import deepspeed
import torch
import torch.distributed as dist
from digits import DeepNetwork, data

import steepest


def engine_for(options, batch):
    torch.manual_seed(0)
    model = DeepNetwork()
    if options.optimizer == "adamw":
        optimizer = steepest.optim.AdamW(model.parameters(), lr=3e-3)
    elif options.stage:
        raise SystemExit(f"{options.optimizer} needs matrices, which ZeRO flattens: use --stage 0")
    else:
        optimizer = steepest.optim.Muon(model.named_parameters(), lr=0.02, adamw={"lr": 3e-3})
    config = {
        "train_micro_batch_size_per_gpu": batch,
        "zero_optimization": {"stage": options.stage},
        "zero_allow_untested_optimizer": True,  # it lists its own and torch's
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def train(engine, x, y, steps):
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(engine(x), y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--stage", type=int, choices=(0, 1, 2), default=1)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    # Its shared-memory collectives for CPUs would be compiled first, for minutes; gloo has some.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", dist_init_required=False)
    x, y = (t[dist.get_rank() :: dist.get_world_size()][:512] for t in data())
    engine = engine_for(options, len(x))
    losses = train(engine, x, y, options.steps)
    engine.save_checkpoint(options.folder, tag="half")
    losses += train(engine, x, y, options.steps)
    resumed = engine_for(options, len(x))
    resumed.load_checkpoint(options.folder, tag="half")
    train(resumed, x, y, options.steps)
    same = all(torch.equal(a, b) for a, b in zip(engine.module.parameters(), resumed.module.parameters()))
    assert same, "a resumed run must end where the uninterrupted one did"
    if dist.get_rank() == 0:
        print(f"loss {losses[0]:.6f} -> {losses[-1]:.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
