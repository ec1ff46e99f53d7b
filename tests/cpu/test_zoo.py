"""The matrix zoo and the measures of a polar factor that need no SVD."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from steepest.conformance import recorded, zoo
from steepest.conformance.noise import NoisyVerbs, rounding_estimate
from steepest.reference import polar_svd

NAMES = zoo.NAMES
EPS = 2.0**-52  # float64: every check here is made in it


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (12, 12), (31, 17), (17, 31)])
@pytest.mark.parametrize("name", NAMES)
def test_matrices_have_the_singular_values_they_say(name, shape):
    x, s = zoo.matrix(name, *shape, seed=3, dtype=torch.float64)
    assert x.shape == shape and s.shape == (min(shape),)
    measured = torch.linalg.svdvals(x)
    # Two products and an SVD: each off by a modest multiple of eps times the largest, sums over at most 31 terms.
    assert ((measured - s.sort(descending=True).values).abs() <= 31 * EPS * s.max()).all()


@pytest.mark.parametrize("name", NAMES)
def test_matrices_are_seeded_and_differ(name):
    a, b, c = (zoo.matrix(name, 8, 6, seed=seed, batch=(2,))[0] for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert name == "zero" or (not torch.equal(a, c) and not torch.equal(a[0], a[1]))


def test_empty_matrices_and_unknown_names():
    for shape, batch in (((0, 5), ()), ((5, 0), (2,)), ((3, 4), (0,))):
        for name in NAMES:
            assert zoo.matrix(name, *shape, batch=batch)[0].shape == (*batch, *shape)
    with pytest.raises(ValueError, match="spectrum is 'gausian', expected one of gaussian, orthogonal"):
        zoo.matrix("gausian", 3, 4)


@pytest.mark.parametrize("name, rank", [("zero", 0), ("rank one", 1), ("rank deficient", 32), ("exponential", 48)])
def test_the_svds_polar_factor_has_the_rank_of_the_matrix(name, rank):
    q = polar_svd(zoo.matrix(name, 48, 48)[0])  # float32: singular values that should be 0 are 1e-8 or so
    assert abs(q.double().square().sum() - rank) <= 48 * 48 * 2.0**-24


@pytest.mark.parametrize("name", recorded.RECORDED)
def test_recorded_gradients_are_taken_as_they_are(name):
    x = recorded.gradients()[name]
    assert x.shape[0] >= x.shape[1] == recorded.WIDTH and x.abs().max() == 1 and (x != 0).all()
    whole, s = zoo.matrix(name, *x.shape, seed=4, dtype=torch.float64)
    assert torch.allclose(s, torch.linalg.svdvals(x), rtol=0, atol=x.shape[0] * EPS * s.max())  # only the order differs
    assert torch.equal(whole.flatten().sort().values, x.flatten().sort().values)
    # What none of the random matrices has: singular values that small beside rows of such different length.
    assert s.min() < 1e-4 * s.max() and x.norm(dim=1).max() > 8 * x.norm(dim=1).min()
    wide, _ = zoo.matrix(name, 40, 2 * x.shape[0], dtype=torch.float64)  # longer: columns come twice, and no third time
    assert torch.unique(wide, dim=1).shape[1] == x.shape[0]


def test_recording_gives_gradients_like_those_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(recorded, "RECORDED", {name: (p, 1) for name, (p, _) in recorded.RECORDED.items()})
    monkeypatch.setattr(recorded, "record", partial(recorded.record, steps=1))
    assert recorded.main([str(tmp_path / "file.npz")]) == 0
    monkeypatch.setattr(recorded, "FILE", tmp_path / "file.npz")
    found = recorded.gradients.__wrapped__()
    assert {name: x.shape for name, x in found.items()} == {n: x.shape for n, x in recorded.gradients().items()}
    assert all(x.abs().max() == 1 for x in found.values())
    assert recorded.main([]) == 2


def test_marchenko_pastur_has_the_laws_moments():
    k, n = 200, 400
    _, s = zoo.matrix("marchenko-pastur", k, n, dtype=torch.float64)
    t = (s * (1 + (k / n) ** 0.5)).square()  # eigenvalues of G G^T / n
    # A mean over k mid-quantiles of a monotone function errs by at most half its range / k; as much for the grid.
    assert abs(t.mean() - 1) <= (t.max() - t.min()) / k
    assert abs(t.square().mean() - (1 + k / n)) <= (t.max() ** 2 - t.min() ** 2) / k


@pytest.mark.parametrize("shape", [(12, 12), (31, 17), (17, 31), (1, 9)])
@pytest.mark.parametrize("name", ["gaussian", "clustered", "exponential"])
def test_the_polar_factor_scores_zero(name, shape):
    x, s = zoo.matrix(name, *shape, seed=5, dtype=torch.float64)
    q = polar_svd(x)
    # Rounding of an SVD and of products of at most 31 terms, relative to norms of order one.
    tiny = 31 * 31 * EPS
    assert zoo.orthogonality(q) <= tiny and zoo.asymmetry(q, x) <= tiny and zoo.residual(q, x) <= tiny
    assert abs(zoo.dual_gap(q, x, s)) <= tiny and zoo.negative_part(q, x) <= tiny


def test_each_measure_sees_what_it_is_for():
    x, s = zoo.matrix("exponential", 20, 30, seed=1, dtype=torch.float64)
    q = polar_svd(x)
    assert zoo.orthogonality(1.1 * q) == pytest.approx(0.21)
    assert zoo.dual_gap(0.9 * q, x, s) == pytest.approx(0.1)
    assert zoo.dual_gap(1.1 * q, x, s) < 0
    assert zoo.asymmetry(q.roll(1, 0), x) > 0.1
    assert zoo.negative_part(-q, x) > 0.1
    assert zoo.residual(0.9 * q, x) > 0.1
    assert zoo.asymmetry(0.9 * q, x) < 1e-12  # directions alone


def test_measures_of_zero_and_of_batches():
    x, s = zoo.matrix("zero", 4, 6, batch=(2,), dtype=torch.float64)
    for value in (zoo.asymmetry(x, x), zoo.residual(x, x), zoo.dual_gap(x, x, s), zoo.negative_part(x, x)):
        assert value.shape == (2,) and (value == 0).all()


# --- stochastic arithmetic --------------------------------------------------------------------------------------------


def test_without_a_generator_the_verbs_are_exact():
    a = torch.randn(7, 7, dtype=torch.float64)
    a, x = a + a.mT, torch.randn(7, 12, dtype=torch.float64)
    verbs = NoisyVerbs(torch.float32, None)
    assert torch.equal(verbs.gram(x), x @ x.mT) and torch.equal(verbs.long_product(a, x), a @ x)
    expected = 2 * (a @ a) + 3 * a + 4 * torch.eye(7, dtype=torch.float64)
    assert torch.allclose(verbs.symmetric_product(a, a, alpha=2, beta=3, c=a, diagonal=4), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_estimate_covers_real_rounding_but_not_coarser_units(dtype):
    """Three products, really rounded, are within 3 deviations; with a unit 256 times as large (TF32: 8192) not."""
    for seed in range(20):
        x, _ = zoo.matrix("exponential", 40, 100, seed=seed, dtype=torch.float64)
        x = x.to(dtype).double()

        def chain(y, verbs):
            gram = verbs.gram(y)
            return verbs.long_product(verbs.symmetric_product(gram, gram), y)

        def rounded(y, unit):
            def cut(z):
                exponent = torch.exp2(z.abs().clamp(min=2.0**-14).log2().floor()) * (2 * unit)
                return (z / exponent).round() * exponent

            gram = cut(y @ y.mT)
            return cut(cut(gram @ gram) @ y)

        exact = chain(x, NoisyVerbs(dtype, None))
        estimate = rounding_estimate(chain, x, dtype, draws=4, seed=0)
        unit = torch.finfo(dtype).eps / 2
        assert (rounded(x, unit) - exact).norm() <= 3 * estimate
        assert (rounded(x, 256 * unit) - exact).norm() > 3 * estimate
