"""steepest.dynamics: every monitor against its float64 definition, and that wrong formulas would be found."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import steepest
from steepest import dynamics
from steepest.reference import dynamics as reference
from steepest.reference.sam import ascent

F64 = torch.float64
U = 2.0**-24


def gamma(k: int) -> float:
    """k roundings, each to nearest in float32: |error| <= gamma(k) times the sum of magnitudes (Higham, lemma 3.1)."""
    return k * U / (1 - k * U)


def matrices():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    decaying = draw(48, 48) * torch.logspace(0, -6, 48)
    low_rank = draw(40, 3) @ draw(3, 70)
    return [draw(3, 20, 60), draw(64, 17), decaying, low_rank, draw(1, 9), 1e25 * draw(5, 5), 1e-25 * draw(5, 5)]


# --- spectra: each check takes the function, so that a wrong one can be handed to it ----------------------------------


def check_gradient_dimension(function):
    for g in matrices():
        exact, found = reference.gradient_dimension(g), function(g).double()
        n, k = sorted(g.shape[-2:])
        # With F' = F + D, |D| <= γ_{k+1} |G||G|ᵀ (one rounding is the scaling's): tr F' is within γ_{k+n+1} of tr F;
        # ‖D‖_F <= γ_{k+1} ‖G‖_F² = γ_{k+1} √d ‖F‖_F; summing squares adds γ_{n²} to ‖F'‖_F².
        first, second = gamma(2 * k + n + 2), gamma(2 * k + 2) * exact.sqrt()
        bound = (1 + first) ** 2 / (1 - second) ** 2 / (1 - gamma(n * n + 3)) - 1
        assert ((found - exact).abs() <= bound * exact).all()


def check_stable_rank(function):
    for tol in (0.2, 1e-2, 1e-4):
        for g in matrices():
            exact, found = reference.stable_rank(g), function(g, tol=tol).double()
            n, k = sorted(g.shape[-2:])
            # Rounding moves λ₁(F) by ‖D‖₂ <= γ_{2k+2} ‖G‖_F², `exact` times that of λ₁; squaring y with ‖y‖_F = 1 and
            # ‖y‖₂ >= n^(-1/2) moves λ₁(y²) >= 1/n by γ_n, relatively n γ_n, and counts 2^-j in the j-th product.
            rounding = exact * gamma(2 * k + 2) + n * gamma(n) + gamma(2 * k + n + 40)
            assert (found <= exact * (1 + 2 * rounding)).all()
            assert (found >= exact * (1 - tol) * (1 - 2 * rounding)).all()


def check_timescales(function):
    generator = torch.Generator().manual_seed(0)
    for shape in ((50, 12), (12, 50)):
        x = torch.randn(shape, generator=generator, dtype=F64)
        for rate in (1.0, 2.0):
            # Eigenvalues of the Gram matrix are wrong by n eps λ₁ at most, relatively by κ times that.
            exact = reference.timescales(x, rate=rate)
            torch.testing.assert_close(function(x, rate=rate).times, exact, rtol=1e-11, atol=0)


def test_gradient_dimension():
    check_gradient_dimension(dynamics.gradient_dimension)
    assert dynamics.gradient_dimension(torch.eye(7)[:4]) == 4
    assert dynamics.gradient_dimension(torch.eye(7, dtype=F64)).dtype == F64
    assert dynamics.gradient_dimension(torch.zeros(2, 3, 4)).tolist() == [0, 0]
    assert dynamics.gradient_dimension(torch.full((3, 3), math.inf)).isnan()
    assert dynamics.gradient_dimension(torch.ones(3, 0)) == 0


def test_stable_rank():
    check_stable_rank(dynamics.stable_rank)
    torch.testing.assert_close(dynamics.stable_rank(torch.eye(7)[:4], tol=1e-3), torch.tensor(4.0), rtol=1e-3, atol=0)
    assert dynamics.stable_rank(torch.zeros(3, 4)) == 0
    assert dynamics.stable_rank(torch.full((3, 3), math.nan)).isnan()


def test_timescales():
    check_timescales(dynamics.timescales)
    found = dynamics.timescales(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    assert found.eigenvalues.tolist() == [2, 0] and found.times.tolist() == [0.5, math.inf]


# --- sharpness --------------------------------------------------------------------------------------------------------


def quadratic(eigenvalues, seed=0):
    """(loss, parameters, H) with loss = w·Hw / 2 + g·w in two tensors."""
    n = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))
    h = q @ torch.diag(torch.tensor(eigenvalues, dtype=F64)) @ q.T
    slope = torch.randn(n, generator=generator, dtype=F64)
    params = [torch.randn(2, dtype=F64, generator=generator), torch.randn(n - 2, dtype=F64, generator=generator)]
    params = [p.requires_grad_() for p in params]

    def loss():
        w = torch.cat(params)
        return w @ h @ w / 2 + slope @ w

    return loss, params, h


def network(dtype=F64):
    torch.manual_seed(3)
    params = [
        p.detach().to(dtype).requires_grad_()
        for layer in (nn.Linear(4, 5), nn.Linear(5, 3))
        for p in layer.parameters()
    ]
    x, y = torch.randn(20, 4, dtype=F64), torch.randint(0, 3, (20,))

    def loss():
        w, a, v, b = (p.double() for p in params)
        return nn.functional.cross_entropy(torch.tanh(x @ w.T + a) @ v.T + b, y)

    return loss, params


def check_sharpness(function):
    cases = [quadratic(w) for w in ([1, 2, 5, 9.0], [-20, 1, 2, 3.0], [-1, -2, -3, -9.0], [-3, 0.5, 1, 3.0])]
    for loss, params, h in [*cases, (*network(), None)]:
        h = reference.hessian(loss, params) if h is None else h
        w = torch.linalg.eigvalsh(h)
        found = function(loss, params, tol=1e-4, iterations=400, generator=torch.Generator().manual_seed(1))
        largest, second = w[-1].item(), w[-2].item()
        assert second < found.value <= largest + 1e-12 * w.abs().max()
        # Kato and Temple.
        assert largest - found.value <= found.residual**2 / (found.value - second) + 1e-12 * w.abs().max()
        v = torch.cat([x.flatten() for x in found.vector])
        torch.testing.assert_close((h @ v - found.value * v).norm().item(), found.residual, rtol=1e-6, atol=1e-12)
        assert abs(v.norm().item() - 1) < 1e-12


def check_sam(function):
    """A float32 network whose loss is computed in float64: nothing but the perturbation is rounded."""
    loss, params = network(torch.float32)
    before = [p.detach().clone() for p in params]

    def at(step):
        """(loss, gradient) at w + step, and w back."""
        with torch.no_grad():
            for w, part in zip(params, step.split([w.numel() for w in params])):
                w.data = w.double() + part.view_as(w)
        value = loss()
        found = torch.cat([g.flatten() for g in torch.autograd.grad(value, params)])
        for w, kept in zip(params, before):
            w.data = kept.clone()
        return value.item(), found

    flat = torch.cat([p.detach().double().flatten() for p in params])
    for p in (1.0, 1.5, 2.0, 5.0, math.inf):
        found = function(loss, params, rho=0.3, p=p)
        assert all(torch.equal(a, b) for a, b in zip(before, params))
        grads = torch.autograd.grad(loss(), params)
        step = torch.cat([e.double().flatten() for e in ascent(params, grads, rho=0.3, p=p)])
        assert abs(torch.linalg.vector_norm(step, p).item() - 0.3) < 1e-6
        (start, _), (end, slope) = at(0 * step), at(step)
        # Each element of w + e is rounded once, e itself at most 8 times in either; that moves the loss along `slope`,
        # and by second-order terms that are smaller still: twice as much covers both.
        moved = U * (flat.abs() + step.abs()) + 16 * U * step.abs()
        assert abs(found - (end - start)) <= 2 * (slope.abs() @ moved).item() + 1e-15


def test_sharpness():
    check_sharpness(dynamics.sharpness)


def test_sam_sharpness():
    check_sam(dynamics.sam_sharpness)
    w = torch.zeros(3, requires_grad=True)
    assert dynamics.sam_sharpness(lambda: w.square().sum(), [w]) == 0


def test_hessian_vector_product():
    for loss, params in (quadratic([1, -2, 5, 9.0])[:2], network()):
        h = reference.hessian(loss, params)
        v = [torch.randn_like(p) for p in params]
        found = torch.cat([x.flatten() for x in dynamics.hessian_vector_product(loss, params, v)])
        torch.testing.assert_close(found, h @ torch.cat([x.flatten() for x in v]), rtol=1e-12, atol=1e-12)
    w = torch.ones(3, requires_grad=True)
    assert dynamics.hessian_vector_product(lambda: w.sum(), [w], [torch.ones(3)])[0].tolist() == [0, 0, 0]


# --- laws -------------------------------------------------------------------------------------------------------------

TIMES = torch.linspace(0, 6, 13, dtype=F64)


def check_logistic(function):
    for a, b, start in ((1.3, 0.7, 0.01), (2.0, 1.0, 5.0), (-0.5, 1.0, 1.0)):
        # 200 substeps of 0.0025 and a rate below 10: Runge and Kutta's rule is at most (0.025)^4 off, relatively.
        torch.testing.assert_close(
            function(TIMES, a, b, start), reference.logistic(TIMES, a, b, start), rtol=1e-6, atol=0
        )


def slopes(t):
    return 0.5 + math.exp(-t), 1 + 0.5 * math.sin(t)


def check_path(function):
    rule = {"alpha": 1.5, "beta": 0.4, "d_data": 12.0, "start": 2.0}
    errors = []
    for n in (25, 49):
        times = torch.linspace(0, 6, n, dtype=F64)
        lost, penalty = zip(*map(slopes, times.tolist()))
        exact = reference.dimension_path(times, lambda t: slopes(t)[0], lambda t: slopes(t)[1], **rule)
        errors.append((function(times, lost, penalty, **rule) - exact).abs().max().item())
    assert 3.5 < errors[0] / errors[1] < 4.5  # of second order: half the step, a quarter of the error
    assert errors[1] < 1e-2
    # Constant L and R: exact, whatever the step, and at the fixed point in the end.
    for penalty in (0.3, 0.0):
        path = function(TIMES, [2.0] * 13, [penalty] * 13, **rule)
        exact = reference.dimension_path(TIMES, lambda t: 2.0, lambda t, r=penalty: r, **rule)
        torch.testing.assert_close(path, exact, rtol=1e-7, atol=0)
    far = function([0.0, 1e6], [2.0] * 2, [0.3] * 2, **rule)[1]
    del rule["start"]
    torch.testing.assert_close(far, dynamics.dimension_fixed_point(2.0, 0.3, **rule), rtol=1e-14, atol=0)


def check_fixed_point(function):
    """Where the slope vanishes, and nowhere else."""
    d = function(2.0, 0.3, alpha=1.5, beta=0.4, d_data=12.0).item()
    assert abs(1.5 * 2.0 * (12.0 - d) - 0.4 * d * 0.3) < 1e-12


def test_logistic():
    check_logistic(dynamics.logistic)
    with pytest.raises(ValueError, match="a is 0"):
        dynamics.logistic(1.0, 0.0, 1.0, 1.0)


def test_dimension_path():
    check_path(dynamics.dimension_path)
    check_fixed_point(dynamics.dimension_fixed_point)


@pytest.mark.parametrize("first", [0.0, 2.0])
@pytest.mark.parametrize("a, b, start", [(1.3, 0.7, 0.01), (4.0, 1.0, 1e-4), (0.8, 0.2, 20.0)])
def test_fit_logistic_finds_what_made_the_data(a, b, start, first):
    times = TIMES + first
    fit = dynamics.fit_logistic(times, dynamics.logistic(times, a, b, start))
    assert fit.r2 > 1 - 1e-12
    torch.testing.assert_close(torch.tensor(fit[:3]), torch.tensor([a, b, start]), rtol=1e-4, atol=0)


def test_fit_logistic_of_something_else_says_so():
    assert dynamics.fit_logistic(TIMES, 2 + torch.sin(3 * TIMES)).r2 < 0.5


def test_fit_dimension_finds_what_made_the_data():
    lost, penalty = zip(*map(slopes, TIMES.tolist()))
    rule = {"alpha": 1.5, "beta": 0.4, "d_data": 12.0, "start": 2.0}
    fit = dynamics.fit_dimension(TIMES, lost, penalty, dynamics.dimension_path(TIMES, lost, penalty, **rule))
    assert fit.r2 > 1 - 1e-9
    for name, value in rule.items():
        assert abs(getattr(fit, name) / value - 1) < 1e-3
    wave = 5 + 4 * torch.sin(3 * TIMES)
    assert dynamics.fit_dimension(TIMES, torch.ones(13), torch.ones(13), wave).r2 < 0.5


# --- mutations --------------------------------------------------------------------------------------------------------


def changed(function, change):
    return lambda *args, **kwargs: change(function(*args, **kwargs))


def with_options(function, **wrong):
    """The options named, scaled."""
    return lambda *args, **kwargs: function(*args, **{k: v * wrong.get(k, 1) for k, v in kwargs.items()})


MUTANTS = {
    "dimension of singular values, not of their squares": (
        check_gradient_dimension,
        lambda g: torch.linalg.svdvals(g).sum(-1) ** 2 / torch.linalg.svdvals(g).square().sum(-1),
    ),
    "participation ratio of the matrix itself": (
        check_gradient_dimension,
        lambda g: g.square().sum((-2, -1)) ** 2 / g.pow(4).sum((-2, -1)),
    ),
    "dimension off by 1e-3": (check_gradient_dimension, changed(dynamics.gradient_dimension, lambda d: d * 1.001)),
    "stable rank without squares": (
        check_stable_rank,
        lambda g, tol: torch.linalg.vector_norm(g, dim=(-2, -1)) / torch.linalg.matrix_norm(g, 2),
    ),
    "nuclear norm": (check_stable_rank, lambda g, tol: reference.stable_rank(g) * 0 + torch.linalg.svdvals(g).sum(-1)),
    "one squaring fewer": (
        check_stable_rank,
        lambda g, tol: dynamics.stable_rank(g, tol=min(0.9, 2 * tol)) * (1 - tol),
    ),
    "times of the sum, not the mean": (
        check_timescales,
        lambda x, rate: dynamics.timescales(x * math.sqrt(x.shape[0]), rate=rate),
    ),
    "rate ignored": (check_timescales, lambda x, rate: dynamics.timescales(x)),
    "largest magnitude": (
        check_sharpness,
        lambda loss, params, **options: dynamics.sharpness(lambda: -loss(), params, **options),
    ),
    "not the Rayleigh quotient": (
        check_sharpness,
        changed(dynamics.sharpness, lambda s: s._replace(value=s.value + 2 * s.residual + 1e-6)),
    ),
    "the dual exponent": (
        check_sam,
        lambda loss, params, rho, p: dynamics.sam_sharpness(
            loss, params, rho=rho, p=1.0 if math.isinf(p) else math.inf if p == 1 else p / (p - 1)
        ),
    ),
    "half the radius": (check_sam, with_options(dynamics.sam_sharpness, rho=0.5)),
    "off by 1e-6": (check_sam, changed(dynamics.sam_sharpness, lambda x: x + 1e-6)),
    "a and b swapped": (check_logistic, lambda t, a, b, start: dynamics.logistic(t, b, a, start)),
    "forgets its start": (check_logistic, lambda t, a, b, start: dynamics.logistic(t, a, b, 1.001 * start)),
    "alpha off": (check_path, with_options(dynamics.dimension_path, alpha=1.01)),
    "beta off": (check_path, with_options(dynamics.dimension_path, beta=1.01)),
    "Euler's rule": (
        check_path,
        lambda t, lost, r, alpha, beta, d_data, start: euler(t, lost, r, alpha, beta, d_data, start),
    ),
    "fixed point without R": (check_fixed_point, lambda lost, r, alpha, beta, d_data: torch.tensor(d_data)),
    "fixed point with alpha and beta swapped": (
        check_fixed_point,
        lambda lost, r, alpha, beta, d_data: dynamics.dimension_fixed_point(
            lost, r, alpha=beta, beta=alpha, d_data=d_data
        ),
    ),
}


def euler(times, lost, penalty, alpha, beta, d_data, start):
    d, path = start, [start]
    for i in range(len(times) - 1):
        slope = alpha * float(lost[i]) * (d_data - d) - beta * d * float(penalty[i])
        d += float(times[i + 1] - times[i]) * slope
        path.append(d)
    return torch.tensor(path, dtype=F64)


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_formulas_are_found(name):
    check, wrong = MUTANTS[name]
    with pytest.raises(AssertionError):
        check(wrong)


# --- the gap ----------------------------------------------------------------------------------------------------------


def test_gap_stops_when_the_held_out_loss_has_left_its_minimum_for_good():
    gap = dynamics.MemorizationGap(patience=2, tolerance=0.1)
    test = [3.0, 2.0, 1.0, 1.05, 1.2, 1.0, 1.2, 1.3, 0.5]
    stops = [bool(gap.update(0.5, x)) for x in test]
    # 1.05 is within the tolerance; one value of 1.2 is not enough; once given, the signal stays.
    assert stops == [False] * 7 + [True] * 2
    assert gap.best == 0.5 and gap.best_update == 8 and gap.updates == 9 and gap.gap == 0.0


def test_gap_of_tensors_and_of_nan():
    gap = dynamics.MemorizationGap(patience=1, tolerance=0.0)
    assert not gap.update(torch.tensor(1.0), torch.tensor(2.0, requires_grad=True))
    assert gap.gap == 1 and not gap.gap.requires_grad
    assert gap.update(1.0, math.nan) and gap.best == 2


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: dynamics.gradient_dimension(torch.ones(3)), ValueError, r"shape \(3,\), expected \(\.\.\., m, n\)"),
        (lambda: dynamics.gradient_dimension(torch.ones(3, 3).int()), TypeError, "torch.int32, expected a floating"),
        (lambda: dynamics.stable_rank(torch.ones(3, 3), tol=0.0), ValueError, "tol is 0.0"),
        (lambda: dynamics.timescales(torch.ones(0, 3)), ValueError, r"features has shape \(0, 3\)"),
        (lambda: dynamics.timescales(torch.ones(3, 3), rate=0.0), ValueError, "rate is 0.0"),
        (lambda: dynamics.sharpness(lambda: torch.ones(3), [torch.ones(1, requires_grad=True)]), ValueError, "0-dim"),
        (lambda: dynamics.sharpness(lambda: None, []), ValueError, "no parameter requires a gradient"),
        (
            lambda: dynamics.sam_sharpness(*network(torch.float32), rho=-1.0),
            ValueError,
            "is -1.0, expected a finite number >= 0",
        ),
        (lambda: dynamics.sam_sharpness(*network(torch.float32), p=0.5), ValueError, "p is 0.5"),
        (lambda: dynamics.fit_logistic([0.0, 1, 2, 3], [1.0, 2, 3, -1]), ValueError, "smallest of values is -1"),
        (lambda: dynamics.fit_logistic([0.0, 1, 1, 3], [1.0, 2, 3, 1]), ValueError, "do not increase"),
        (lambda: dynamics.fit_logistic([0.0, 1, 2], [1.0, 2, 3]), ValueError, r"shape \(3,\).*n >= 4"),
        (lambda: dynamics.MemorizationGap(patience=0), ValueError, "patience is 0"),
        (lambda: dynamics.MemorizationGap(tolerance=-0.1), ValueError, "tolerance is -0.1"),
        (lambda: dynamics.MemorizationGap().update(1.0, torch.ones(2)), ValueError, r"test has shape \(2,\)"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_is_part_of_the_package():
    assert steepest.dynamics is dynamics and "dynamics" in dir(steepest)
    assert all(hasattr(dynamics, name) for name in dynamics.__all__)
