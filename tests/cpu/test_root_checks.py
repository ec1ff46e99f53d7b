"""What inverse roots accept and refuse: residuals at their limits, zero blocks, values beyond the largest number."""

from __future__ import annotations

import logging
import math

import pytest
import torch

import steepest
from steepest.matrix import roots, tape
from steepest.matrix.root_plan import plan

F64 = torch.float64
UNIT64 = torch.finfo(F64).eps / 2


def hadamard(n: int) -> torch.Tensor:
    """Symmetric, of +1 and -1, with eigenvalues +-sqrt(n)."""
    h = torch.ones(1, 1, dtype=F64)
    while len(h) < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


def flat(n: int) -> torch.Tensor:
    """Eigenvalues 0 and 2 sqrt(n), half of each; every row's sum of magnitudes is about n."""
    return hadamard(n) + math.sqrt(n) * torch.eye(n, dtype=F64)


def by_eigh(a, **options):
    return steepest.inverse_root(a, method="eigh", return_status=True, **options)


def skewed(monkeypatch, *, vectors=0.0, values=0.0):
    """LAPACK as if eigenvectors came too long, or eigenvalues too large, by a relative error."""
    solve = torch.linalg.eigh

    def wrong(y):
        w, q = solve(y)
        return w * (1 + values), q * (1 + vectors)

    monkeypatch.setattr(roots, "_eigh", wrong)


def limit(n: int) -> float:
    return 10 * math.sqrt(n) * UNIT64


@pytest.mark.parametrize("share, ok", [(0.95, True), (1.05, False)])
def test_vectors_that_are_not_orthonormal(monkeypatch, share, ok):
    """The diagonal matrix's vectors are exact but for what is added: |V Q Q' - V| is 2 d + d^2 per row."""
    n = 256
    skewed(monkeypatch, vectors=0.5 * share * limit(n))
    status = by_eigh(torch.diag(torch.linspace(0.01, 0.1, n, dtype=F64)), ridge=1e-3)[1]
    assert status.ok.item() == ok
    assert status.residual.item() == pytest.approx(share * limit(n), rel=0.03)


@pytest.mark.parametrize("share, ok", [(0.95, True), (1.05, False)])
def test_values_that_do_not_restore_the_matrix(monkeypatch, share, ok):
    n = 256
    skewed(monkeypatch, values=share * limit(n))
    status = by_eigh(torch.eye(n, dtype=F64), ridge=1e-3)[1]
    assert status.ok.item() == ok
    assert status.residual.item() == pytest.approx(share * limit(n), rel=0.03)


def test_a_residual_is_relative_to_the_largest_eigenvalue(monkeypatch):
    """Not to the largest row, which is 4 times that here; half of the eigenvalues are zero."""
    n = 64
    skewed(monkeypatch, values=3 * limit(n))
    status = by_eigh(flat(n), ridge=1e-3)[1]
    assert status.residual.item() == pytest.approx(3 * limit(n) / math.sqrt(2), rel=0.2) and not status.ok


def test_scale_is_just_above_the_largest_eigenvalue():
    for a in (flat(16), 3e5 * torch.eye(7, dtype=F64), torch.diag(torch.tensor([1.0, 5.0, 2.0], dtype=F64))):
        scale = by_eigh(a, ridge=1e-3)[1].scale.item()
        assert scale / torch.linalg.eigvalsh(a).max().item() == pytest.approx(1 + 2.0**-12, rel=1e-12)


def given_values(monkeypatch, w: torch.Tensor):
    monkeypatch.setattr(roots, "_eigh", lambda y: (w[None].clone(), torch.eye(len(w), dtype=F64)[None]))


def test_eigenvalues_that_rounding_can_have_made_negative_count_as_zero(monkeypatch):
    n, ridge = 4, 1e-3
    a = torch.diag(torch.tensor([0.0, 0.2, 0.5, 1.0], dtype=F64))
    w = a.diagonal().clone()
    edge = (-limit(n) * (w.max() * (1 + 2.0**-12))).item()
    given_values(monkeypatch, w)
    expected, status = by_eigh(a, ridge=ridge)
    assert status.ok
    for value in (edge, 0.5 * edge, -0.0):
        w[0] = value
        given_values(monkeypatch, w)
        assert torch.equal(by_eigh(a, ridge=ridge)[0], expected)
    w[0] = 1.01 * edge  # no longer rounding
    given_values(monkeypatch, w)
    assert not torch.equal(by_eigh(a, ridge=ridge)[0], expected)


def test_that_edge_is_relative_to_the_largest_eigenvalue(monkeypatch):
    """Which is a quarter of the largest row, by which the matrix was divided."""
    n = 64
    y = flat(n) / flat(n).abs().sum(1).max()
    w, q = torch.linalg.eigh(y)
    w = w.clamp(min=0)
    w[0] = -2 * limit(n) * w.max()
    monkeypatch.setattr(roots, "_eigh", lambda y: (w[None].clone(), q[None]))
    assert not by_eigh(flat(n), ridge=1e-15)[1].ok
    w[0] *= 0.4
    assert by_eigh(flat(n), ridge=1e-15)[1].ok


@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_without_a_ridge_a_singular_matrix_has_no_root(p):
    a = torch.stack([torch.zeros(3, 3), torch.diag(torch.tensor([1.0, 0.0, 2.0])), 2 * torch.eye(3)])
    root, status = by_eigh(a, ridge=0.0, p=p)
    assert status.ok.tolist() == [False, False, True]
    assert root[:2].isnan().all()
    assert torch.allclose(root[2], 2 ** (-1 / p) * torch.eye(3))


@pytest.mark.parametrize("options", [
    {"method": "composite"}, {"method": "newton"}, {"method": "eigh"},
    {"method": "composite", "absolute": True, "ridge": 1e-20}, {"method": "eigh", "absolute": True, "ridge": 1e-20},
])  # fmt: skip
@pytest.mark.parametrize("p", [1, 3, 4])
def test_a_zero_block_is_exact(options, p):
    options = {"ridge": 1e-3, "p": p} | options
    a = torch.zeros(2, 5, 5)
    a[1] = torch.eye(5)
    root, status = steepest.inverse_root(a, return_status=True, **options)
    assert status.ok[0] and status.residual[0] == 0
    exact = torch.tensor(options["ridge"] ** (-1 / p)).to(root.dtype)
    assert torch.equal(root[0], exact * torch.eye(5))


@pytest.mark.parametrize("method", ["composite", "eigh"])
def test_a_root_above_the_largest_number_is_refused(method):
    """1 / 1e-39 is no float32 number."""
    a = torch.stack([1e-39 * torch.eye(4), torch.eye(4)])
    root, status = steepest.inverse_root(a, p=1, ridge=1e-3, method=method, return_status=True)
    assert status.ok.tolist() == [False, True]
    assert root[0].isnan().all() and root[1].isfinite().all()


@pytest.mark.parametrize("method", ["composite", "newton"])
def test_a_residual_at_its_limit_is_accepted(monkeypatch, method):
    x = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    options = {"ridge": 1e-3, "method": method, "return_status": True}
    residual = steepest.inverse_root(x @ x.mT, **options)[1].residual.item()
    assert 0 < residual < roots.RESIDUAL_LIMIT
    for bound, ok in ((residual, True), (residual * (1 - 1e-6), False)):
        monkeypatch.setattr(roots, "RESIDUAL_LIMIT", bound)
        assert steepest.inverse_root(x @ x.mT, **options)[1].ok.item() == ok


def test_steps_of_the_power_method():
    """0.8 sqrt(n) 2^-m <= 1e-12^(1/8), and not one step more than log2 sqrt(n) + 4.66 asks for."""
    assert [roots.power_steps(n) for n in (1, 2, 64, 1024, 4096)] == [5, 6, 8, 10, 11]


def test_nan_does_not_trouble_lapack(caplog):
    a = torch.eye(3).repeat(3, 1, 1)
    a[1, 0, 0] = math.nan
    with caplog.at_level(logging.WARNING):
        root, status = by_eigh(a, ridge=1e-3)
    assert status.ok.tolist() == [True, False, True] and root[1].isnan().all()
    assert not caplog.records


@pytest.mark.parametrize("n", [5, 16, 17])
def test_a_chain_in_one_launch_works_on_padded_matrices(n):
    """What the launch returns has the padding; the caller's result has not."""

    class Watching:
        def chain(self, program, y):
            self.seen = y.shape
            return y

    todo = plan((2, n, n), ridge=1e-3, method="composite", backend="triton", device="cuda")
    m, verbs = torch.randn(2, n, n), Watching()
    found = roots._resident(m, todo, verbs)
    assert torch.equal(found, m) and found.is_contiguous()
    assert verbs.seen == tape.padded(m).shape and verbs.seen[-1] >= n
