"""The polar factor against plain Newton-Schulz in torch, with the same polynomials."""

from __future__ import annotations

import pytest
import torch
from problems import accuracy, newton_schulz, polar_costs

import steepest
from steepest.matrix.polar import UNIT_ROUNDOFF, plan

QUICK = {"128x128": (128, 128), "512x512": (512, 512), "256x1024": (256, 1024), "64x64x64": (64, 64, 64)}
FULL = {
    "128x128": (128, 128),
    "1024x1024": (1024, 1024),
    "768x3072": (768, 3072),
    "3072x768": (3072, 768),
    "1024x4096": (1024, 4096),
    "256x64x64": (256, 64, 64),
}
HALF = {
    f"{m}x{n}-{name}": (m, n, dtype)
    for m, n in ((768, 3072), (4096, 4096))
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16))
}


def polar_race(race, x, peer: str):
    costs = polar_costs(x)
    working = plan(x.shape, x.dtype, x.device).dtype
    for name, function, dtype in (("ours", steepest.polar, working), (peer, newton_schulz, x.dtype)):
        error, bound = accuracy(function(x), x, UNIT_ROUNDOFF[dtype])
        assert error <= bound, f"{name} is {error:g} away from float64, expected at most {bound:g}"
    case = f"{' x '.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')}"
    race(lambda: steepest.polar(x), {peer: lambda: newton_schulz(x)}, op="polar", case=case, dtype=working, **costs)


@pytest.mark.cases(quick=QUICK, full=FULL)
def bench_polar(race, device, case):
    polar_race(race, torch.randn(case, device=device), "plain Newton-Schulz")


@pytest.mark.gpu
@pytest.mark.cases(quick=HALF, full=HALF)
def bench_polar_half(race, device, case):
    """16-bit matrices, which only a GPU multiplies fast: ours works in float16, the peer in x's dtype."""
    m, n, dtype = case
    polar_race(race, torch.randn(m, n, device=device).to(dtype), "plain Newton-Schulz")
