"""steepest.inverse_root on the CPU: accuracy, product counts, bad blocks, plans, refusals."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import steepest
from steepest.conformance.cases.roots import SPECTRA, definite, plant
from steepest.conformance.root_bounds import CONSTANT, figures, scale_figures, shifted_spectrum, update_figure
from steepest.matrix import roots
from steepest.matrix.native import NativeVerbs
from steepest.matrix.root_plan import (
    CUSHION,
    RIDGE_FLOOR,
    composite_schedule,
    count_products,
    eigh_in_products,
    lower_end,
    plan,
)
from steepest.matrix.verbs import TorchVerbs
from steepest.reference import inverse_root as reference
from steepest.reference.roots import coupled_newton

F64 = torch.float64
U = 2.0**-24


pytestmark = pytest.mark.usefixtures("one_thread")


class CountingVerbs(TorchVerbs):
    """Counts n x n products per batch, and how many of them were in float64."""

    def __init__(self):
        self.products = self.wide = 0

    def symmetric_product(self, a, b, **options):
        self.products += 1
        self.wide += a.dtype is F64
        return super().symmetric_product(a, b, **options)

    def commuting_product(self, a, b, **options):
        self.products += 1
        return super().commuting_product(a, b, **options)


def relative(x, exact):
    return ((x.double() - exact).norm() / exact.norm()).item()


def with_condition(n, kappa, seed, rank=None):
    """Eigenvalues log-uniform in [1 / kappa, 1] with both ends, or `rank` of them in [0.1, 1] and the rest zero."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))
    if rank is None:
        w = kappa ** -torch.rand(n, generator=generator, dtype=F64)
        w[0], w[-1] = 1.0, 1 / kappa
    else:
        w = torch.linspace(1, 0.1, n, dtype=F64) * (torch.arange(n) < rank)
    return ((q * w) @ q.T).float()


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 128, 200])
@pytest.mark.parametrize("kappa", [1e2, 1e4, 1e6, 1e8, 1e12])
def test_root_and_rounding_errors_stay_within_their_bounds(n, kappa):
    """A ridge of 1/kappa; below 1e-6 in float64: rounding to float32 alone moves eigenvalues by more than that."""
    for spectrum in SPECTRA:
        a = definite(spectrum, n, seed=n, dtype=F64 if kappa > 1e6 else torch.float32)
        if n > 64 and spectrum not in ("statistic", "rank deficient"):
            continue
        x, status = steepest.inverse_root(a, ridge=1 / kappa, return_status=True)
        todo = plan(a.shape, a.dtype, ridge=1 / kappa)
        assert status.ok
        scale, residual = status.scale.item(), status.residual.item()
        for figure in figures(a, x, scale, 1 / kappa, False, todo, residual) + scale_figures(a, scale):
            assert figure.ok, (spectrum, figure)


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", ["statistic", "rank deficient", "log-uniform 1e-6", "clustered"])
def test_rounding_errors_of_large_matrices_stay_within_their_bounds(spectrum):
    """The other figures of large matrices are in test_root_zoo.py."""
    a = definite(spectrum, 512, seed=512)
    x, status = steepest.inverse_root(a, method="composite", return_status=True)
    for figure in figures(a, x, status.scale.item(), 1e-6, False, plan(a.shape, method="composite")):
        assert figure.ok, figure


@pytest.mark.parametrize("rank", [None, 32])
def test_at_condition_1e6_error_and_products_are_below_coupled_newtons(rank):
    """As Distributed Shampoo writes it, for the same ridge: 64 products or more, and a larger error."""
    ours, theirs = [], []
    for seed in range(5):
        a = with_condition(128, 1e6, seed, rank)
        todo = plan(a.shape, method="composite")
        counting = CountingVerbs()
        x, *_, scale = roots._by_polynomials(a[None], todo, 1e-6, False, counting)
        assert counting.products == todo.products <= 26
        assert counting.wide == 2
        ours.append(relative(x[0], reference(a.double(), scale=scale[0])))
        y, products = coupled_newton(a, ridge=1e-6 * scale.item() / torch.linalg.matrix_norm(a, 2).item())
        assert products >= 64
        theirs.append(relative(y, reference(a.double(), scale=scale[0])))
    assert all(mine < peer for mine, peer in zip(ours, theirs))
    assert sum(ours) <= sum(theirs) / 1.5


def test_without_float64_in_the_first_step_the_error_is_several_times_larger():
    a = with_condition(128, 1e6, 1, 32)[None]
    todo = plan(a.shape, method="composite")
    errors = []
    for each in (todo, dataclasses.replace(todo, wide=False)):
        x, *_, scale = roots._by_polynomials(a, each, 1e-6, False, TorchVerbs())
        exact = reference(a.double(), scale=scale)
        errors.append(relative(x, exact))
    assert errors[1] > 2 * errors[0]


@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 8])
def test_every_order_repowers_to_the_inverse(p):
    """X^p S = I up to the certificate p tol and rounding: p + 1 products of condition 100 in float64."""
    a = definite("statistic", 30, seed=p, dtype=F64)
    x, status = steepest.inverse_root(a, p, ridge=1e-2, tol=1e-6, return_status=True)
    s = a + 1e-2 * status.scale * torch.eye(30, dtype=F64)
    residual = torch.linalg.matrix_power(x, p) @ s - torch.eye(30, dtype=F64)
    assert torch.linalg.matrix_norm(residual, 2) <= 1.1 * p * 1e-6
    assert status.residual <= 1.1 * p * 1e-6


def gradient_of(left, right, seed):
    """L^(1/2) N R^(1/2), N normal: a gradient as one of those whose statistics these are."""
    n, m = len(left), len(right)
    halves = []
    for a in (left.double(), right.double()):
        w, q = torch.linalg.eigh(a / a.abs().max())
        halves.append((q * w.clamp(min=0).sqrt()) @ q.mT)
    noise = torch.randn(n, m, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return halves[0] @ noise @ halves[1]


def update_error(left, right, g, kappa):
    found = []
    for a in (left, right):
        x, status = steepest.inverse_root(a, ridge=1 / kappa, return_status=True)
        assert status.ok
        found.append((x, status.scale.item(), plan(a.shape, a.dtype, ridge=1 / kappa), status.residual.item()))
    roots, scales, plans, residuals = zip(*found)
    update = roots[0] @ g @ roots[1]
    return update_figure((left, right), g, roots, scales, 1 / kappa, plans, update, certified=residuals)


@pytest.mark.parametrize("n, m", [(1, 1), (1, 17), (2, 3), (17, 17), (64, 33), (128, 128), (200, 64)])
@pytest.mark.parametrize("kappa", [1e2, 1e4, 1e6, 1e8, 1e12])
def test_update_error_stays_within_its_bound(n, m, kappa):
    """L^(-1/4) G R^(-1/4) against the exact one, which Shampoo's step is: within e + 3 kappa u / 4 for either side."""
    dtype = F64 if kappa > 1e6 else torch.float32
    for k, spectrum in enumerate(SPECTRA if max(n, m) <= 64 else ("statistic", "rank deficient", "log-uniform 1e-6")):
        left = definite(spectrum, n, seed=n, dtype=dtype)
        right = definite(SPECTRA[(3 * k + 1) % len(SPECTRA)] if m <= 64 else spectrum, m, seed=m + 1, dtype=dtype)
        g = gradient_of(left, right, k).to(dtype)
        figure = update_error(left, right, g, kappa)
        assert figure.ok, (spectrum, figure)


def test_the_update_keeps_its_direction():
    """What matters to training.  It lies where the statistics are well conditioned."""
    generator = torch.Generator().manual_seed(0)
    for ridge in (1e-2, 1e-4, 1e-6):
        for rank in (4, 40):
            factors = [
                [torch.randn(40, rank, generator=generator), torch.randn(rank, 30, generator=generator)]
                for _ in range(5)
            ]
            grads = [a @ b for a, b in factors]
            left, right, g = sum(g @ g.mT for g in grads), sum(g.mT @ g for g in grads), grads[-1]
            assert update_error(left, right, g, 1 / ridge).ok
            (x, s), (y, t) = (steepest.inverse_root(a, ridge=ridge, return_status=True) for a in (left, right))
            exact_x, exact_y = (reference(a.double(), ridge=ridge, scale=b.scale) for a, b in ((left, s), (right, t)))
            found, exact = (x @ g @ y).double().flatten(), (exact_x @ g.double() @ exact_y).flatten()
            assert 1 - torch.nn.functional.cosine_similarity(found, exact, 0) <= 1e-4


def test_without_a_cushion_the_residual_is_hundreds_of_times_larger():
    """|X^4 S - I| at condition 1e6: 465 with the best polynomial of every step, 2 with a cushion; 22 products each."""
    a = definite("statistic", 64, seed=64)
    found = []
    for cushion in (0.0, CUSHION):
        todo = plan(a.shape, method="composite", backend="torch")
        schedule = composite_schedule(4, lower_end(1e-6), 1e-3, cushion)
        assert count_products(4, schedule) == todo.products == 22
        x, *_, scale = roots._by_polynomials(
            a[None], dataclasses.replace(todo, schedule=schedule), 1e-6, False, TorchVerbs()
        )
        t, q = shifted_spectrum(a, scale.item(), 1e-6, False)
        power = torch.linalg.matrix_power(x[0].double() * scale.item() ** 0.25, 4)
        found.append(torch.linalg.matrix_norm(power @ ((q * t) @ q.mT) - torch.eye(64, dtype=F64), 2).item())
    assert found[0] > 20 * found[1]


def test_statistics_of_the_demo_model():
    from steepest.demo.model import Transformer

    model = Transformer(50, context=16, width=32, layers=1, heads=2, seed=0)
    generator = torch.Generator().manual_seed(0)
    statistics: dict = {}
    for _ in range(6):
        tokens = torch.randint(0, 50, (4, 17), generator=generator)
        model.zero_grad()
        logits = model(tokens[:, :-1]).flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
        for name, w in model.named_parameters():
            if w.ndim == 2 and min(w.shape) > 16:
                old = statistics.get(name, 0)
                statistics[name] = old + w.grad @ w.grad.mT
    assert len(statistics) >= 6
    for name, a in statistics.items():
        for ridge in (1e-6, 1e-4):
            x, status = steepest.inverse_root(a, ridge=ridge, return_status=True)
            assert status.ok, name
            exact = reference(a.double(), ridge=ridge, scale=status.scale)
            assert relative(x, exact) <= 1e-3 + CONSTANT * U / (4 * ridge), name


# --- batches and bad blocks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["composite", "newton", "eigh"])
@pytest.mark.parametrize("n", [16, 64])
def test_bad_blocks_are_flagged_and_their_neighbours_are_bitwise_as_alone(method, n):
    a = definite("statistic", n, seed=3, batch=(7,))
    bad = {1: "nan", 2: "zero", 3: "indefinite", 5: "inf"}
    for place, kind in bad.items():
        plant(a[place], kind)
    kept = a.clone()
    x, status = steepest.inverse_root(a, ridge=1e-4, method=method, return_status=True)
    assert torch.equal(a.nan_to_num(7.0), kept.nan_to_num(7.0))
    assert status.ok.tolist() == [True, False, True, False, True, False, True]
    assert torch.equal(x[2], 1e-4**-0.25 * torch.eye(n))
    assert status.scale[2] == 1
    for i in range(7):
        if i in (1, 3, 5):
            assert x[i].isnan().all()
        elif i != 2:
            assert torch.equal(x[i], steepest.inverse_root(a[i], ridge=1e-4, method=method)), i


def test_failed_blocks_keep_the_previous_root():
    a = definite("clustered", 8, seed=0, batch=(3,))
    plant(a[1], "indefinite")
    previous = torch.randn(3, 8, 8)
    x, status = steepest.inverse_root(a, ridge=1e-3, previous=previous, return_status=True)
    assert status.ok.tolist() == [True, False, True]
    assert torch.equal(x[1], previous[1])
    assert torch.equal(x[0], steepest.inverse_root(a[0], ridge=1e-3))


def test_scales_in_one_batch():
    """1e-30 beside 1e30: scaled block by block."""
    a = definite("exponential", 12, seed=1, batch=(3,))
    sizes = torch.tensor([1e-30, 1.0, 1e30])
    x, status = steepest.inverse_root(a * sizes[:, None, None], ridge=1e-4, return_status=True)
    y = steepest.inverse_root(a, ridge=1e-4)
    assert status.ok.all()
    for i in range(3):
        assert relative(x[i] * sizes[i].double() ** 0.25, y[i].double()) <= 1e4 * U


def test_only_the_symmetric_part_counts():
    a = definite("clustered", 10, seed=0)
    skew = torch.randn(10, 10)
    skew = 1e-3 * (skew - skew.mT)
    assert (
        relative(steepest.inverse_root(a + skew, ridge=1e-3), steepest.inverse_root(a, ridge=1e-3).double())
        <= 1e3 * U * 3
    )


@pytest.mark.parametrize("method", ["composite", "eigh"])
def test_absolute_ridge(method):
    a = definite("clustered", 10, seed=0) * 100
    x, status = steepest.inverse_root(a, ridge=0.5, absolute=True, method=method, return_status=True)
    assert relative(x, reference(a.double(), ridge=0.5, absolute=True)) <= 1e-3
    assert status.ok


def test_absolute_ridge_too_small_for_the_polynomials_is_flagged():
    a = definite("clustered", 10, seed=0)
    options = {"ridge": 1e-9, "absolute": True, "return_status": True}
    assert not steepest.inverse_root(a, method="composite", precision="float32", **options)[1].ok
    assert steepest.inverse_root(a, **options)[1].ok


def test_power_iteration_bounds_the_largest_eigenvalue():
    for n in (1, 2, 5, 40, 300):
        for spectrum in ("rank one", "orthogonal", "log-uniform 1e-3", "one small"):
            a, start = (
                definite(spectrum, n, seed=n, batch=(4,)),
                roots._directions(n, torch.float32, torch.device("cpu")),
            )
            for verbs in (TorchVerbs(), NativeVerbs()):
                y, sizes, bound = verbs.run(roots.bounded, (a, start[None]), (torch.float32,))
                bound = bound[:, 0, 0]
                largest = torch.linalg.eigvalsh(y.double()).abs().amax(-1)
                assert (bound >= largest).all() and (bound <= 2 * largest * (1 + 2**-10)).all()
                rows = ((a + a.mT) / 2).double().abs().sum(-1).amax(-1)
                torch.testing.assert_close(sizes[:, 0, 0], rows, rtol=n * U, atol=0)
                torch.testing.assert_close(
                    y * rows[:, None, None].float(), (a + a.mT) / 2, rtol=(n + 4) * U, atol=1e-37
                )


def test_effective_dimension():
    eye = torch.eye(7)
    assert steepest.effective_dimension(eye) == 7
    assert steepest.effective_dimension(torch.ones(2, 5, 5)).tolist() == [1, 1]
    assert steepest.effective_dimension(torch.zeros(3, 3)) == 0
    assert steepest.effective_dimension(1e30 * eye) == 7
    assert steepest.effective_dimension(torch.full((2, 2), math.nan)).isnan()
    with pytest.raises(ValueError, match=r"effective_dimension: a must be \(\.\.\., n, n\)"):
        steepest.effective_dimension(torch.zeros(3, 4))
    with pytest.raises(TypeError, match="effective_dimension: a is torch"):
        steepest.effective_dimension(torch.zeros(3, 3, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 0), (0, 0)])
def test_empty(shape):
    x, status = steepest.inverse_root(torch.empty(shape), return_status=True)
    assert x.shape == shape and status.ok.shape == shape[:-2]


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("ridge", [1e-2, 1e-6])
@pytest.mark.parametrize("method", ["composite", "newton"])
def test_what_is_executed_is_what_was_planned(p, ridge, method):
    todo = plan((2, 8, 8), p=p, ridge=ridge, method=method)
    counting = CountingVerbs()
    roots.iterate(torch.eye(8).expand(2, 8, 8) / 2, todo, counting)
    assert counting.products == todo.products == count_products(p, todo.schedule)
    assert todo.schedule.error <= 1e-3


def test_products_per_ridge():
    """At tol 1e-3; coupled Newton from the same bound of the spectrum takes 24, 44 and 64."""
    found = {r: plan((8, 8), ridge=r, method="composite").products for r in (1e-2, 1e-4, 1e-6)}
    assert found == {1e-2: 10, 1e-4: 16, 1e-6: 22}
    assert {r: plan((8, 8), ridge=r, method="newton").products for r in found} == {1e-2: 24, 1e-4: 44, 1e-6: 64}


def test_automatic_method_and_precision():
    assert plan((64, 16, 16)).method == "composite"
    assert plan((4096, 4096)).method == "eigh"
    assert plan((32, 32), ridge=1e-8).dtype is F64
    assert plan((32, 32), ridge=1e-15).method == "eigh"
    assert plan((32, 32), ridge=1e-8, precision="float64", method="composite").dtype is F64
    assert plan((32, 32), absolute=True).method == "eigh"
    cuda = plan((4, 1024, 1024), device="cuda")
    assert (cuda.method, cuda.backend, cuda.precision, cuda.wide) == ("composite", "triton", "tf32x3", False)
    assert not plan((4, 64, 64), device="cuda", precision="tf32", ridge=1e-3).mirrored
    assert [eigh_in_products(n, 1, "torch") for n in (4, 16, 2048, 9999)] == [93, 93, 5, 5]


@pytest.mark.parametrize(
    "precision, device", [("float32", "cpu"), ("float64", "cpu"), ("tf32", "cuda"), ("tf32x3", "cuda")]
)
def test_unsafe_pairs_are_refused(precision, device):
    options = {"precision": precision, "device": device, "method": "composite"}
    floor = RIDGE_FLOOR[precision]
    assert plan((8, 8), ridge=floor, **options).schedule
    with pytest.raises(ValueError, match=f"ridge .* is below .* bear in {precision}"):
        plan((8, 8), ridge=floor / 2, **options)


def test_explain_says_what_is_planned():
    text = str(steepest.explain("inverse_root", torch.zeros(2, 48, 48), method="composite"))
    assert "22 per matrix" in text and "the two most sensitive products" in text and "0.000305" in text
    assert "eigh: an absolute ridge" in str(steepest.explain(steepest.inverse_root, SQUARE, absolute=True))
    with pytest.raises(ValueError, match="is below 1e-06"):
        steepest.explain("inverse_root", SQUARE, ridge=1e-8, method="composite", precision="float32")


SQUARE = torch.eye(3)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: steepest.inverse_root([1.0]), TypeError, "inverse_root: a is a list"),
        (lambda: steepest.inverse_root(SQUARE.int()), TypeError, "inverse_root: a has dtype torch.int32"),
        (lambda: steepest.inverse_root(torch.zeros(2, 3)), ValueError, r"got shape \(2, 3\)"),
        (lambda: steepest.inverse_root(SQUARE, 5), ValueError, "p is 5, expected one of 1, 2, 3, 4, 6, 8"),
        (lambda: steepest.inverse_root(SQUARE, ridge=-1.0), ValueError, "ridge is -1.0, expected a finite number"),
        (lambda: steepest.inverse_root(SQUARE, tol=0), ValueError, r"tol is 0, expected a number in \(0, 1\)"),
        (lambda: steepest.inverse_root(SQUARE, method="svd"), ValueError, "method is 'svd', expected one of auto"),
        (lambda: steepest.inverse_root(SQUARE, precision="tf32"), ValueError, "the CPU multiplies in float32 or"),
        (lambda: steepest.inverse_root(SQUARE, backend="triton"), ValueError, "backend 'triton' needs a CUDA tensor"),
        (lambda: steepest.inverse_root(SQUARE, previous=torch.eye(2)), ValueError, r"previous is \(2, 2\)"),
    ],
)  # fmt: skip
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_autograd_autocast_and_matmul_precision_do_not_matter():
    a = definite("clustered", 32, seed=0).requires_grad_()
    expected = steepest.inverse_root(a, ridge=1e-3)
    assert not expected.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(steepest.inverse_root(a, ridge=1e-3), expected)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(steepest.inverse_root(a, ridge=1e-3), expected)
    finally:
        torch.set_float32_matmul_precision("highest")
