"""The C library's matrix programs: values, layouts, memory, threads, batches, counts, refusals."""

import math
import re

import pytest
import torch

import steepest
from steepest._native import lib
from steepest.matrix import roots
from steepest.matrix.native import (
    DTYPES,
    LARGE,
    NativeVerbs,
    Program,
    Recorder,
    general_work,
    program,
    symmetric_work,
)
from steepest.matrix.polar import UNIT_ROUNDOFF, _normalised_chain
from steepest.matrix.polar import plan as polar_plan
from steepest.matrix.root_plan import plan as root_plan
from steepest.matrix.verbs import TorchVerbs

F32, F64 = torch.float32, torch.float64
RUN = {F32: 256, F64: 128}  # terms that are summed before the next packed part begins
# Around tiles (8, 16, 48), runs, and the sides of tasks (192, 256, 384).
SIZES = [1, 3, 8, 15, 17, 47, 49, 64, 100, 129, 193, 257, 400]


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def normal(*shape, seed=0, dtype=F32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def symmetric(*shape, seed=0, dtype=F32):
    x = normal(*shape, seed=seed, dtype=dtype)
    return (x + x.mT) / 2


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("n", SIZES)
def test_products_are_within_their_running_error_bound(n, dtype):
    """Element by element within (k + 4) u Σ|terms|; the float64 expectation of a float64 result errs as much again."""
    u = UNIT_ROUNDOFF[dtype] * (2 if dtype is F64 else 1)
    m = n + 5
    x, verbs = normal(2, n, m, dtype=dtype), NativeVerbs()
    wide = x.double()
    size = wide.abs() @ wide.abs().mT
    for y in (verbs.gram(x), verbs.gram(x.mT.contiguous().mT)):
        assert torch.equal(y, y.mT)
        assert ((y - wide @ wide.mT).abs() <= (m + 4) * u * size).all()
    a = symmetric(2, n, n, dtype=dtype)
    c = symmetric(2, n, n, seed=1, dtype=dtype)
    d = a.double()
    got = verbs.symmetric_product(a, a, alpha=-0.75, beta=2.5, c=c, diagonal=1.5)
    eye = torch.eye(n, dtype=F64)
    exact = -0.75 * (d @ d) + 2.5 * c.double() + 1.5 * eye
    assert (
        (got - exact).abs() <= (n + 4) * u * (0.75 * (d.abs() @ d.abs()) + 2.5 * c.double().abs() + 1.5 * eye)
    ).all()
    assert torch.equal(got, got.mT)
    got = verbs.commuting_product(a, c, beta=0.5, c=x[..., :n])
    exact, terms = d @ c.double() + 0.5 * wide[..., :n], d.abs() @ c.double().abs() + 0.5 * wide[..., :n].abs()
    assert ((got - exact).abs() <= (n + 4) * u * terms).all()
    for operand in (x, x.mT.contiguous().mT):
        got = verbs.long_product(a, operand, alpha=0.5, shift=-2.0)
        exact, terms = 0.5 * (d @ wide) - 2 * wide, 0.5 * (d.abs() @ wide.abs()) + 2 * wide.abs()
        assert ((got - exact).abs() <= (n + 4) * u * terms).all()
        assert got.is_contiguous() == operand.is_contiguous()


def test_only_the_lower_triangle_of_a_product_that_is_not_symmetric_counts():
    a, b = normal(1, 70, 70), normal(1, 70, 70, seed=1)
    a = (a + a.mT) / 2
    got = NativeVerbs().symmetric_product(a, b)
    lower = (a.double() @ b.double()).tril()
    assert (got - (lower + lower.tril(-1).mT)).abs().max() <= 74 * 2**-24 * (a.abs() @ b.abs()).max()


@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 5, 70), (2, 70, 5), (1, 300, 513)])
def test_elementwise_operations(shape):
    x, u = normal(*shape), 2.0**-24
    verbs = NativeVerbs()
    y = verbs.run(Recorder.normalised, (x,), (0.5,))
    exact = 0.5 * x.double() / torch.linalg.matrix_norm(x.double(), keepdim=True)
    assert ((y - exact).abs() <= 2 * u * exact.abs()).all()
    got = verbs.run(_combined, (x, y), (3.0, -2.0))
    exact = 3 * x.double() - 2 * y.double()
    assert ((got - exact).abs() <= 3 * u * (3 * x.double().abs() + 2 * y.double().abs())).all()
    there = verbs.run(_converted, (x,), (F64,))
    assert there.dtype is F64 and torch.equal(there, x.double())
    assert torch.equal(verbs.run(_converted, (there + 1e-12,), (F32,)), (there + 1e-12).float())


def _combined(verbs, x, y, alpha, beta):
    return verbs.combination(x, alpha=alpha, beta=beta, c=y)


def _converted(verbs, x, dtype):
    return verbs.combination(x, dtype=dtype)


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e38])
def test_normalising_and_symmetrising_keep_to_the_range(scale):
    x = (torch.randint(-3, 4, (2, 20, 20), generator=torch.Generator().manual_seed(0)) * scale).float()
    y = NativeVerbs().run(Recorder.normalised, (x,), (1.0,))
    torch.testing.assert_close(torch.linalg.matrix_norm(y), torch.ones(2), rtol=20 * 2**-24, atol=0)
    y, sizes = NativeVerbs().run(Recorder.symmetrised, (x,))
    rows = ((x.double() + x.double().mT) / 2).abs().sum(-1).amax(-1)
    torch.testing.assert_close(sizes[:, 0, 0], rows, rtol=1e-14, atol=0)
    exact = (x.double() + x.double().mT) / 2 / rows[:, None, None]
    assert ((y - exact).abs() <= 2 * 2.0**-24 * exact.abs()).all() and torch.equal(y, y.mT)
    torch.testing.assert_close(sizes[:, 0, 1], torch.linalg.matrix_norm(exact), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(1, 1), (5, 70), (300, 513)])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_dividing_by_a_norm(shape, power):
    """The squares are summed in double, rows one after another: so many additions err by half a unit each at most."""
    x = normal(3, *shape)
    x[0] = 0
    norm, y = NativeVerbs().run(_divided_by_its_norm, (x,), (power, 1.5))
    exact = torch.linalg.matrix_norm(x.double(), keepdim=True)
    torch.testing.assert_close(norm, exact, rtol=sum(shape) * 2.0**-53, atol=0)
    expected = x.double() / (1.5 * exact.where(exact != 0, 1) ** power)
    assert ((y - expected).abs() <= 1.01 * 2.0**-24 * expected.abs()).all()
    assert torch.equal(NativeVerbs().run(_divided_by_its_norm_transposed, (x,), (power, 1.5)), y.mT)


def _divided_by_its_norm(verbs, x, power, factor):
    norm = verbs.norm(x)
    return norm, verbs.divided(x, norm, power=power, factor=factor)


def _divided_by_its_norm_transposed(verbs, x, power, factor):
    return verbs.divided(x.mT, verbs.norm(x), power=power, factor=factor)


def test_a_norm_of_what_is_not_finite_is_nan_and_so_is_all_that_it_divides():
    x = normal(3, 6, 6)
    x[0, 5, 0], x[1, 0, 5] = math.nan, math.inf
    norm, y = NativeVerbs().run(_divided_by_its_norm, (x,), (1.0, 1.0))
    assert norm.isnan().flatten().tolist() == [True, True, False]
    assert y[:2].isnan().all() and y[2].isfinite().all()


@pytest.mark.parametrize("verbs", [NativeVerbs(), TorchVerbs()], ids=["native", "torch"])
def test_the_bound_of_the_largest_eigenvalue_is_the_least_of_three(verbs):
    sizes = torch.tensor([[5.0, 0.75], [5, 3], [5, 3], [0, 0], [5, math.nan], [5, 0.75], [5, 0.75]], dtype=F64)[:, None]
    before, after = normal(7, 4, 9), normal(7, 4, 9, seed=1)
    before /= before.norm(dim=-1, keepdim=True)
    after /= after.norm(dim=-1, keepdim=True)
    growth = torch.tensor([[0.1, 2, 0, 0.3], [1, 0.2, 0.2, 0.2], [0.1, 0.2, 0.1, 0.4]] + 4 * [[0, 0, 0, 0.25]])
    after *= growth[..., None]
    before[3] = 0
    before[5, 1, 2], after[6, 0, 0] = math.nan, math.nan
    bound = verbs.run(_spectral_bound, (sizes, before, after))[:, 0, 0] / (1 + 2.0**-12)
    expected = torch.tensor([0.75, 1, 0.8, 0, math.nan, math.nan, math.nan], dtype=F64)
    torch.testing.assert_close(bound, expected, rtol=9 * 2**-24, atol=0, equal_nan=True)


def _spectral_bound(verbs, sizes, before, after):
    return verbs.spectral_bound(sizes, before, after)


@pytest.mark.parametrize("n", [5, 64])
def test_zero_stays_zero_and_what_is_not_finite_is_all_nan(n):
    x = normal(4, n, n)
    x[0] = 0
    x[1, 0, n - 1], x[2, n - 1, 0] = math.nan, -math.inf
    verbs = NativeVerbs()
    for y in (verbs.run(Recorder.normalised, (x,), (1.0,)), verbs.run(Recorder.symmetrised, (x,))[0]):
        assert not y[0].any() and y[1].isnan().all() and y[2].isnan().all() and y[3].isfinite().all()


# --- memory, threads, batches -----------------------------------------------------------------------------------------


def spread(x, gap, offset):
    """The same matrices with NaN between their rows, at another address."""
    batch, rows, cols = x.shape
    whole = torch.full((batch * rows * (cols + gap) + offset + 1,), math.nan, dtype=x.dtype)
    place = whole[offset : offset + batch * rows * (cols + gap)].view(batch, rows, cols + gap)[..., :cols]
    place.copy_(x)
    return place


def chain(verbs, x, a):
    """Every kind of product; what comes out is read by later operations too."""
    x = verbs.normalised(x, 0.9)
    m = verbs.gram(x)
    q = verbs.symmetric_product(m, m, alpha=0.5, beta=-1.25, c=m, diagonal=1.0)
    wide = verbs.symmetric_product(*2 * [verbs.combination(q, dtype=F64)])
    q = verbs.combination(wide, dtype=F32)
    y = verbs.long_product(q, x, alpha=0.75, shift=0.5)
    z = verbs.long_product(a, y.mT).mT
    return m, y, z, verbs.gram(z.mT)


@pytest.mark.parametrize("shape", [(5, 20, 33), (3, 64, 64), (1, 130, 400), (3, 300, 300), (2, 390, 280)])
def test_bits_do_not_depend_on_layout_threads_or_batch(shape):
    x = normal(*shape)
    a = symmetric(shape[0], shape[2], shape[2], seed=1)
    verbs = NativeVerbs()
    expected = verbs.run(chain, (x, a))
    for gap, offset in ((1, 1), (7, 3), (16, 0)):
        assert all(map(torch.equal, verbs.run(chain, (spread(x, gap, offset), spread(a, gap, offset))), expected))
    for threads in (1, 3, 5):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, verbs.run(chain, (x, a)), expected)), threads
        for i in range(shape[0]):
            alone = verbs.run(chain, (x[i : i + 1], a[i : i + 1]))
            assert all(torch.equal(one[0], many[i]) for one, many in zip(alone, expected)), (threads, i)
    order = torch.arange(shape[0]).flip(0)
    assert all(torch.equal(y, z[order]) for y, z in zip(verbs.run(chain, (x[order], a[order])), expected))


@pytest.mark.parametrize("batch, n, m", [(3, 13, 29), (2, 64, 64), (1, 257, 300)])
@pytest.mark.parametrize("threads", [1, 2])
def test_poisoned_scratch_and_guard_bands(batch, n, m, threads):
    """Results between guards, all scratch memory NaN before, exactly as large as the library asked for."""
    x, a = normal(batch, n, m), symmetric(batch, m, m, seed=1)
    recorded = Program(chain, (), ((n, m, F32), (m, m, F32)))
    expected = recorded(x, a)
    results, guards = [], []
    for y in expected:
        rows, cols = y.shape[1:]
        whole = torch.full((batch * rows * (cols + 3) + 64,), -7.0)
        results.append(whole[33 : 33 + batch * rows * (cols + 3)].view(batch, rows, cols + 3)[..., :cols])
        guards.append(whole)
    arrays = [(t.data_ptr(), t.stride(1), t.stride(0)) for t in (x, a, *results)]
    nbytes = recorded.native.workspace(arrays, batch, threads)
    workspace = torch.full((nbytes + 16,), 255, dtype=torch.uint8)
    recorded.native.run(arrays, batch, threads, workspace.data_ptr() + 8, nbytes)
    for found, whole, right in zip(results, guards, expected):
        assert torch.equal(found, right)
        found.fill_(-7.0)
        assert (whole == -7).all()
    assert (workspace[:8] == 255).all() and (workspace[-8:] == 255).all()


@pytest.mark.parametrize("n", [20, 64, 200])
def test_a_matrix_of_nan_leaves_its_batch_untouched(n):
    x, a = normal(5, n, n), symmetric(5, n, n, seed=1)
    expected = NativeVerbs().run(chain, (x, a))
    bad = x.clone()
    bad[2, n // 2, n // 3] = math.nan
    for y, right in zip(NativeVerbs().run(chain, (bad, a)), expected):
        assert y[2].isnan().any()
        assert all(torch.equal(y[i], right[i]) for i in (0, 1, 3, 4))


def test_one_matrix_for_the_whole_batch():
    x, a = normal(4, 9, 30), symmetric(1, 30, 30, seed=1)
    shared, copied = (NativeVerbs().run(chain, (x, b)) for b in (a, a.repeat(4, 1, 1)))
    assert all(map(torch.equal, shared, copied))


def test_scratch_is_used_again_and_its_size_is_as_stated():
    """A polar factor of 1024 x 4096 needs, besides its result, one such matrix, four square ones, and packed parts."""
    todo = polar_plan((1024, 4096), backend="native")
    recorded = program(_normalised_chain, (todo,), ((1024, 4096, F32),))
    arrays = [(64, 4096, 0)] * 2
    packed = 2 * (8 * (48 + 384) * 128 + 4 * 48 * 8 * 8)  # in the larger of the two dtypes, per thread
    assert recorded.native.workspace(arrays, 1, 2) <= 4 * (1024 * 4128 + 4 * 1024 * 1056) + packed + (1 << 16)
    small = program(_normalised_chain, (polar_plan((64, 64), backend="native"),), ((64, 64, F32),))
    alone, many = (small.native.workspace([(64, 64, 4096)] * 2, batch, 2) for batch in (2, 1000))
    assert many == alone  # a set of scratch per thread, not per matrix
    assert LARGE > 64 * 64


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, m", [(1, 1), (8, 16), (9, 17), (64, 64), (100, 400), (129, 700), (400, 390)])
def test_what_is_executed_is_what_was_planned(n, m):
    """The C library counts the tiles that it computes."""
    x = normal(2, n, m)
    for form in ("plain", "gram"):
        for matrix in (x, x.mT.contiguous()):
            todo = polar_plan(matrix.shape, form=form, backend="native")
            recorded = program(_normalised_chain, (todo,), ((*matrix.shape[1:], F32),))
            recorded(matrix)
            assert recorded.executed == 2 * recorded.flops == todo.flops, (form, matrix.shape)
    todo = root_plan((2, n, n), method="composite", backend="native")
    recorded = program(_iterate, (todo,), ((n, n, F32),))
    recorded(torch.eye(n).repeat(2, 1, 1) / 2)
    assert recorded.executed == 2 * recorded.flops == todo.flops


def _iterate(verbs, m, todo):
    return roots.iterate(m, todo, verbs)


def test_work_of_a_symmetric_product_is_near_half():
    assert symmetric_work(64) == 0.625 * 64**2
    assert symmetric_work(1024) <= 0.51 * 1024**2
    assert (symmetric_work(1), symmetric_work(17), general_work(17, 17)) == (8 * 16, 8 * (16 + 16 + 32), 24 * 32)
    assert symmetric_work(0) == general_work(0, 5) == 0
    for n in range(1, 100):
        assert n * (n + 1) / 2 <= symmetric_work(n) <= general_work(n, n)


# --- plans and refusals -----------------------------------------------------------------------------------------------


def test_backends_of_a_cpu():
    x = normal(3, 40, 60)
    assert (steepest.polar(x, backend="native") - steepest.polar(x, backend="torch")).abs().max() <= 1e-4
    with pytest.raises(ValueError, match=r"backend 'native' needs a CPU tensor and float32; got cpu, torch\.float64"):
        steepest.polar(x.double(), backend="native")
    with pytest.raises(ValueError, match="backend 'native' needs a CPU tensor and float32; got cpu, float64"):
        root_plan((4, 4), F64, backend="native")
    assert "native" in str(steepest.explain("polar", x, backend="native"))


FLOAT = DTYPES[F32]
SQUARE, LONG, SCRATCH, NUMBERS = (4, 4, FLOAT), (4, 7, FLOAT), (4, 4, FLOAT), (1, 2, DTYPES[F64])


def op(kind=lib.MATRIX_SYMMETRIC, flags=0, d=2, a=0, b=0, c=-1, alpha=1.0, beta=0.0, gamma=0.0):
    return kind, flags, d, a, b, c, alpha, beta, gamma


SIZES_OF_SQUARE = op(kind=lib.MATRIX_SYMMETRISE, d=3, c=2)


@pytest.mark.parametrize(
    "operands, ops, message",
    [
        ([SQUARE, LONG, SCRATCH], [op(kind=9)], "ops[0].kind is 9"),
        ([SQUARE, LONG, SCRATCH], [op(flags=4)], "ops[0].flags is 4"),
        ([SQUARE, LONG, SCRATCH], [op(d=7)], "ops[0].d is 7"),
        ([SQUARE, LONG, SCRATCH], [op(a=-1)], "ops[0].a is -1"),
        ([SQUARE, LONG, SCRATCH], [op(a=2, d=0)], "ops[0].a is operand 2, which is scratch that nothing"),
        ([SQUARE, LONG, SCRATCH], [op(), op(a=2)], "ops[1] writes operand 2, which it multiplies"),
        ([SQUARE, LONG, SCRATCH], [op(b=1)], "4 x 4 and 4 x 7 do not make 4 x 4"),
        ([SQUARE, LONG, LONG], [op(b=1)], "ops[0] has a 4 x 7 result, expected a square one"),
        ([SQUARE, LONG, (4, 4, DTYPES[F64])], [op()], "ops[0] mixes dtypes"),
        ([SQUARE, LONG, SCRATCH], [op(c=1)], "ops[0].c is 4 x 7, expected 4 x 4"),
        ([SQUARE, (-1, 4, FLOAT), SCRATCH], [op()], "operands[1] is -1 x 4"),
        ([SQUARE, (4, 4, 5), SCRATCH], [op()], "operands[1].dtype is 5"),
        ([SQUARE, LONG, SCRATCH], [op(kind=lib.MATRIX_SYMMETRISE, c=1)], "ops[0].c is 4 x 7, expected 1 x 2 of"),
        ([SQUARE, LONG, SCRATCH], [op(kind=lib.MATRIX_NORM)], "ops[0].d is 4 x 4, expected 1 x 1 of FLOAT64"),
        ([SQUARE, LONG, SCRATCH], [op(kind=lib.MATRIX_DIVIDE, b=-1)], "ops[0].b is -1"),
        ([SQUARE, LONG, SCRATCH], [op(kind=lib.MATRIX_DIVIDE, b=1)], "ops[0].b is 4 x 7, expected 1 x 1 of FLOAT64"),
        ([SQUARE, LONG, SCRATCH], [op(kind=lib.MATRIX_SPECTRAL_BOUND, b=-1)], "ops[0].b is -1"),
        ([SQUARE, LONG, SCRATCH], [op(kind=lib.MATRIX_SPECTRAL_BOUND)], "ops[0].c is -1"),
        ([SQUARE, LONG, SCRATCH], [op(kind=lib.MATRIX_SPECTRAL_BOUND, c=1)], "ops[0].c is 4 x 7, expected 1 x 2 of"),
        ([SQUARE, LONG, NUMBERS], [op(kind=lib.MATRIX_NORM, d=2)], "ops[0].d is 1 x 2, expected 1 x 1 of FLOAT64"),
        ([SQUARE, LONG, NUMBERS, SCRATCH], [SIZES_OF_SQUARE, op(kind=lib.MATRIX_SPECTRAL_BOUND, b=1, c=2)],
         "ops[1].b is 4 x 7, expected 4 x 4 and dtype 0, as a"),
        ([SQUARE, LONG, NUMBERS, SCRATCH], [SIZES_OF_SQUARE, op(kind=lib.MATRIX_SPECTRAL_BOUND, d=3, c=2)],
         "ops[1].d is 4 x 4, expected 1 x 1 of FLOAT64"),
        ([SQUARE, LONG, NUMBERS], [op(kind=8)], "ops[0].kind is 8, expected 0 to 7"),
    ],
)  # fmt: skip
def test_a_wrong_program_is_refused_before_anything_is_written(operands, ops, message):
    x, y = torch.ones(1, 4, 4), torch.ones(1, 4, 7)
    wrong = lib.MatrixProgram(operands, ops, 2)
    arrays = [(x.data_ptr(), 4, 0), (y.data_ptr(), 7, 0)]
    with pytest.raises(ValueError, match=re.escape(message)):
        wrong.run(arrays, 1, 1, 0, 0)
    with pytest.raises(ValueError, match=re.escape(message)):
        wrong.workspace(arrays, 1, 1)
    assert (x == 1).all() and (y == 1).all()


def test_wrong_arrays_are_refused():
    x = torch.ones(2, 4, 4)
    right = lib.MatrixProgram([SQUARE, SQUARE], [op(d=1)], 2)
    nbytes = right.workspace([(x.data_ptr(), 4, 16)] * 2, 2, 1)
    for arrays, message in (
        ([(x.data_ptr(), 3, 16), (x.data_ptr(), 4, 16)], "operands[0].ld is 3, expected at least its 4 columns"),
        (
            [(x.data_ptr(), 4, 0), (x.data_ptr(), 4, 0)],
            "ops[0] writes operand 1, which all matrices of the batch share",
        ),
        ([(x.data_ptr(), 4, -1), (x.data_ptr(), 4, 16)], "operands[0].stride is -1"),
        ([(x.data_ptr(), 4, 0)], "wrong number of arrays"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            right.run(arrays, 2, 1, 0, 0)
    with pytest.raises(RuntimeError, match="workspace has 8 bytes"):
        right.run([(x.data_ptr(), 4, 16), (x.data_ptr(), 4, 16)], 2, 1, x.data_ptr(), 8)
    assert nbytes > 8 and (x == 1).all()


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 0), (2, 0, 5), (2, 5, 0)])
def test_empty_matrices(shape):
    x, verbs = torch.ones(shape), NativeVerbs()
    n = shape[1]
    assert torch.equal(verbs.gram(x), torch.zeros(shape[0], n, n) if 0 in shape[1:] else torch.empty(0, n, n))
    assert verbs.long_product(torch.ones(shape[0], n, n), x).shape == shape
    a = torch.ones(shape[0], n, n)
    if not a.numel():
        assert verbs.symmetric_product(a, a).shape == verbs.commuting_product(a, a).shape == a.shape
