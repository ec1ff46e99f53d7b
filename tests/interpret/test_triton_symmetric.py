"""The Triton symmetric product in Triton's interpreter: derived error bounds, exact symmetry, nothing else touched."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from steepest.conformance.memory import Guarded, differing, poisoned_memory
from steepest.kernels import symmetric, tiles
from steepest.kernels.symmetric import gram, symmetric_product
from steepest.matrix.triton_verbs import TritonVerbs

pytestmark = pytest.mark.interpret

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Unit roundoff, and half the smallest subnormal.
ROUNDING = {F32: (2.0**-24, 2.0**-150), BF16: (2.0**-8, 2.0**-134), F16: (2.0**-11, 2.0**-25)}
# Rows and columns: single elements, both sides of a tile, more than one group of tiles, long, tall, no columns.
SHAPES = [(1, 1), (2, 3), (31, 70), (64, 64), (65, 8), (130, 33), (8, 200), (136, 40), (5, 0)]


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_memory():
        yield


def mirrored(x):
    """The lower triangle and its mirror image."""
    return x.tril() + x.tril(-1).mT


def assert_within_bound(result, a, b, alpha=1.0, beta=0.0, c=None, diagonal=0.0):
    """|D - exact| <= gamma_(k+4) (|alpha||A||Bᵀ| + |beta||C| + |diagonal| I) + u |exact| + smallest subnormal / 2.

    a, b: (..., n, k), the product being A Bᵀ.  An element is a sum of k products in any order (at most k roundings,
    Higham, Accuracy and Stability, section 3.1), scaled, and added to two more terms (4 roundings more), all float32;
    then it is rounded to the result's dtype, with unit roundoff u.
    """
    k, n = a.shape[-1], a.shape[-2]
    identity = torch.eye(n, dtype=torch.float64)
    a, b = a.double(), b.double()
    exact = alpha * (a @ b.mT) + diagonal * identity
    size = abs(alpha) * (a.abs() @ b.abs().mT) + abs(diagonal) * identity
    if c is not None and beta != 0:
        exact = exact + beta * c.double()
        size = size + abs(beta) * c.double().abs()
    u32 = ROUNDING[F32][0]
    gamma = (k + 4) * u32 / (1 - (k + 4) * u32)
    u, half_subnormal = ROUNDING[result.dtype] if result.dtype != F32 else (0.0, 0.0)
    bound = mirrored(gamma * size * (1 + u) + u * exact.abs() + half_subnormal)
    error = (result.double() - mirrored(exact)).abs()
    assert result.shape == exact.shape
    assert (error <= bound).all(), f"error / bound up to {(error / bound).nan_to_num(torch.inf).max():.3g}"
    assert torch.equal(result, result.mT)


def commuting(n, dtype, batch=()):
    """Two polynomials of one random symmetric matrix, exactly symmetric, as such chains produce them."""
    x = torch.randn(*batch, n, n, dtype=torch.float64) / n**0.5
    s = x @ x.mT
    first, second = s.to(dtype), (1.5 * s - 0.5 * s @ s).to(dtype)
    return mirrored(first), mirrored(second)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("n, m", SHAPES)
def test_gram_is_within_its_bound(n, m, dtype):
    x = torch.randn(n, m).to(dtype)
    assert_within_bound(gram(x), x, x)
    assert_within_bound(gram(x, alpha=-0.37), x, x, alpha=-0.37)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gram_of_columns_makes_no_copy_and_changes_no_bit(dtype):
    x = torch.randn(2, 70, 40).to(dtype)
    expected = gram(x.mT.contiguous())
    assert symmetric.as_batch(x.mT).data_ptr() == x.data_ptr()
    assert differing(gram(x.mT), expected) == 0
    assert differing(gram(x[:, :, 1:].mT), expected[:, 1:, 1:]) == 0  # misaligned


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 1:, 3:],
        lambda x: x[:, ::2],
        lambda x: x[:, ::2, ::3],
        lambda x: x[:1].expand(3, -1, -1),
        lambda x: x.reshape(2, 2, 66, 48)[:, 1:].transpose(0, 1),
        lambda x: x[::2].flip(-1),
        lambda x: x[0, :1],
        lambda x: x[0, :, :1],
        lambda x: x[:0],
        lambda x: x[:, :0],
    ],
)
def test_gram_takes_any_strides(view):
    x = view(torch.randn(4, 66, 48))
    assert differing(gram(x), gram(x.clone(memory_format=torch.contiguous_format))) == 0
    assert_within_bound(gram(x), x, x)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("n", [1, 31, 64, 100])
def test_symmetric_product_is_within_its_bound(n, dtype):
    a, b = commuting(n, dtype, batch=(2,))
    assert_within_bound(symmetric_product(a, b), a, b)
    options = {"alpha": 0.7, "beta": -1.3, "c": a, "diagonal": 2.5}
    assert_within_bound(symmetric_product(a, b, **options), a, b, **options)
    options = {"alpha": 0.0, "diagonal": -3.0}
    assert_within_bound(symmetric_product(a, b, **options), a, b, **options)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_the_largest_tiles(monkeypatch, dtype):
    monkeypatch.setattr(symmetric, "FULL_DEVICE", 1)
    a, b = commuting(136, dtype)
    assert_within_bound(symmetric_product(a, b, beta=1.0, c=a), a, b, beta=1.0, c=a)
    x = torch.randn(136, 8).to(dtype)
    assert_within_bound(gram(x), x, x)


def test_more_than_one_group_of_tiles():
    """9 rows of tiles: the second group of rows of tiles is not full."""
    n = 8 * symmetric.UNALIGNED_TILING.tile + 1
    x = torch.randn(n, 3)
    assert_within_bound(gram(x), x, x)


def test_only_the_lower_triangle_counts():
    """Noise above the diagonal of C, and a product whose upper triangle is different, change nothing."""
    a, b = commuting(70, F32)
    c = torch.randn(70, 70)
    expected = symmetric_product(a, b, beta=2.0, c=mirrored(c))
    assert differing(symmetric_product(a, b, beta=2.0, c=c), expected) == 0
    other = mirrored(torch.randn(70, 70))  # does not commute with a
    assert_within_bound(symmetric_product(a, other), a, other)


def test_c_is_not_read_for_beta_zero():
    a, b = commuting(33, F32)
    c = torch.full((33, 33), torch.nan)
    assert differing(symmetric_product(a, b, beta=0.0, c=c), symmetric_product(a, b)) == 0


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_operands_and_result_inside_poisoned_memory(dtype):
    """NaN all around: an element read beyond an edge spoils the result, one written there changes the poison."""
    for shape in [(2, 37, 21), (1, 64, 40)]:
        x = torch.randn(shape).to(dtype)
        apart = [Guarded(x, layout=layout, offset=1) for layout in ("contiguous", "transposed", "gaps")]
        out = Guarded(torch.zeros(shape[0], shape[1], shape[1] + 3, dtype=dtype), offset=3)
        wide_before = out.view[..., shape[1] :].clone()
        for guarded in apart:
            result = gram(guarded.view, out=out.view[..., : shape[1]])
            assert_within_bound(result, x, x)
        assert differing(out.view[..., shape[1] :], wide_before) == 0
        assert out.overwritten() == 0


def test_deterministic_and_batch_invariant():
    x = torch.randn(5, 70, 30)
    together = gram(x)
    assert differing(together, gram(x)) == 0
    assert all(differing(together[i], gram(x[i])) == 0 for i in range(5))


def test_scalars_on_the_device_multiply_alpha_beta_and_diagonal():
    """Powers of two: exact, so every bit is that of the same numbers given from the host."""
    a, b = commuting(40, F32, batch=(2,))
    scalars = torch.tensor([[2.0, 0.5, 4.0], [-1.0, 8.0, 0.25]])
    options = dict(alpha=0.7, beta=-1.3, c=a, diagonal=2.5)
    found = symmetric_product(a, b, scalars=scalars, **options)
    for i, (x, y, z) in enumerate(scalars.tolist()):
        alone = dict(alpha=0.7 * x, beta=-1.3 * y, c=a[i], diagonal=2.5 * z)
        assert differing(found[i], symmetric_product(a[i], b[i], **alone)) == 0
    x = torch.randn(2, 33, 20)
    assert differing(gram(x, scalars=torch.tensor([4.0, torch.nan, 1.0])), gram(x, alpha=4.0)) == 0
    for wrong in (torch.ones(2), torch.ones(3, 3), torch.ones(2, 3, dtype=F16)):
        with pytest.raises(ValueError, match="gram: scalars are"):
            gram(x, scalars=wrong)


def test_a_bad_matrix_spoils_only_itself():
    x = torch.randn(3, 70, 30)
    clean = gram(x)
    x[1, 69, 29] = torch.nan
    result = gram(x)
    assert differing(result[0], clean[0]) == 0 and differing(result[2], clean[2]) == 0
    assert result[1, 69].isnan().all() and result[1, :, 69].isnan().all()
    assert result[1].isnan().sum() == 2 * 70 - 1


@triton.jit
def row_kernel(t_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(out_ptr + offsets, tiles.triangular_row(tl.load(t_ptr + offsets)))


def test_triangular_row_is_exact_at_both_ends_of_every_row():
    rows = torch.arange(65535)
    first = rows * (rows + 1) // 2
    for t in (first, first + rows):
        out = torch.full((65536,), -1)
        row_kernel[(1,)](torch.nn.functional.pad(t, (0, 1)), out, 65536)
        assert torch.equal(out[:-1], rows)


@triton.jit
def tile_kernel(out_ptr, rows):
    t = tl.program_id(0)
    row, column = tiles.triangular_tile(t.to(tl.int64), rows.to(tl.int64))
    tl.store(out_ptr + 2 * t, row)
    tl.store(out_ptr + 2 * t + 1, column)


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 17])
def test_triangular_tile_visits_every_tile_of_the_triangle_once(rows):
    tiles = rows * (rows + 1) // 2
    out = torch.full((tiles, 2), -1, dtype=torch.int32)
    tile_kernel[(tiles,)](out, rows)
    expected = [[row, column] for row in range(rows) for column in range(row + 1)]
    assert sorted(out.tolist()) == expected


@pytest.mark.parametrize(
    "kind, unit, n, batch, tile",
    [("half", 8, 4096, 1, 128), ("half", 8, 1024, 1, 64), ("half", 8, 256, 64, 128), ("half", 1, 4095, 1, 32)],
)
def test_large_tiles_when_they_fill_the_device(kind, unit, n, batch, tile):
    assert symmetric.choose_tiling(kind, unit, n, batch).tile == tile


def test_triton_verbs():
    verbs = TritonVerbs()
    a, b = commuting(40, F32)
    x = torch.randn(40, 50)
    assert_within_bound(verbs.gram(x), x, x)
    options = {"alpha": 2.0, "beta": 0.5, "c": b, "diagonal": -1.0}
    assert_within_bound(verbs.symmetric_product(a, b, **options), a, b, **options)
    assert torch.equal(verbs.long_product(a, x), a @ x)
    with pytest.raises(ValueError, match="TritonVerbs: input_precision is 'fp8'"):
        TritonVerbs(input_precision="fp8")


SQUARE = torch.zeros(2, 4, 4)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: gram(torch.zeros(3, dtype=F32)), ValueError, r"gram: x has shape \(3,\)"),
        (lambda: gram(SQUARE.double()), TypeError, "gram: x has dtype torch.float64; supported"),
        (lambda: gram(SQUARE, input_precision="bf16"), ValueError, "gram: input_precision is 'bf16'"),
        (lambda: gram(SQUARE, out=SQUARE), ValueError, "gram: out shares memory with an input"),
        (lambda: gram(SQUARE, out=torch.zeros(2, 4, 5)), ValueError, r"gram: out is \(2, 4, 5\)"),
        (lambda: gram(SQUARE, out=torch.zeros(2, 4, 4).mT), ValueError, "gram: out has strides"),
        (lambda: symmetric_product(SQUARE, SQUARE[:1]), ValueError, r"symmetric_product: b has shape \(1, 4, 4\)"),
        (lambda: symmetric_product(SQUARE[:, :3], SQUARE), ValueError, r"symmetric_product: a has shape \(2, 3, 4\)"),
        (lambda: symmetric_product(SQUARE, SQUARE.half()), ValueError, "symmetric_product: b is torch.float16"),
        (lambda: symmetric_product(SQUARE, SQUARE, beta=1.0), ValueError, "symmetric_product: beta is 1.0, but c is"),
        (lambda: symmetric_product(SQUARE, SQUARE, c=SQUARE, out=SQUARE), ValueError, "out shares memory"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
