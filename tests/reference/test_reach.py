"""How far a step keeps numbers positive and below a limit: bisection against the roots of the polynomial itself."""

from __future__ import annotations

import numpy as np
import pytest

from steepest import schedules


def first_crossing(coefficients, p: int, limit: float) -> float:
    """The smallest s > 0 where s h(s^p) is 0 or the limit."""
    q = np.zeros(2 + (len(coefficients) - 1) * p)
    q[1::p] = coefficients
    crossings = []
    for level in (0.0, limit):
        roots = np.roots((q - level * (np.arange(len(q)) == 0))[::-1])
        crossings += roots.real[(np.abs(roots.imag) < 1e-9 * np.abs(roots)) & (roots.real > 1e-9)].tolist()
    return min(crossings)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_the_reach_ends_where_the_polynomial_first_leaves(p):
    numbers = np.random.default_rng(p)
    turned = 0
    for _ in range(300):
        scale, limit = 10.0 ** numbers.uniform(-2, 2), numbers.uniform(0.1, 5)
        size = numbers.integers(2, 5)
        row = numbers.normal(size=size) * scale ** -(1.0 + p * np.arange(size))
        row[0] = abs(row[0])
        expected = first_crossing(row, p, limit)
        found = schedules._reach(tuple(row), p, limit)
        slope = sum((1 + k * p) * c * expected ** (k * p) for k, c in enumerate(row))
        # Where rounding of the terms moves the crossing, of a polynomial that is evaluated in float64; its roots come
        # from a companion matrix, whose eigenvalues are those of coefficients off by as much for each of its rows.
        terms = limit + sum(abs(c) * expected ** (1 + k * p) for k, c in enumerate(row))
        bound = 32 * (1 + p * size) ** 2 * 2.0**-53 * terms / abs(slope)
        if bound > 1e-3 * expected:
            continue  # it only just touches
        assert abs(found - expected) <= bound, (row, limit)
        turned += found > min((t for t in schedules._stationary(tuple(row), p) if t > 0), default=np.inf) ** (1 / p)
    assert turned > 20  # most cases end before the first turn


def test_a_slow_step_reaches_far():
    assert schedules._reach((1e-3, 0.0), 2, 2.0) == pytest.approx(2000)
    assert schedules._reach((1e-3, 1e-12), 2, 2.0) == pytest.approx(first_crossing((1e-3, 1e-12), 2, 2.0))
    assert schedules._reach((5.0, 3.0), 1, 0.1) == pytest.approx(first_crossing((5.0, 3.0), 1, 0.1))
