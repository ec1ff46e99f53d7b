"""The polar factor on the CPU: accuracy against float64, degenerate input, batches, plans, and the verbs under it."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from polar_rounding import CountingVerbs, rounding_bound, scaled_singular_values

from steepest.conformance import zoo
from steepest.matrix.native import NativeVerbs, native_wins
from steepest.matrix.polar import _normalised_chain, _restarts, iterate, normalised, plan, polar
from steepest.matrix.verbs import TorchVerbs, full_float32
from steepest.reference import polar as reference
from steepest.reference import polar_svd
from steepest.schedules import NORM_MARGIN, Schedule, minimax, named

F64 = torch.float64
CPU = "native" if native_wins(torch.float32) else "torch"
SHAPES = [(48, 48), (64, 96), (40, 160), (101, 37), (1, 30), (30, 1)]
SPECTRA = ["gaussian", *zoo.SPECTRA]
SCHEDULES = [named("polar-express", 5), named("polar-express", 8), named("keller"), named("cans"), named("cubic")]
SCHEDULES += [minimax(2, 1e-8, steps=9), minimax(2, 1e-6, degree=3, steps=4)]


pytestmark = pytest.mark.usefixtures("one_thread")


def ids(schedule):
    return f"{schedule.name}x{schedule.steps}"


def relative(y, expected):
    return float((y.double() - expected).norm() / expected.norm())


# --- accuracy ---------------------------------------------------------------------------------------------------------


def test_large_gaussian_is_within_1e_5_of_float64():
    x, _ = zoo.matrix("gaussian", 768, 3072, seed=1)
    assert plan(x.shape).form == "gram"
    assert relative(polar(x), reference(x, dtype=F64)) <= 1e-5


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=ids)
def test_rounding_errors_stay_within_their_bound(schedule, spectrum):
    for m, n in SHAPES:
        x, _ = zoo.matrix(spectrum, m, n, seed=m + n)
        exact = reference(x, schedule=schedule, dtype=F64)
        for form in ("plain", "gram"):
            todo = plan(x.shape, schedule=schedule, form=form, backend="torch")
            error = (iterate(normalised(x[None], torch.float32), todo, TorchVerbs())[0].double() - exact).norm()
            assert error <= rounding_bound(todo, x), (form, m, n)
            todo = plan(x.shape, schedule=schedule, form=form, backend="native")
            error = (NativeVerbs().run(_normalised_chain, (x[None],), (todo,))[0].double() - exact).norm()
            assert error <= rounding_bound(todo, x), (form, m, n, "native")


@pytest.mark.parametrize(
    "name, steps", [("polar-express", 5), ("polar-express", 8), ("keller", 5), ("deepseek-v4", 10)]
)
def test_without_its_restarts_the_gram_form_breaks_that_bound(name, steps):
    """So the restarts are needed, and the bound is sharp enough to see it."""
    x, _ = zoo.matrix("steep power law", 100, 400, seed=3)
    todo = plan(x.shape, schedule=name, steps=steps, backend="torch")
    assert todo.form == "gram"
    assert todo.restarts
    unsafe = dataclasses.replace(todo, restarts=())
    exact = reference(x, schedule=name, steps=steps, dtype=F64)
    error = (iterate(normalised(x[None], torch.float32), unsafe, TorchVerbs())[0].double() - exact).norm()
    assert not error <= rounding_bound(todo, x)


@pytest.mark.parametrize("spectrum", ["gaussian", "log-uniform 1e-6", "rank one"])
def test_float64_is_computed_in_float64(spectrum):
    x, _ = zoo.matrix(spectrum, 60, 200, seed=5, dtype=F64)
    y = polar(x)
    assert y.dtype is F64
    assert (y - reference(x)).norm() <= 2 * rounding_bound(plan(x.shape, F64), x)  # both sides round
    lower_precision = polar(x.float(), dtype=F64)
    assert lower_precision.dtype is torch.float32
    # Computed in float64 from the float32 input, then rounded once.
    assert torch.equal(lower_precision, polar(x.float().double()).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_input_is_computed_in_float32(dtype):
    x = zoo.matrix("gaussian", 20, 50, seed=2)[0].to(dtype)
    assert plan(x.shape, dtype).dtype is torch.float32
    y = polar(x)
    assert y.dtype is dtype
    assert torch.equal(y, polar(x.float()).to(dtype))


@pytest.mark.parametrize(
    "first, slope, upper, unit, expected",
    [
        ((2, 2, 2, 2), 7.0, 1, 1e-9, (2,)),  # 1, 4, 16 > 14; then 1, 4
        ((2, 2, 2, 2), 8.0, 1, 1e-9, (3,)),  # 16 = 16 is read
        ((2, 2, 2, 2), 10.0, 2, 1e-9, (2,)),  # 4, 16, 64 > 20
        ((2, 2, 2, 2), 1e9, 1, 1 / 32, (3,)),  # 64 > 16
        ((1, 1, 1), 0.4, 1, 1e-9, (1, 2)),  # never before the first step
    ],
)
def test_a_run_ends_where_it_would_read_more_than_its_budget(first, slope, upper, unit, expected):
    schedule = SimpleNamespace(
        coefficients=[(c, -1.0, 0.5) for c in first], slope=slope, intervals=[(0.0, upper)] + [(0.0, 1)] * len(first)
    )
    assert _restarts(schedule, unit) == expected


def test_half_precision_plan_restarts_after_step_2_and_stays_within_the_bound():
    """The float16 arithmetic of a GPU, its products accumulated in float32, emulated."""
    for spectrum in ("gaussian", "log-uniform 1e-3", "rank deficient", "rank one"):
        x, _ = zoo.matrix(spectrum, 64, 256, seed=4)
        for name in ("polar-express", "polar-express-safe"):
            todo = plan(x.shape, torch.float16, "cuda", schedule=name)
            assert (todo.form, todo.restarts, todo.dtype) == ("gram", (2,), torch.float16)
            y = iterate(normalised(x[None], torch.float16), todo, CountingVerbs())[0]
            exact = reference(x, schedule=name, dtype=F64)
            assert (y.double() - exact).norm() <= rounding_bound(todo, x)


def test_minimax_tol_certifies_what_comes_out():
    """All σ ≥ lower·ν come out within tol of 1, in float64, where rounding (1e-16 · slope) is far below tol."""
    x, _ = zoo.matrix("log-uniform 1e-3", 50, 80, seed=6, dtype=F64)
    lower = float(scaled_singular_values(x).min()) * 0.999
    for tol in (0.3, 1e-2, 1e-6):
        y = polar(x, tol=tol, lower=lower)
        assert (torch.linalg.svdvals(y) - 1).abs().max() <= tol * (1 + 1e-6)
        assert torch.linalg.matrix_norm(y - polar_svd(x), 2) <= tol * (1 + 1e-6)
    assert plan(x.shape, F64, lower=lower, tol=1e-6).steps > plan(x.shape, F64, lower=lower, tol=0.3).steps


@pytest.mark.parametrize("spectrum", [s for s in SPECTRA if s != "zero"])
def test_the_direction_is_right(spectrum):
    for m, n in SHAPES:
        x, _ = zoo.matrix(spectrum, m, n, seed=1)
        x = x / x.abs().max()  # "huge" squared is out of range
        cosine = (x * polar(x)).sum() / (x.norm() * polar(x).norm())
        assert cosine > 0, (m, n)


def test_reference_matches_the_singular_value_decomposition():
    x, _ = zoo.matrix("exponential", 30, 45, seed=7, dtype=F64)
    schedule = named("polar-express", 8)
    s = scaled_singular_values(x)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(reference(x, steps=8), (u * schedule.apply(s**2)) @ vh, rtol=0, atol=1e-11)
    torch.testing.assert_close(polar_svd(x), u @ vh, rtol=0, atol=1e-12)
    rank_one = torch.ones(4, 9, dtype=F64)
    torch.testing.assert_close(polar_svd(rank_one), rank_one / 6)
    # What counts as zero does not depend on how many matrices a batch has.
    small = torch.diag(torch.tensor([1.0, 20 * torch.finfo(F64).eps], dtype=F64)).expand(100, 2, 2)
    torch.testing.assert_close(polar_svd(small), torch.eye(2, dtype=F64).expand(100, 2, 2))


# --- what goes in, what comes out ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 3, 4), (2, 0, 3)])
def test_empty(shape):
    y = polar(torch.empty(shape, requires_grad=True))
    assert y.shape == shape
    assert not y.requires_grad


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)])
def test_vectors_are_normalised(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    f = named("polar-express", 8).apply(1 / (1 + NORM_MARGIN) ** 2)
    torch.testing.assert_close(polar(x, steps=8), x / x.norm() * f, rtol=1e-4, atol=0)
    assert torch.equal(torch.sign(polar(x)), torch.sign(x))


def test_normalising_keeps_the_sign_and_goes_by_the_largest_magnitude():
    x = torch.rand(2, 3, 4, dtype=F64, generator=torch.Generator().manual_seed(0)) + 0.5
    x[0] *= -1  # nothing is positive
    x[1, 0, 0] = -1e200  # whose square leaves the range
    for size in (1.0, 0.25):
        y = normalised(x, F64, size)
        expected = size * x / (x / 1e200).norm(dim=(1, 2), keepdim=True) / 1e200 / (1 + NORM_MARGIN)
        expected[0] = size * x[0] / x[0].norm() / (1 + NORM_MARGIN)
        # 12 squares and their sum, a root, five quotients and products, in each of the two.
        torch.testing.assert_close(y, expected, rtol=2 * 20 * 2.0**-53, atol=0)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e30, 3e38])
def test_scale_does_not_matter(scale):
    x = zoo.matrix("gaussian", 12, 30, seed=3, dtype=F64)[0]
    x = (x / x.abs().max() * scale).float()  # at 1e-44 a subnormal integer between -7 and 7
    y = polar(x)
    exact = reference(x, dtype=F64)
    assert (y.double() - exact).norm() <= rounding_bound(plan(x.shape), x)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_scale_does_not_matter_in_float64(scale):
    x = zoo.matrix("gaussian", 12, 30, seed=3, dtype=F64)[0]
    assert (polar(x * scale) - polar(x)).norm() <= 2 * rounding_bound(plan(x.shape, F64), x)
    # A float64 matrix out of float32's range can still be worked on in float32.
    exact = reference(x, dtype=F64)
    assert (polar(x * scale, dtype=torch.float32) - exact).norm() <= rounding_bound(plan(x.shape), x)


def test_no_rounding_of_the_norm_lets_a_singular_value_exceed_one():
    """Rank one puts all of ‖X‖_F into σ_max; a float32 norm of this input is 5e-4 too small."""
    x = torch.rand(2048, 1, generator=torch.Generator().manual_seed(0)) @ torch.rand(1, 4096)
    y = normalised(x[None], torch.float32)
    sigma = y.double().norm().item()  # of rank one up to rounding
    assert sigma == pytest.approx(1 / (1 + NORM_MARGIN), rel=4 * 2**-24)
    assert sigma < named("polar-express", 5).largest_safe


def test_bad_matrices_do_not_disturb_their_neighbours():
    """Good matrices come out bit for bit as with other neighbours."""
    for shape in [(6, 8, 12), (6, 7, 9), (6, 12, 8), (6, 1, 5), (5, 520, 530)]:
        good = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        x = good.clone()
        x[1, 0, 2 % shape[2]] = math.nan
        x[2, -1, 0] = math.inf
        x[3] = 0
        x[4] = -math.inf
        y, expected = polar(x), polar(good)
        for i in (1, 2, 4):
            assert y[i].isnan().all()
        assert torch.equal(y[3], torch.zeros_like(y[3]))
        for i in (0, *range(5, shape[0])):
            assert y[i].isfinite().all()
            assert torch.equal(y[i], expected[i]), (shape, i)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_matrix_of_a_batch_comes_out_as_it_would_alone(threads, backend):
    """Bit for bit, by torch where matrices are at multiples of 64 bytes: MKL rounds by their alignment."""
    torch.set_num_threads(threads)
    for shape in [(3, 4, 8, 12), (2, 32, 132), (2, 132, 32), (2, 600, 700), (9, 16, 16), (3, 4, 7, 9), (2, 33, 131)]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        aligned = backend == "native" or shape[-1] % 4 == shape[-2] % 4 == 0
        for y, matrix in zip(polar(x, backend=backend).flatten(0, -3), x.flatten(0, -3)):
            alone = polar(matrix, backend=backend)
            bound = 0 if aligned else 2 * rounding_bound(plan(matrix.shape, backend=backend), matrix)
            assert (y - alone).norm() <= bound, shape


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (3, 20, 50)])
def test_strides_do_not_matter(shape):
    """The same values in another layout: results agree up to the rounding of both."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    gaps = torch.full((*shape[:-2], 2 * shape[-2], 3 * shape[-1]), math.nan)[..., ::2, ::3]
    gaps.copy_(x)
    row = x[..., :1, :].expand(shape)
    layouts = [(x, gaps), (x, x.mT.contiguous().mT), (x, x.flip(-1).flip(-1)), (row.contiguous(), row)]
    for dense, other in layouts:
        assert torch.equal(dense, other)
        ys = zip(
            polar(dense).reshape(-1, *shape[-2:]), polar(other).reshape(-1, *shape[-2:]), dense.reshape(-1, *shape[-2:])
        )
        for expected, found, matrix in ys:
            assert (found - expected).norm() <= 2 * rounding_bound(plan(matrix.shape), matrix)
    assert polar(x).is_contiguous()


def test_transposing_commutes():
    x = torch.randn(30, 70, generator=torch.Generator().manual_seed(4))
    assert (polar(x.mT) - polar(x).mT).norm() <= 2 * rounding_bound(plan(x.shape), x)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (2, 9, 9), (520, 600)])
def test_input_is_not_changed_and_gradients_do_not_flow(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    kept = x.clone()
    y = polar(x.requires_grad_())
    assert not y.requires_grad
    assert torch.equal(x, kept)
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("setting", ["medium", "high"])
def test_reduced_matmul_precision_is_not_taken(setting):
    """oneDNN takes over at "medium" and rounds otherwise even where it has no bfloat16 units."""
    x = torch.randn(256, 300, generator=torch.Generator().manual_seed(6))
    expected = polar(x)
    torch.set_float32_matmul_precision(setting)
    try:
        found = torch.backends.mkldnn.matmul.fp32_precision
        assert torch.equal(polar(x), expected)
        assert torch.backends.mkldnn.matmul.fp32_precision == found
        assert torch.get_float32_matmul_precision() == setting
        with pytest.raises(KeyError), full_float32():
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            raise KeyError
        assert torch.backends.mkldnn.matmul.fp32_precision == found
    finally:
        torch.set_float32_matmul_precision("highest")


def test_autocast_is_not_taken():
    x = torch.randn(64, 80, generator=torch.Generator().manual_seed(7))
    expected = polar(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(polar(x), expected)


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES, ids=ids)
@pytest.mark.parametrize("form", ["plain", "gram"])
def test_what_is_executed_is_what_was_planned(schedule, form):
    for shape in [(2, 16, 64), (2, 64, 16)]:
        for dtype, device in [(torch.float32, "cpu"), (torch.float16, "cuda")]:
            todo = plan(shape, dtype, device, schedule=schedule, form=form)
            counting = CountingVerbs()
            iterate(normalised(torch.randn(shape), todo.dtype), todo, counting)
            assert counting.calls == {name: getattr(todo, name) for name in counting.calls}


def test_products_of_the_gram_form():
    """At most d + 2 n × n products per step; the first Q is the polynomial itself, the last M is never computed."""
    todo = plan((100, 400))
    assert (todo.form, todo.restarts, todo.steps) == ("gram", (3,), 5)
    assert (todo.grams, todo.symmetric_products, todo.long_products) == (2, 9 + 5, 2)
    assert plan((100, 400), backend="torch").flops == 2 * 100**2 * (4 * 400 + 14 * 100)
    single = plan((100, 400), schedule="keller", steps=1, form="gram")
    assert (single.grams, single.symmetric_products, single.long_products) == (1, 1, 1)


def test_form_follows_the_flops():
    assert plan((512, 512)).form == "plain"
    assert plan((512, 2048)).form == "gram"
    assert plan((2048, 512)).form == "gram"
    for shape in [(100, 130), (300, 420), (600, 640), (600, 900), (3, 700, 800)]:
        forms = {form: plan(shape, form=form) for form in ("plain", "gram")}
        assert plan(shape) == min(forms.values(), key=lambda p: p.flops)
    assert plan((5, 100, 400)).flops == 5 * plan((100, 400)).flops


def test_working_precision_and_backend_by_device():
    chosen = {
        (torch.float32, "cpu"): (torch.float32, CPU),
        (torch.float64, "cpu"): (torch.float64, "torch"),
        (torch.bfloat16, "cpu"): (torch.float32, CPU),
        (torch.float32, "cuda"): (torch.float32, "triton"),
        (torch.float16, "cuda"): (torch.float16, "triton"),
        (torch.bfloat16, "cuda"): (torch.float16, "triton"),
        (torch.float64, "cuda"): (torch.float64, "torch"),
    }
    for (dtype, device), expected in chosen.items():
        todo = plan((64, 256), dtype, device)
        assert (todo.dtype, todo.backend) == expected
    assert plan((64, 256), torch.float32, "cuda", working=torch.bfloat16).form == "plain"
    with pytest.raises(ValueError, match="Gram form is refused in bfloat16"):
        plan((64, 256), torch.float32, "cuda", working=torch.bfloat16, form="gram")


@pytest.mark.parametrize(
    "x, options, error, message",
    [
        (torch.ones(3), {}, ValueError, r"at least 2 dimensions, got shape \(3,\)"),
        (torch.ones(3, 3, dtype=torch.int64), {}, TypeError, "got torch.int64"),
        (torch.ones(3, 3, dtype=torch.bool), {}, TypeError, "got torch.bool"),
        (torch.ones(3, 3, dtype=torch.complex64), {}, TypeError, "got torch.complex64"),
        ([[1.0]], {}, TypeError, "x is a list"),
        (torch.ones(3, 3), {"dtype": torch.int32}, TypeError, r"dtype must be .* got torch.int32"),
        (torch.ones(3, 3), {"dtype": torch.float16}, ValueError, "the CPU works in float32 or float64"),
        (torch.ones(3, 3), {"schedule": "newton"}, ValueError, "unknown schedule 'newton'"),
        (torch.ones(3, 3), {"schedule": [1, 2, 3]}, TypeError, "schedule is a list"),
        (torch.ones(3, 3), {"schedule": minimax(4, 1e-4, steps=3)}, ValueError, r"must have p = 2, .* has p = 4"),
        (torch.ones(3, 3), {"schedule": Schedule(((1.5, -0.5),), 2, 0.1, 0.5)}, ValueError, "must reach up to 1"),
        (torch.ones(3, 3), {"schedule": named("cans"), "tol": 0.1}, ValueError, "do not give it together"),
        (torch.ones(3, 3), {"schedule": "cans", "steps": 6}, ValueError, "asked for 6 steps, it defines 5"),
        (torch.ones(3, 3), {"steps": 0}, ValueError, "steps must be a positive integer"),
        (torch.ones(3, 3), {"lower": 0.0}, ValueError, r"lower must be in \(0, 1\]"),
        (torch.ones(3, 3), {"tol": 1e-17}, ValueError, "cannot be reached"),
        (torch.ones(3, 3), {"backend": "triton"}, ValueError, "needs a CUDA tensor"),
        (torch.ones(3, 3), {"backend": "cublas"}, ValueError, "backend must be"),
    ],
)
def test_refuses(x, options, error, message):
    with pytest.raises(error, match=message):
        polar(x, **options)
