"""AdamW against torch: one large tensor, many small ones, 16-bit parameters, AMSGrad, the tensors of real models."""

from __future__ import annotations

import shutil

import pytest
import torch
from problems import ADAMW_PEERS, adamw_costs, adamw_runners, copies, parameters

from steepest.planning.inventories import MODELS, inventory

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MIB = 2**20

# id: (tensors, elements each, dtype).  1x1K is where a step is all overhead; 16-element tensors where most of it is.
QUICK = {
    "1x1K-float32": (1, 1 << 10, F32),
    "1x4M-float32": (1, 4 << 20, F32),
    "1x4M-bfloat16": (1, 4 << 20, BF16),
    "1x4M-float16": (1, 4 << 20, F16),
    "500x64x64-float32": (500, 64 * 64, F32),
    "2000x16-float32": (2000, 16, F32),
}
FULL = {
    "1x1K-float32": (1, 1 << 10, F32),
    "1x32M-float32": (1, 32 << 20, F32),
    "1x16M-bfloat16": (1, 16 << 20, BF16),
    "1x16M-float16": (1, 16 << 20, F16),
    "2000x64x64-float32": (2000, 64 * 64, F32),
    "10000x16-float32": (10000, 16, F32),
    "10000x256-float32": (10000, 256, F32),
}
# Memory of parameters, gradients and states of one optimizer; the peers hold as much each.
BUDGETS = {"cpu": {"quick": 96 * MIB, "full": 2048 * MIB}, "cuda": {"quick": 2048 * MIB, "full": 16384 * MIB}}


@pytest.mark.cases(quick=QUICK, full=FULL)
def bench_adamw(race, device, case):
    count, size, dtype = case
    params = parameters([(size,)] * count, dtype, device)
    # In 16 bits foreach rounds after every operation, which is another rule; fused does not.
    ours, peers = adamw_runners(params, ADAMW_PEERS if dtype == F32 else ["torch fused"])
    name = f"{count} x {size} {str(dtype).removeprefix('torch.')}"
    race(ours, peers, op="adamw", case=name, **adamw_costs(params))


@pytest.mark.cases(quick={"1x4M": 4 << 20}, full={"1x16M": 16 << 20})
def bench_adamw_amsgrad(race, device, case):
    params = parameters([(case,)], F32, device)
    ours, peers = adamw_runners(params, ADAMW_PEERS, amsgrad=True)
    race(ours, peers, op="adamw", case=f"amsgrad, 1 x {case} float32", **adamw_costs(params, amsgrad=True))


@pytest.mark.cases(quick={name: name for name in MODELS}, full={name: name for name in MODELS})
def bench_adamw_inventory(race, device, scale, case):
    """Every tensor of a model, as many layers of it as fit the budget."""
    found = inventory(case, BUDGETS[device][scale])
    params = parameters(found.shapes.values(), F32, device)
    ours, peers = adamw_runners(params, ADAMW_PEERS)
    race(ours, peers, op="adamw", case=found.title, **adamw_costs(params))


@pytest.mark.cases(quick={}, full={"20x64K": (20, 64 << 10)})
def bench_adamw_compiled(race, device, case):
    """torch.compile needs many seconds and a C++ compiler, hence the full scale and a short list."""
    if device == "cpu" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++ here")
    params = parameters([(case[1],)] * case[0], F32, device)
    ours, peers = adamw_runners(params, ["torch fused"])
    # capturable keeps the step counts on the GPU, where the compiled kernels read them.
    optimizer = torch.optim.AdamW(copies(params), lr=1e-3, foreach=True, capturable=device == "cuda")
    peers["torch compiled"] = torch.compile(optimizer.step)
    peers["torch compiled"]()
    race(ours, peers, op="adamw", case=f"{case[0]} x {case[1]} float32, compiled", **adamw_costs(params))
