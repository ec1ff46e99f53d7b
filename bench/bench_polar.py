"""The polar factor against plain Newton-Schulz in torch, with the same polynomials."""

from __future__ import annotations

import pytest
import torch
from problems import distance, newton_schulz, polar_costs, polar_gate

import steepest
from steepest.matrix.polar import plan

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


def polar_race(race, x):
    """The peer computes the same polynomials in x's dtype, which is the working precision on a CPU."""
    todo = plan(x.shape, x.dtype, x.device)

    def peer():
        return newton_schulz(x, todo.schedule, x.dtype)

    peers = {"plain Newton-Schulz": peer}
    if x.dim() == 3:
        peers["Python loop"] = lambda: [newton_schulz(matrix, todo.schedule, x.dtype) for matrix in x]
    exact, bound = polar_gate(x, todo.schedule, todo.dtype)
    error = distance(steepest.polar(x), exact)
    assert error <= bound, f"ours is {error:g} away from float64, expected at most {bound:g}"
    case = f"{' x '.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')}"
    race(
        lambda: steepest.polar(x), peers, op="polar", case=case, dtype=todo.dtype,
        errors={"ours": error, "plain Newton-Schulz": distance(peer(), exact)}, **polar_costs(x),
    )  # fmt: skip


@pytest.mark.cases(quick=QUICK, full=FULL)
def bench_polar(race, device, case):
    polar_race(race, torch.randn(case, device=device))


@pytest.mark.gpu
@pytest.mark.cases(quick=HALF, full=HALF)
def bench_polar_half(race, device, case):
    """16-bit matrices, which only a GPU multiplies fast: ours works in float16, the peer in x's dtype."""
    m, n, dtype = case
    polar_race(race, torch.randn(m, n, device=device).to(dtype))
