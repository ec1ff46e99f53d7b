"""The minimax generator and the published coefficient tables, against each other and against dense sampling."""

import math

import numpy as np
import pytest
import torch

from steepest import schedules
from steepest.schedules import Schedule, minimax, named

EPS = np.finfo(float).eps


# What float64 may add to a sampled error: a step commits eps·Σ|c_k| ≤ 60 eps, what follows multiplies that by 1e5 at
# most, the steepest slope of any composite here (polar-express at σ = 1: f leaves (0, 2) within 7e-6).
ROUNDING = 60 * EPS * 1e5
# What a grid may miss: |f''| h²/8 at a peak. The relative spacing h is at most 5.4e-4 (60,000 points over 14 decades),
# f'' in log t below (2·degree)²/2 for degree 4 at an error below 1 and p = 1; a smaller p·degree is flatter.
SAMPLING = 32 * 5.4e-4**2 / 8


def dense(lower, upper=1.0, count=60_000):
    return np.unique(
        np.concatenate([np.geomspace(lower, upper, count), np.linspace(lower, upper, count)]).clip(lower, upper)
    )


def sampled_error(schedule):
    t = dense(schedule.lower, schedule.upper)
    assert t.size > 1e5 or schedule.lower == schedule.upper
    return np.abs(1 - schedule.apply(t)).max()


def test_minimax_reproduces_cans():
    """Polynomials of degree 2 for σ ≥ 1e-3, against the five listed steps of arXiv 2506.10935 (four decimals)."""
    computed = minimax(2, 1e-6, steps=5).coefficients
    np.testing.assert_allclose(computed, named("cans").coefficients, rtol=0, atol=0.5e-4 * (1 + 1e-9))


def test_minimax_with_cushion_reproduces_polar_express():
    """All eight listed steps of arXiv 2505.16932, to four significant digits: 5e-5 relative."""
    computed = minimax(2, 1e-6, steps=8, cushion=0.02407)
    np.testing.assert_allclose(computed.coefficients, named("polar-express", 8).coefficients, rtol=5e-5)
    assert computed.coefficients[7] == (1.875, -1.25, 0.375)


def test_minimax_with_the_papers_own_cushion_reproduces_polar_express_exactly():
    """The cushion behind 0.02407 has more digits; with it 1e-10, all that the paper's code converges to, is left."""
    computed = minimax(2, 1e-6, steps=8, cushion=0.02407327424182761).coefficients
    np.testing.assert_allclose(computed, named("polar-express", 8).coefficients, rtol=1e-10)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("lower", [1e-14, 1e-6, 0.3])
def test_certificate_is_the_dense_maximum(p, degree, lower):
    for steps in (1, 3):
        schedule = minimax(p, lower, degree=degree, steps=steps)
        assert schedule.error - SAMPLING <= sampled_error(schedule) <= schedule.error + ROUNDING


@pytest.mark.parametrize("name", schedules.names())
def test_certificate_of_named_sets_is_the_dense_maximum(name):
    schedule = named(name)
    assert schedule.error - SAMPLING <= sampled_error(schedule) <= schedule.error + ROUNDING


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_error_falls_with_every_step(p, degree):
    errors = [minimax(p, 1e-6, degree=degree, steps=k).error for k in range(1, 13)]
    for before, after in zip(errors, errors[1:]):
        assert after < before or before <= 100 * EPS


def test_every_step_equioscillates():
    """Chebyshev's criterion: degree + 2 extremes of equal size and alternating sign make the step the best one."""
    for p, degree, lower in [(2, 2, 1e-6), (4, 2, 1e-14), (4, 3, 1e-4), (1, 4, 1e-3)]:
        schedule = minimax(p, lower, degree=degree, steps=3)
        for row, (low, high) in zip(schedule.coefficients, schedule.intervals):
            s = np.unique(np.concatenate([np.geomspace(low, high, 100_000), np.linspace(low, high, 100_000)]))
            error = 1 - sum(c * s ** (1 + k * p) for k, c in enumerate(row))
            inner = (error[1:-1] - error[:-2]) * (error[2:] - error[1:-1]) <= 0
            extremes = error[np.concatenate([[True], inner, [True]])]
            extremes = extremes[np.concatenate([[True], np.diff(np.sign(extremes)) != 0])]
            assert len(extremes) == degree + 2
            np.testing.assert_allclose(np.abs(extremes), np.abs(extremes).max(), rtol=0, atol=SAMPLING)


@pytest.mark.parametrize(
    "p, degree, taylor",
    [(2, 1, (1.5, -0.5)), (2, 2, (1.875, -1.25, 0.375)), (4, 1, (1.25, -0.25)), (1, 2, (3.0, -3.0, 1.0))],
)
def test_converged_step_is_the_taylor_polynomial(p, degree, taylor):
    np.testing.assert_allclose(minimax(p, 1.0, degree=degree, steps=1).coefficients[0], taylor, rtol=4 * EPS)
    np.testing.assert_allclose(minimax(p, 0.5, degree=degree, steps=12).coefficients[-1], taylor, rtol=4 * EPS)


@pytest.mark.parametrize("p, lower, tol", [(2, 1e-6, 1e-2), (2, 1e-14, 1e-7), (4, 1e-6, 1e-2), (4, 1e-14, 1e-12)])
def test_tol_gives_the_fewest_steps_that_certify_it(p, lower, tol):
    schedule = minimax(p, lower, tol=tol)
    assert schedule.error <= tol
    assert minimax(p, lower, steps=schedule.steps - 1).error > tol
    assert schedule == minimax(p, lower, steps=schedule.steps)


def test_tol_out_of_reach_is_refused():
    with pytest.raises(ValueError, match=r"tol=1e-17 cannot be reached in float64; after \d+ steps"):
        minimax(3, 1e-3, tol=1e-17)


@pytest.mark.parametrize("p, degree", [(2, 2), (4, 2), (3, 1)])
def test_any_interval(p, degree):
    """The spectrum may be in [lower, upper]: as in [lower / upper, 1], with the first step rescaled."""
    wide, unit = (minimax(p, low, upper=up, degree=degree, steps=3) for low, up in ((2e-4, 200.0), (1e-6, 1.0)))
    assert (wide.lower, wide.upper) == (2e-4, 200.0)
    assert wide.coefficients[1:] == unit.coefficients[1:]
    assert wide.error == pytest.approx(unit.error, rel=1e-9)
    assert abs(sampled_error(wide) - wide.error) <= SAMPLING + ROUNDING
    t = dense(2e-4, 200.0, 1000)
    np.testing.assert_allclose(wide.apply(t), unit.apply(t / 200), rtol=1e-9)


@pytest.mark.parametrize("safety", [1.01, 1.05])
def test_safety_gives_slack_above_one(safety):
    plain, safe = minimax(2, 1e-6, steps=5), minimax(2, 1e-6, steps=5, safety=safety)
    assert plain.largest_safe < 1.001
    assert safe.largest_safe >= safety
    assert safe.slope < plain.slope
    # The first step is fitted to the same range, then dilated: c_k / safety^(1 + 2k).
    dilated = [c / safety ** (1 + 2 * k) for k, c in enumerate(plain.coefficients[0])]
    np.testing.assert_allclose(safe.coefficients[0], dilated, rtol=4 * EPS)
    assert minimax(2, 1e-6, steps=1, safety=safety).coefficients == minimax(2, 1e-6, steps=1).coefficients
    assert safe.error - SAMPLING <= sampled_error(safe) <= safe.error + ROUNDING


def test_safety_does_not_keep_tol_from_being_reached():
    assert minimax(2, 1e-6, tol=1e-10, safety=1.05).error <= 1e-10


@pytest.mark.parametrize("name", schedules.names())
def test_largest_safe_is_where_the_sign_or_size_goes_wrong(name):
    schedule = named(name)
    s = schedule.largest_safe
    inside = schedule.apply(np.linspace(1e-6, s * (1 - 1e-9), 200_001) ** 2)
    assert inside.min() > 0
    assert inside.max() < 2
    assert not 0 < schedule.apply((s * (1 + 1e-8)) ** 2) < 2


def test_published_properties_of_named_sets():
    """Output ranges and largest inputs as known of these sets (four digits)."""
    expected = {"keller": (484.9, 0.529, 1.264), "you": (492.7, 0.525, 1.325), "cans": (1049, 0.120, 1.000)}
    for name, (slope, error, largest) in expected.items():
        schedule = named(name)
        assert schedule.slope == pytest.approx(slope, rel=5e-4)
        assert schedule.error == pytest.approx(error, abs=5e-4)
        assert schedule.largest_safe == pytest.approx(largest, abs=5e-4)
    assert named("polar-express", 5).slope == pytest.approx(1026, rel=5e-4)
    assert named("polar-express", 5).error == pytest.approx(0.1236, abs=5e-5)
    assert named("polar-express-safe").largest_safe == pytest.approx(1.0109, abs=5e-5)
    assert named("deepseek-v4").error < 1e-3


@pytest.mark.parametrize("name", schedules.names())
def test_no_named_set_turns_a_singular_value_around(name):
    """Over the whole of (0, 1], for every number of steps: a negative value would reverse an update's direction."""
    schedule = named(name)
    for steps in range(1, schedule.steps + 1):
        assert schedule.truncate(steps).apply(dense(1e-16)).min() > 0


def test_keller_has_any_number_of_steps():
    assert named("keller").steps == 5
    assert named("keller", 12).coefficients == named("keller").coefficients[:1] * 12


@pytest.mark.parametrize("name, defined", [("you", 5), ("polar-express", 8), ("cans", 5), ("deepseek-v4", 10)])
def test_more_steps_than_defined_is_refused(name, defined):
    assert named(name).steps == defined
    with pytest.raises(ValueError, match=f"'{name}'.*asked for {defined + 1} steps.*defines {defined}"):
        named(name, defined + 1)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'aol'; known: keller, you, polar-express.*cans"):
        named("aol")


def test_every_named_set_has_a_source():
    assert all(schedules.source(name) for name in schedules.names())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"p": 0}, "p must be a positive integer"),
        ({"p": 2.0}, "p must be a positive integer"),
        ({"degree": 0}, "degree must be a positive integer"),
        ({"lower": 0.0}, "lower must be in"),
        ({"lower": 1.5}, "lower must be in"),
        ({"lower": math.nan}, "lower must be in"),
        ({"lower": 3.0, "upper": 2.0}, r"lower must be in \(0, 2\], got 3"),
        ({"upper": math.inf}, "upper must be positive and finite"),
        ({"steps": 0}, "steps must be a positive integer"),
        ({"steps": None}, "exactly one of steps and tol"),
        ({"tol": 0.1}, "exactly one of steps and tol"),
        ({"steps": None, "tol": 1.0}, "tol must be in"),
        ({"cushion": 1.0}, "cushion must be in"),
        ({"safety": 0.99}, "safety must be finite and at least 1"),
    ],
)
def test_minimax_refuses(change, message):
    arguments = {"p": 2, "lower": 1e-6, "steps": 3} | change
    with pytest.raises(ValueError, match=message):
        minimax(arguments.pop("p"), arguments.pop("lower"), **arguments)


@pytest.mark.parametrize(
    "rows", [(), ((1.0,),), ((1.0, 2.0), (1.0,)), ((1.0, math.inf),), ((-1.0, 2.0),), ((0.0, 1.0, 1.0),)]
)
def test_schedule_refuses(rows):
    with pytest.raises(ValueError, match="Schedule: coefficients"):
        Schedule(rows, 2, 1e-6)


def test_truncate_is_the_first_steps_with_their_own_certificate():
    full = minimax(2, 1e-6, steps=6)
    assert full.truncate(4).coefficients == minimax(2, 1e-6, steps=4).coefficients
    assert full.truncate(4).error == minimax(2, 1e-6, steps=4).error


def test_apply_takes_floats_arrays_and_tensors():
    schedule = named("polar-express")
    t = np.geomspace(1e-6, 1, 50)
    expected = schedule.apply(t)
    assert schedule.apply(float(t[7])) == pytest.approx(expected[7], rel=1e-13)
    tensor = schedule.apply(torch.tensor(t))
    assert tensor.dtype is torch.float64
    np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-13)
    assert schedule.apply(torch.tensor(t, dtype=torch.float32)).dtype is torch.float32


@pytest.mark.parametrize("p, degree", [(2, 2), (4, 2), (3, 3), (4, 1)])
def test_a_schedule_takes_a_matrix_to_its_inverse_root(p, degree):
    """Y ← Y·h(M), M ← M·h(M)^p on matrices: Y·A^(1/p) is 1 within the certificate on every eigenvector."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(-4, 0, 20, dtype=torch.float64)
    schedule = minimax(p, 1e-4, degree=degree, tol=1e-3)
    m, y = (basis * values) @ basis.T, torch.eye(20, dtype=torch.float64)
    for row in schedule.coefficients:
        h = sum(c * torch.linalg.matrix_power(m, k) for k, c in enumerate(row))
        y, m = y @ h, m @ torch.linalg.matrix_power(h, p)
    f = (basis.T @ y @ basis).diagonal() * values ** (1 / p)
    assert (1 - f).abs().max() <= 1e-3 + 1e-9
