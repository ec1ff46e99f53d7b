"""The inverse-root oracles against each other and against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from steepest.matrix.root_plan import composite_schedule, lower_end
from steepest.reference import effective_dimension, inverse_root
from steepest.reference.roots import composite, coupled_newton

F64 = torch.float64


def definite(n, lower, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))
    w = lower ** torch.rand(n, generator=generator, dtype=F64)
    w[0], w[-1] = 1.0, lower
    return (q * w) @ q.T


@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 8])
def test_powers_of_the_root_give_the_inverse(p):
    a = definite(12, 1e-2)
    x = inverse_root(a, p, ridge=1e-3, scale=torch.tensor(2.0))
    expected = torch.linalg.inv(a + 2e-3 * torch.eye(12, dtype=F64))
    torch.testing.assert_close(torch.linalg.matrix_power(x, p), expected, rtol=1e-10, atol=1e-10)


def test_tridiagonal_matrix_with_known_eigenvalues():
    """tridiag(-1, 2, -1) has eigenvalues 2 - 2 cos(k pi / (n + 1)), and its root their roots."""
    n = 9
    a = (
        2 * torch.eye(n, dtype=F64)
        - torch.diag(torch.ones(n - 1, dtype=F64), 1)
        - torch.diag(torch.ones(n - 1, dtype=F64), -1)
    )
    k = torch.arange(1, n + 1, dtype=F64)
    w = 2 - 2 * torch.cos(k * math.pi / (n + 1))
    found = torch.linalg.eigvalsh(inverse_root(a, 4, ridge=0.25, absolute=True))
    torch.testing.assert_close(found, ((w + 0.25) ** -0.25).sort().values)


def test_ridge_conventions_and_indefinite_matrices():
    a = torch.diag(torch.tensor([4.0, 1.0], dtype=F64))
    torch.testing.assert_close(inverse_root(a, 2, ridge=0.5).diagonal(), torch.tensor([6.0, 3.0], dtype=F64) ** -0.5)
    assert torch.equal(inverse_root(0 * a, 2, ridge=0.25), 2 * torch.eye(2, dtype=F64))
    assert inverse_root(-a, 2, ridge=0.5).isnan().any()
    assert inverse_root(torch.diag(torch.tensor([1.0, 0.0], dtype=F64)), 2, ridge=0.0).isnan().all()


@pytest.mark.parametrize("p", [2, 3, 4])
def test_composite_chain_meets_its_certificate(p):
    m = definite(20, lower_end(1e-4))
    schedule = composite_schedule(p, lower_end(1e-4), 1e-5)
    exact = inverse_root(m, p, ridge=0.0)
    error = torch.linalg.matrix_norm((composite(m, schedule) - exact) @ torch.linalg.inv(exact), 2)
    assert error <= schedule.error + 1e-9  # float64: 1e-16 times the condition 1e4 squared, and 1e4 for the inverse
    assert error >= schedule.error / 10  # the certificate is attained up to where eigenvalues happen to lie


@pytest.mark.parametrize("p, products", [(2, 3), (3, 4), (4, 4), (8, 5)])
def test_coupled_newton_converges_and_counts(p, products):
    a = definite(16, 1e-3)
    x, used = coupled_newton(a, p, ridge=1e-6, tolerance=1e-10)
    torch.testing.assert_close(x, inverse_root(a, p, ridge=1e-6), rtol=1e-8, atol=1e-8)
    assert used % products == 0 and used >= 10 * products


def test_effective_dimension():
    a = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=F64))
    torch.testing.assert_close(effective_dimension(a), torch.tensor(3.0, dtype=F64))
    assert effective_dimension(0 * a) == 0
    two = definite(6, 1e-2)
    assert effective_dimension(two) == pytest.approx(float(two.trace() ** 2 / two.square().sum()))
