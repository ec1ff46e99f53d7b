"""Defects that other packages were seen to have (Muon and its relatives, 2025 and 2026); each test fails where one is.

Where a defect is one of coefficients, the coefficients are here: the certificate must find them out.
"""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from polar_rounding import rounding_bound

import steepest
from steepest import schedules
from steepest.conformance import zoo
from steepest.matrix.norm_bounds import NORMS
from steepest.matrix.polar import normalised, plan
from steepest.schedules import NORM_MARGIN, Schedule, named

# Made for an input preconditioned by its row sums, and used with the Frobenius norm: 4 steps turn the largest around.
AOL = ((4.0098, -7.0585, 2.4635), (3.4585, -5.5479, 2.5959), (2.7573, -3.2939, 1.4254), (2.7215, -3.0494, 1.3169))


pytestmark = pytest.mark.usefixtures("one_thread")


# --- an update that points the other way ------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [AOL, (*AOL, AOL[0])], ids=["4 steps", "cycled to 5"])
def test_coefficients_that_turn_singular_values_around_are_found_out_and_refused(rows):
    schedule = Schedule(rows, 2, 1e-6, 1.0, "aol")
    assert schedule.apply(np.linspace(0.05, 1, 1000) ** 2).min() < -0.5
    assert schedule.error > 1 and schedule.largest_safe < 1
    with pytest.raises(ValueError, match=r"singular value in \[0.001, 1\] to zero or below.*'aol'.*error [12]\."):
        steepest.polar(torch.randn(4, 4), schedule=schedule)
    with pytest.raises(ValueError, match="'aol'"):
        steepest.optim.Muon([torch.zeros(4, 4, requires_grad=True)], schedule=schedule)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", [*schedules.names(), "tuned", "minimax"])
def test_every_schedule_keeps_the_direction_of_the_largest_singular_value(name, norm):
    """Rank one has it at the very end of the interval, where steep schedules are closest to turning."""
    for x in (torch.outer(torch.rand(9) + 0.1, torch.randn(14)), zoo.matrix("clustered", 20, 12, seed=1)[0]):
        steps = named(name).steps if name in schedules.names() else 5
        y = steepest.polar(x, schedule=name, steps=steps, norm=norm)
        u, _, vt = torch.linalg.svd(x)
        gain = u[:, 0] @ y @ vt[0]
        assert 0.4 < gain < 1.6
        assert (x * y).sum() > 0.4 * torch.linalg.svdvals(x)[0]


# --- coefficient lists and step counts that do not fit ----------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in schedules.names() if n != "keller"])
def test_more_steps_than_a_set_defines_are_never_cycled_through(name):
    """Cycled, "you" with 6 steps has its median at .12 ("quintic" of that package)."""
    steps = named(name).steps + 1
    message = f"asked for {steps} steps, it defines {steps - 1}"
    for refused in (
        lambda: named(name, steps),
        lambda: steepest.polar(torch.ones(3, 3), schedule=name, steps=steps),
        lambda: steepest.optim.Muon([torch.ones(3, 3, requires_grad=True)], schedule=name, steps=steps),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


def test_as_many_steps_run_as_were_asked_for():
    """Fewer coefficients than steps passed a check that was written the wrong way round, and ran too few."""
    x = zoo.matrix("exponential", 12, 20, seed=0, dtype=torch.float64)[0]
    for steps in range(1, 9):
        found = torch.linalg.svdvals(steepest.polar(x, steps=steps))
        nu = x.norm() * (1 + NORM_MARGIN)
        exact = named("polar-express", steps).apply((torch.linalg.svdvals(x) / nu) ** 2)
        torch.testing.assert_close(found.sort().values, exact.sort().values, rtol=1e-9, atol=0)


# --- aliasing and what must not be modified ---------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_neither_gradient_nor_momentum_is_normalised_in_place(dtype, nesterov):
    """A cast to the dtype that a tensor already has is the tensor itself, and dividing that by its norm changes it."""
    p = torch.randn(6, 10, dtype=dtype).requires_grad_()
    optimizer = steepest.optim.Muon([p], lr=0.1, momentum=0.9, nesterov=nesterov)
    expected = torch.zeros(6, 10, dtype=dtype)
    for _ in range(3):
        p.grad = 100 * torch.randn(6, 10, dtype=dtype)
        kept = p.grad.clone()
        optimizer.step()
        expected = torch.lerp(expected, kept, 0.1)
        assert torch.equal(p.grad, kept)
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], expected)


@pytest.mark.parametrize("options", [{}, {"norm": "schatten8"}, {"dtype": torch.float64}, {"steps": 1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (3, 4, 4)])
def test_polar_neither_changes_nor_returns_its_input(shape, dtype, options):
    x = torch.randn(shape).to(dtype)
    kept = x.clone()
    y = steepest.polar(x, **options)
    y.fill_(7)
    assert torch.equal(x, kept)


# --- scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale, factor", [("keller", 1.0), ("spectral", (8 / 27) ** 0.5),
                                           ("match-adamw-rms", 0.2 * 27**0.5)])  # fmt: skip
def test_convolution_kernels_are_scaled_by_their_matrix_not_by_their_window(scale, factor):
    """8 × 3 × 3 × 3 is the matrix 8 × 27; the last two dimensions, 3 × 3, would give other factors."""
    p = torch.randn(8, 3, 3, 3).requires_grad_()
    before, grad = p.detach().clone(), torch.randn(8, 3, 3, 3)
    p.grad = grad
    options = dict(lr=0.5, momentum=0.0, weight_decay=0.0, scale=scale, matrices="flatten")
    optimizer = steepest.optim.Muon([p], **options)
    assert [a.algorithm for a in optimizer.split] == ["muon"]
    optimizer.step()
    expected = before - 0.5 * factor * steepest.polar(grad.reshape(8, 27)).reshape(8, 3, 3, 3)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-6)


def test_lr_scales_are_what_their_names_say():
    """One package has them the wrong way round."""
    from steepest.optim.muon import SCALES

    for out, inner in ((64, 16), (16, 64), (5, 5)):
        assert SCALES["keller"](out, inner) == math.sqrt(max(1, out / inner))
        assert SCALES["match-adamw-rms"](out, inner) == 0.2 * math.sqrt(max(out, inner))
        assert SCALES["spectral"](out, inner) == math.sqrt(out / inner)


# --- ranges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-9, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_is_taken_before_the_cast_to_half_precision(dtype, scale):
    """Gradients below 6e-8 would become zero in float16, and those above 65504 infinite."""
    x = torch.randn(2, 20, 30)
    y = normalised(scale * x, dtype)
    # The scale is exact up to one rounding of each element, which can change the rounding to half: one unit.
    assert (y.float() - normalised(x, dtype).float()).abs().max() <= torch.finfo(dtype).eps * y.abs().max()
    assert y.float().norm() > 1.3


# --- work that is silently not done -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "gram"])
def test_the_orthogonalisation_is_not_skipped(form):
    """One package skipped it under one setting, and its test allowed a relative error of .4."""
    p = torch.zeros(16, 64, requires_grad=True)
    p.grad = zoo.matrix("clustered", 16, 64, seed=2)[0]
    steepest.optim.Muon([p], lr=1.0, momentum=0.0, weight_decay=0.0, steps=8, schedule="polar-express").step()
    assert (torch.linalg.svdvals(p.detach()) - 1).abs().max() < 1e-4
    y = steepest.polar(p.grad, steps=8, form=form)
    assert (torch.linalg.svdvals(y) - 1).abs().max() < 1e-4


def test_the_first_call_gives_what_later_ones_give():
    """A kernel whose first run was wrong was hidden by warming it up in its tests: caches are emptied here instead."""
    from steepest.matrix import polar as module

    x = torch.randn(3, 33, 50)
    module._plan.cache_clear()
    schedules._minimax.cache_clear()
    first = steepest.polar(x, schedule="minimax")
    assert torch.equal(first, steepest.polar(x, schedule="minimax"))


def test_a_backend_that_cannot_run_is_never_replaced_in_silence():
    with pytest.raises(ValueError, match="backend 'triton' needs a CUDA tensor"):
        steepest.polar(torch.ones(3, 3), backend="triton")


# --- agreement with torch.optim.Muon ----------------------------------------------------------------------------------


def float64_torch_muon(monkeypatch):
    """torch.optim.Muon with its Newton-Schulz iteration in float64 instead of bfloat16, from its own source."""
    from torch.optim import _muon

    source = inspect.getsource(_muon._zeropower_via_newtonschulz)
    assert source.count(".bfloat16()") == 1
    scope = dict(vars(_muon))
    exec(source.replace(".bfloat16()", ".double().clone()"), scope)
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", scope["_zeropower_via_newtonschulz"])
    return torch.optim.Muon


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_hundred_steps_with_kellers_coefficients_follow_torch_muon_in_float64(monkeypatch, nesterov):
    """Gradients are the same on both sides, so errors of a step are not fed back and their bounds add up:

    polar      bound of polar_rounding on the actual update, and what the momentum's own rounding, a relative 2^-23 of
               the largest buffer so far, becomes: times `slope` (X ↦ U f(S) Vᵀ has no larger derivative, f being
               steepest at 0: |f'| ≤ slope, and |f(a) - f(b)| ≤ slope |a - b|, |f(a) + f(b)| ≤ slope |a + b|)
    norm       torch divides by ‖X‖_F, ours by 1 + 2^-10 times that: ‖f(S / ν) - f(S / (1 + 2^-10) ν)‖, exactly
    weights    three roundings of W, each 2^-24 ‖W‖
    """
    theirs = float64_torch_muon(monkeypatch)
    options = dict(lr=0.02, momentum=0.95, nesterov=nesterov, weight_decay=0.1)
    w = torch.randn(24, 16, dtype=torch.float64)
    p, q = w.clone().requires_grad_(), w.clone().float().requires_grad_()
    ours, theirs = steepest.optim.Muon([q], schedule="keller", steps=5, **options), theirs([p], **options)
    schedule, todo = named("keller", 5), plan((24, 16), schedule="keller")
    dense = schedule.apply(np.linspace(0, 1, 100_001) ** 2)
    assert abs(np.diff(dense)).max() * 1e5 <= schedule.slope  # steepest at 0, as the derivation says
    bound = 2.0**-24 * w.norm().item()  # of the float32 start
    largest, momentum = 0.0, torch.zeros_like(w)
    start = torch.randn(24, 16, dtype=torch.float64)
    for step in range(100):
        p.grad = start + torch.randn(24, 16, dtype=torch.float64) * (1 + step / 20)
        p.grad = p.grad.float().double()
        q.grad = p.grad.float()
        momentum = torch.lerp(momentum, p.grad, 0.05)
        update = torch.lerp(p.grad, momentum, 0.95) if nesterov else momentum
        nu, s = update.norm(), torch.linalg.svdvals(update)
        largest = max(largest, momentum.norm().item(), p.grad.norm().item())
        difference = (schedule.apply((s / nu) ** 2) - schedule.apply((s / nu / (1 + NORM_MARGIN)) ** 2)).norm()
        carried = schedule.slope * 2.0**-23 * largest / (0.05 * nu)  # 0.05: the buffer's rounding stays for 20 steps
        factor = rounding_bound(todo, update.float()) + difference + carried
        bound += 0.02 * math.sqrt(24 / 16) * factor.item() + 3 * 2.0**-24 * p.detach().norm().item()
        ours.step()
        theirs.step()
    away = (p.detach() - q.detach().double()).norm().item()
    assert away <= bound
    assert bound < 0.05 * (p.detach() - w).norm().item()  # so tight that 5 % of the way would be seen
