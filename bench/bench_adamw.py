"""AdamW against torch: one large tensor, many small ones, 16-bit parameters, an AMSGrad run."""

from __future__ import annotations

import pytest
import torch

import steepest

# id: (tensors, elements each, dtype).  Bytes per element: p, g, m, v read and p, m, v written.
CASES = {
    "1x32M-float32": (1, 32 << 20, torch.float32),
    "1x16M-bfloat16": (1, 16 << 20, torch.bfloat16),
    "1x16M-float16": (1, 16 << 20, torch.float16),
    "2000x64x64-float32": (2000, 64 * 64, torch.float32),
    "10000x16-float32": (10000, 16, torch.float32),
    "10000x256-float32": (10000, 256, torch.float32),
}


def optimizer(cls, count, size, dtype, **options):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(size, generator=generator).to(dtype).requires_grad_() for _ in range(count)]
    for p in params:
        p.grad = torch.randn(size, generator=generator).to(dtype)
    return params, cls(params, lr=1e-3, **options)


@pytest.mark.parametrize("case", CASES)
def bench_adamw(race, case):
    count, size, dtype = CASES[case]
    params, ours = optimizer(steepest.optim.AdamW, count, size, dtype)
    theirs, fused = optimizer(torch.optim.AdamW, count, size, dtype, fused=True)
    ours.step()
    fused.step()
    # One unit in the last place of the largest parameter: the two differ in the order of a few roundings.
    unit = torch.finfo(dtype).eps * max(p.abs().max().item() for p in params)
    assert max((p - q).abs().max().item() for p, q in zip(params, theirs)) <= unit
    record = race(
        ours.step, {"torch fused": fused.step}, op="adamw", case=case, tensors=count,
        nbytes=7 * count * size * dtype.itemsize,
    )  # fmt: skip
    record["host_us_per_tensor"] = record["ms"] * 1e3 / count


@pytest.mark.parametrize("case", ["2000x64x64-float32"])
def bench_adamw_foreach(race, case):
    count, size, dtype = CASES[case]
    _, ours = optimizer(steepest.optim.AdamW, count, size, dtype)
    _, foreach = optimizer(torch.optim.AdamW, count, size, dtype, foreach=True)
    race(ours.step, {"torch foreach": foreach.step}, op="adamw", case=f"{case}-foreach", rounds=9)
