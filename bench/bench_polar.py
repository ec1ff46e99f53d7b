"""The polar factor and Muon's step against plain float32 Newton-Schulz in torch and torch.optim.Muon."""

from __future__ import annotations

import pytest
import torch

import steepest
from steepest.matrix.polar import plan


def newton_schulz(x, coefficients):
    """The usual five lines: normalise, then X <- (a I + b A + c A^2) X with A = X X^T, in x's dtype."""
    # The norm in float64: torch's float32 sum over these sizes is off by up to 3e-3, which would be most of the error.
    x = x / (x.norm(dtype=torch.float64).float() * (1 + 2**-10))
    if x.shape[0] > x.shape[1]:
        return newton_schulz_steps(x.mT, coefficients).mT
    return newton_schulz_steps(x, coefficients)


def newton_schulz_steps(x, coefficients):
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


@pytest.mark.parametrize("shape", [(768, 3072), (1024, 4096), (1024, 1024), (3072, 768)])
def bench_polar(race, shape):
    x = torch.randn(shape)
    schedule = steepest.schedules.named("polar-express", 5)
    exact = steepest.reference.polar(x.double())
    for result in (steepest.polar(x), newton_schulz(x, schedule.coefficients)):
        assert (result.double() - exact).norm() / exact.norm() <= 1e-5
    race(
        lambda: steepest.polar(x),
        {"plain Newton-Schulz": lambda: newton_schulz(x, schedule.coefficients)},
        op="polar", case="x".join(map(str, shape)), rounds=9, flops=plan(shape, x.dtype, x.device).flops,
    )  # fmt: skip


def bench_polar_batch(race):
    x = torch.randn(256, 64, 64)
    rows = steepest.schedules.named("polar-express", 5).coefficients
    race(
        lambda: steepest.polar(x),
        {"loop of plain Newton-Schulz": lambda: [newton_schulz(y, rows) for y in x]},
        op="polar", case="256x64x64", rounds=9, flops=plan(x.shape, x.dtype, x.device).flops,
    )  # fmt: skip


def bench_muon(race):
    """One 768 x 3072 matrix.  torch.optim.Muon multiplies in bfloat16: on a CPU without bfloat16 units (or with
    ONEDNN_MAX_CPU_ISA=AVX2 set, which makes torch behave as on one) a step takes tens of seconds."""

    def make(cls, **options):
        torch.manual_seed(0)
        p = torch.randn(768, 3072, requires_grad=True)
        p.grad = torch.randn(768, 3072)
        return p, cls([p], lr=0.02, weight_decay=0.1, **options)

    p, ours = make(steepest.optim.Muon, schedule="keller")
    q, theirs = make(torch.optim.Muon)
    w = p.detach().clone()
    ours.step()
    theirs.step()
    # The same polynomial; torch's in bfloat16 (unit 2^-8), five steps of it.
    assert (p - q).norm() <= 0.1 * (p - w).norm()
    race(ours.step, {"torch.optim.Muon": theirs.step}, op="muon", case="768x3072", rounds=5)
