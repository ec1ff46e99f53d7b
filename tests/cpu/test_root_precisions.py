"""Roots with products of split operands, as tensor cores compute them, emulated: each precision as planned."""

from __future__ import annotations

import pytest
import torch

from steepest import reference
from steepest.conformance.cases.roots import definite
from steepest.matrix.root_plan import RIDGE_FLOOR, UNIT, plan
from steepest.matrix.roots import execute, inverse_root
from steepest.matrix.verbs import TorchVerbs


def rounded(x, bits):
    """float32 to so many significant bits, to nearest."""
    drop = 24 - bits
    raw = x.view(torch.int32)
    return ((raw + (1 << (drop - 1))) & ~((1 << drop) - 1)).view(torch.float32)


class SplitVerbs(TorchVerbs):
    """Every operand is hi + lo of so many bits each; hi hi + hi lo + lo hi, or hi hi alone, summed in float32."""

    def __init__(self, precision):
        self.bits, self.parts = {"tf32x3": (11, 3), "bf16x3": (8, 3), "tf32": (11, 1)}[precision]

    def product(self, a, b):
        high = [rounded(x, self.bits) for x in (a, b)]
        out = high[0] @ high[1]
        if self.parts == 3:
            low = [rounded(x - h, self.bits) for x, h in zip((a, b), high)]
            out = out + (high[0] @ low[1] + low[0] @ high[1])
        return out

    def symmetric_product(self, a, b, *, alpha=1.0, beta=0.0, c=None, diagonal=0.0):
        out = alpha * self.product(a, b)
        return (out if c is None else out + beta * c).tril() + (out if c is None else out + beta * c).tril(-1).mT

    def commuting_product(self, a, b, *, beta=0.0, c=None):
        out = self.product(a, b)
        return out if c is None else out + beta * c


@pytest.mark.parametrize("precision", ["tf32x3", "bf16x3", "tf32"])
@pytest.mark.parametrize("spectrum", ["statistic", "log-uniform 1e-6", "rank deficient"])
def test_at_its_floor_a_precision_gives_roots_within_the_published_bound(spectrum, precision):
    """certificate + 3 kappa u / p, as conformance.root_bounds derives it, with the unit that the planner states."""
    a = definite(spectrum, 96, seed=1)
    ridge = RIDGE_FLOOR[precision]
    todo = plan(a.shape, device="cuda", ridge=ridge, method="composite", precision=precision)
    assert todo.precision == precision
    x, status = execute(a[None], todo, ridge, False, SplitVerbs(precision))
    assert status.ok.all()
    exact = reference.inverse_root(a.double(), ridge=ridge, scale=status.scale[0].double())
    error = ((x[0] - exact).norm() / exact.norm()).item()
    assert error <= todo.schedule.error + 3 * UNIT[precision] / (4 * ridge)


def test_products_are_as_exact_as_the_unit_says():
    torch.manual_seed(0)
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    for precision in ("tf32x3", "bf16x3", "tf32"):
        worst = ((SplitVerbs(precision).product(a, b) - exact).abs() / size).max().item()
        assert 0.001 * UNIT[precision] < worst < UNIT[precision]


def test_a_ridge_below_the_floor_is_refused_and_the_cpu_has_none_of_these():
    with pytest.raises(ValueError, match=r"ridge 1e-06 is below 1e-05, the least .* in bf16x3"):
        plan((8, 8), device="cuda", ridge=1e-6, method="composite", precision="bf16x3")
    assert plan((8, 8), device="cuda", ridge=1e-5, precision="bf16x3").method == "composite"
    assert plan((8, 8), device="cuda", ridge=1e-6, precision="bf16x3").method == "eigh"
    with pytest.raises(ValueError, match="the CPU multiplies in float32 or float64, got precision='bf16x3'"):
        inverse_root(torch.eye(3), precision="bf16x3")
