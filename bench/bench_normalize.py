"""Weight normalisation with its gradient, against torch's fused kernel."""

from __future__ import annotations

import pytest
import torch

import steepest
from steepest import reference

SHAPES = {"1024x1024": (1024, 1024), "768x3072": (768, 3072), "256x256x3x3": (256, 256, 3, 3)}


@pytest.mark.cases(quick={name: SHAPES[name] for name in list(SHAPES)[:1]}, full=SHAPES)
def bench_weight_norm(race, device, case):
    generator = torch.Generator(device).manual_seed(0)
    v = torch.randn(case, generator=generator, device=device, requires_grad=True)
    g = torch.rand(case[0], *[1] * (len(case) - 1), generator=generator, device=device, requires_grad=True)
    upstream = torch.randn(case, generator=generator, device=device)

    def both_ways(function):
        def run():
            v.grad = g.grad = None
            function(v, g, 0).backward(upstream)

        return run

    exact = reference.weight_norm(v.detach().double(), g.detach().double())
    for function in (steepest.weight_norm, torch._weight_norm):
        assert (function(v, g, 0).double() - exact).abs().max() < 1e-6 * exact.abs().max()
    elements = v.numel()
    race(
        both_ways(steepest.weight_norm), {"torch fused": both_ways(torch._weight_norm)}, op="weight_norm",
        case=f"{' x '.join(map(str, case))} float32, with gradient", nbytes=20 * elements, flops=9 * elements,
        elements=elements,
    )  # fmt: skip
