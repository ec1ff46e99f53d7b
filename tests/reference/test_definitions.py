"""The plain references against closed forms and by hand: what everything else is compared with."""

from __future__ import annotations

import math

import pytest
import torch

from steepest.reference import dynamics, normalize, rules, sam
from steepest.reference.roots import coupled_newton, effective_dimension, inverse_root

F64 = torch.float64
U = 2.0**-53
# No value below comes out of more than 32 roundings of numbers of its own size, each by at most U.
CLOSE = dict(rtol=32 * U, atol=0)


def tensor(*values):
    return torch.tensor(values, dtype=F64)


# --- dynamics --------------------------------------------------------------------------------------------------------


def test_one_runge_kutta_step_integrates_cubics_exactly():
    path = dynamics.runge_kutta(lambda t, x: 4 * t**3, 1.0, tensor(0, 2, 3), substeps=1)
    torch.testing.assert_close(path, tensor(1, 17, 82), **CLOSE)
    # And exp to fourth order: 1 + h + h²/2 + h³/6 + h⁴/24.
    assert dynamics.runge_kutta(lambda t, x: x, 1.0, tensor(0, 1), substeps=1)[1] == pytest.approx(65 / 24, rel=32 * U)


def test_dimensions_of_zero_are_zero():
    zero = torch.zeros(2, 3, 4)
    assert dynamics.gradient_dimension(zero).tolist() == dynamics.stable_rank(zero).tolist() == [0, 0]
    assert effective_dimension(torch.zeros(3, 3, dtype=F64)) == 0


# --- inverse roots ---------------------------------------------------------------------------------------------------


def test_effective_dimension_is_of_the_symmetric_part_at_any_scale():
    a = tensor([3, 1], [5, 1])
    symmetric = (a + a.mT) / 2
    expected = symmetric.trace() ** 2 / symmetric.square().sum()
    for scale in (1, 1e200, 1e-200):
        torch.testing.assert_close(effective_dimension(a * scale), expected, **CLOSE)


def test_a_root_of_what_is_not_positive_is_nan():
    assert inverse_root(torch.diag(tensor(0, 1)), ridge=0.0).isnan().any()
    assert inverse_root(tensor([[16]])[0], ridge=65.0, absolute=True).item() == pytest.approx(1 / 3, rel=32 * U)


def test_the_first_step_of_coupled_newton():
    p, a, ridge = 4, tensor([90, 20], [20, 30]), 0.01
    shifted = a + ridge * torch.linalg.eigvalsh(a).max() * torch.eye(2, dtype=F64)
    z = (p + 1) / (2 * shifted.square().sum().sqrt())
    expected = z ** (1 / p) * ((1 + 1 / p) * torch.eye(2, dtype=F64) - z * shifted / p)
    x, products = coupled_newton(a, p, ridge=ridge, iterations=1)
    torch.testing.assert_close(x, expected, **CLOSE)
    assert products == 4


def test_coupled_newton_does_nothing_to_what_is_solved():
    # ‖I‖_F = 2, so that z = 1 and M = I.
    x, products = coupled_newton(torch.eye(4, dtype=F64), 3, ridge=0.0, tolerance=0.0)
    assert products == 0 and torch.equal(x, torch.eye(4, dtype=F64))


def test_coupled_newton_gives_up_where_its_error_grows():
    """M = diag(2.5, -0.1): max |M - I| is 1.5, 1.26, then 1.79, 1.4 times as much."""
    a = torch.diag(tensor(1, -0.04))
    x, products = coupled_newton(a, 4, ridge=0.0)
    one_step, _ = coupled_newton(a, 4, ridge=0.0, iterations=1)
    assert products == 8 and torch.equal(x, one_step)


# --- rules and normalisation -----------------------------------------------------------------------------------------


def test_the_soft_threshold_keeps_the_sign_of_zero():
    p = tensor(0.5, -0.5, 0.25, -0.25, 0.75, -0.75)
    out = rules.shrunk(p, p, tensor, lr=1.0, l1=0.5)
    assert out.tolist() == [0, 0, 0, 0, 0.25, -0.25]
    assert out.signbit().tolist() == [False, True, False, True, False, True]


def test_a_path_shorter_than_one_is_normalised_too():
    p, g = tensor(1, 2), tensor(0.3, 0.4)
    assert normalize.path_normalize_([p], [g]).item() == 0.5
    torch.testing.assert_close(p, tensor(2, 4), **CLOSE)


# --- sharpness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [1.0, 1.5, 2.0, 3.0])
def test_norms_of_zero_nothing_and_infinity(q):
    assert sam.norm([torch.zeros(3)], q) == sam.norm([], q) == 0
    assert sam.norm([tensor(1, math.inf)], q) == math.inf
    assert sam.norm([tensor(3e200), tensor(-4e200)], 2.0).item() == pytest.approx(5e200, rel=32 * U)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, math.inf])
def test_no_ascent_along_zero_and_none_along_infinity(p):
    w = [tensor(1, 2)]
    assert sam.ascent(w, [tensor(0, 0)], p=p)[0].tolist() == [0, 0]
    if p != math.inf:
        assert sam.ascent(w, [tensor(1, math.inf)], p=p)[0].tolist() == [0, 0]
    # Of p = inf every element takes its sign; a NaN has none.
    assert sam.ascent(w, [tensor(math.nan, -3)], rho=0.5, p=math.inf)[0].tolist() == [0, -0.5]


class Quadratic:
    """½ wᵀ H w over two tensors."""

    hessian = tensor([4, 1, 0], [1, 3, -2], [0, -2, 5])

    def gradient(self, params):
        g = self.hessian @ torch.cat(params)
        return [g[:2], g[2:]]


def test_gradient_norm_penalty_of_a_quadratic():
    params, weight, radius = [tensor(1, -2), tensor(0.5)], 0.3, 0.05
    g = torch.cat(Quadratic().gradient(params))
    for squared, factor in ((False, 1 / g.norm()), (True, 2.0)):
        expected = g + weight * factor * Quadratic.hessian @ g
        got = sam.penalty_gradient(Quadratic().gradient, params, weight=weight, squared=squared, radius=radius)
        # The difference of two gradients of terms up to 12, each of 8 roundings, is divided by the radius.
        bound = 2 * 8 * U * 12 * weight / radius * (2 * g.norm().item() if squared else 1)
        torch.testing.assert_close(torch.cat(got), expected, rtol=32 * U, atol=bound)


def test_hutchinson_over_all_signs_is_exact():
    signs = [[tensor(1, a), tensor(b)] for a in (1, -1) for b in (1, -1)]
    params, radius = [tensor(1, -2), tensor(0.5)], 1e-3
    trace, diagonal = sam.hessian_trace_and_diagonal(Quadratic().gradient, params, signs, radius=radius)
    bound = 8 * U * 12 / radius  # as above, of a central difference
    torch.testing.assert_close(torch.cat(diagonal), tensor(4, 3, 5), rtol=0, atol=bound)
    assert abs(trace.item() - 12) <= 3 * bound
