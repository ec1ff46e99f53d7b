"""The ascent that 16-bit weights really make: gain <Δ, e> / <e, e>, with Δ what the forward pass sees; and x^a."""

from __future__ import annotations

import math

import pytest
import torch

import steepest

SAMPLES, RHO = 1 << 20, 0.05


def gain(count: float, mode: str) -> float:
    """For a model of `count` parameters, weights N(0, 0.02²) and gradients N(0, 1).

    SAMPLES of them are drawn; rho is scaled so that an element moves as far as in the whole model: rho / ‖g‖ is
    0.05 / sqrt(count) there.
    """
    generator = torch.Generator().manual_seed(int(count))
    w = 0.02 * torch.randn(SAMPLES, generator=generator)
    g = torch.randn(SAMPLES, generator=generator)
    rho = RHO / math.sqrt(count) * math.sqrt(SAMPLES)
    e = rho * g.double() / g.double().norm()
    p = w.bfloat16()
    before = p.double()
    if mode == "master":
        steepest.perturb_([p], [g.bfloat16()], None, rho=rho, masters=[w])
    else:
        stochastic = mode == "stochastic"
        steepest.perturb_([p], [g.bfloat16()], [torch.empty_like(p)], rho=rho, stochastic_rounding=stochastic, seed=3)
    return ((p.double() - before) * e).sum().item() / e.square().sum().item()


@pytest.mark.parametrize("mode", ["master", "stochastic"])
@pytest.mark.parametrize("count", [1e6, 1e8, 1e9])
def test_bfloat16_weights_make_the_whole_ascent(count, mode):
    assert abs(gain(count, mode) - 1) <= 0.05


@pytest.mark.parametrize(("count", "expected"), [(1e6, 0.88), (1e8, 0.14), (1e9, 0.05)])
def test_rounding_to_nearest_loses_it(count, expected):
    """What the modes above are for."""
    assert gain(count, "nearest") == pytest.approx(expected, abs=0.03)


def test_random_numbers_depend_on_seed_step_and_element_alone():
    w, g = torch.randn(1000).bfloat16(), torch.randn(1000).bfloat16()

    def moved(parts, **options):
        params, grads = [x.clone() for x in w.split(parts)], list(g.split(parts))
        steepest.perturb_(params, grads, [torch.empty_like(x) for x in params], stochastic_rounding=True, **options)
        return torch.cat(params)

    first = moved([1000], seed=1)
    assert torch.equal(first, moved([300, 700], seed=1))
    assert not torch.equal(first, moved([1000], seed=2)) and not torch.equal(first, moved([1000], seed=1, step=2))


@pytest.mark.parametrize("norm", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_with_masters_the_weights_are_the_rounded_sum_and_masters_stay(dtype, norm):
    generator = torch.Generator().manual_seed(0)
    masters = [torch.randn(n, generator=generator) for n in (5, 0, 700)]
    grads = [torch.randn(m.shape, generator=generator).to(dtype) for m in masters]
    grads[0][3], grads[2][100] = 8, -8  # in the 1-norm two of them share the ascent
    params, before = [m.to(dtype) for m in masters], [m.clone() for m in masters]
    twins = [m.clone() for m in masters]
    steepest.perturb_(params, grads, None, masters=masters, rho=0.5, p=norm)
    steepest.perturb_(twins, [g.float() for g in grads], [torch.empty_like(m) for m in masters], rho=0.5, p=norm)
    for p, m, b, twin in zip(params, masters, before, twins):
        assert torch.equal(m, b) and torch.equal(p, twin.to(dtype))
    steepest.restore_(params, masters)
    assert all(torch.equal(p, m.to(dtype)) for p, m in zip(params, masters))


@pytest.mark.parametrize("p", [1.01, 1.2, 1.5, 3.0, 5.0, 100.0])
def test_powers_are_rounded_once(p):
    """|x|^(q-1) over all magnitudes, through the op: with one element of size 1 and norm ~ 1, e is the power itself.

    Its error is a rounding of the coefficient and one of the product, (q - 1) times each, and one of the power.
    """
    q = p / (p - 1)
    exponents = torch.linspace(0, -30, 4001, dtype=torch.float64)
    g = torch.exp2(exponents).float()
    w, backup = torch.zeros_like(g), torch.empty_like(g)
    found = steepest.perturb_([w], [g], [backup], rho=1.0, p=p)
    exact = (g.double() / found.norm).pow(q - 1)
    relative = ((w.double() - exact).abs() / exact)[exact > 2.0**-125]
    assert relative.numel() > 50 and float(relative.max()) <= (2 * (q - 1) + 1) * 1.001 * 2.0**-24
