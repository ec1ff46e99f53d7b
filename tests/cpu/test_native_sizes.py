"""Norms, bounds and symmetrised matrices by recorded programs, of matrices that several tasks share.

A task of these operations takes 2^14 elements; the matrices have integers and powers of two where results are exact.
"""

from __future__ import annotations

import math

import pytest
import torch

from steepest._native import lib
from steepest.matrix.native import Program, Recorder

F32, F64 = torch.float32, torch.float64
MANY = 300  # rows of as many elements: 54 to a task, so six tasks
SLACK = 1 + 2.0**-12  # of spectral_bound


def run(algorithm, *tensors):
    shapes = tuple((*x.shape[-2:], x.dtype) for x in tensors)
    results = Program(algorithm, (), shapes)(*(x[None] for x in tensors))
    return [x[0] for x in results]


def integers(rows, cols, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (rows, cols), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("rows, cols", [(1, 1), (3, 5), (MANY, MANY), (MANY, 1000)])
def test_norm_sums_every_row_once(rows, cols, dtype):
    a = integers(rows, cols, dtype)
    (found,) = run(Recorder.norm, a)
    assert found.item() == math.sqrt(int(a.double().square().sum()))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_diagonal_of_one_is_added(dtype):
    a = integers(MANY, MANY, dtype)
    (found,) = run(lambda verbs, x: verbs.combination(x, diagonal=1.0), a)
    assert torch.equal(found, a + torch.eye(MANY, dtype=dtype))


def test_normalised_counts_squares_below_the_range_as_nothing():
    """alpha A / ||A||, where the sum of squares in float64 is 0: the norm counts as 1."""
    a = torch.full((3, 3), 2.0**-600, dtype=F64)
    (found,) = run(lambda verbs, x: verbs.normalised(x, 0.5), a)
    assert torch.equal(found, a / 2)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_divided_by_zero_is_divided_by_one(dtype):
    a, zero = integers(MANY, MANY, dtype), torch.zeros(1, 1, dtype=F64)
    (found,) = run(lambda verbs, x, by: verbs.divided(x, by, power=0.5, factor=4.0), a, zero)
    assert torch.equal(found, a / 4)


def bound(norm, before, after, dtype):
    sizes = torch.tensor([[math.nan, norm]], dtype=F64)  # the first of `symmetrised`'s sizes is not read
    before, after = (torch.tensor(x, dtype=dtype) for x in (before, after))
    (found,) = run(lambda verbs, *x: verbs.spectral_bound(*x), sizes, before, after)
    return found.item()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    "norm, before, after, expected",
    [
        (0.75, [[1.0, 0.0]], [[0.0, 1.0]], 0.75),
        (1.5, [[1.0, 0.0]], [[0.0, 1.0]], 1.0),
        (3.0, [[1.0, 0.0]], [[0.0, 1.0]], 1.0),
        (3.0, [[4.0, 0.0], [3.0, 4.0]], [[0.0, 1.0], [0.0, 0.625]], 0.5),  # the first row grows most
        (3.0, [[3.0, 4.0], [4.0, 0.0]], [[0.0, 0.625], [0.0, 1.0]], 0.5),  # the last
        (3.0, [[0.0, 0.0]], [[0.0, 0.25]], 0.5),  # a length of 0 counts as 1
        (3.0, [[0.0, 0.0]], [[0.0, 0.0]], 0.0),
        (0.0, [[1.0, 0.0]], [[0.0, 1.0]], 0.0),
        (math.nan, [[1.0, 0.0]], [[0.0, 1.0]], math.nan),
        (3.0, [[1.0, 0.0], [1.0, 0.0]], [[0.0, math.nan], [0.0, 1.0]], math.nan),
        (3.0, [[1.0, 0.0], [1.0, 0.0]], [[0.0, 0.25], [0.0, math.nan]], math.nan),
    ],
)
def test_spectral_bound_is_the_least_of_three(norm, before, after, expected, dtype):
    """min(1, ||Y||, 2 max |after_i| / |before_i|), in exact cases."""
    found = bound(norm, before, after, dtype)
    assert found == expected * SLACK or (math.isnan(found) and math.isnan(expected))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("alpha", [1.0, 4.0])
@pytest.mark.parametrize("n", [1, 5, MANY])
def test_symmetrised_matrices_and_their_sizes(n, alpha, dtype):
    """The largest row sum of |A + A^T| / 2 is made a power of two: then every element of the result is exact."""
    a = integers(n, n, dtype)
    half = (a.double() + a.double().mT) / 2
    others = half.abs().sum(-1)
    most = int(others.max()) + 8
    largest = 1 << most.bit_length()
    a[n - 1, n - 1] = largest - (others[n - 1] - half[n - 1, n - 1].abs())

    def algorithm(recorder, x):
        d, sizes = recorder.operand(n, n, dtype), recorder.operand(1, 2, F64)
        recorder.append(lib.MATRIX_SYMMETRISE, 0, d, x, None, sizes, alpha)
        return d, sizes

    found, sizes = run(algorithm, a)
    expected = alpha * (a.double() + a.double().mT) / (2 * largest)
    assert torch.equal(found.double(), expected)
    assert sizes[0, 0].item() == largest
    # Squares are integers over (2 largest)^2: their sum is exact in float64, its root rounded once.
    assert sizes[0, 1].item() == math.sqrt(expected.square().sum().item())


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("n", [1, MANY])
def test_symmetrised_zeros_are_zeros(n, dtype):
    found, sizes = run(Recorder.symmetrised, torch.zeros(n, n, dtype=dtype))
    assert not found.any() and not sizes.any()


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 200, MANY - 1])
def test_symmetrised_without_finite_sums_is_nan(row, wrong):
    a = integers(MANY, MANY, F32)
    a[row, 7] = wrong
    found, sizes = run(Recorder.symmetrised, a)
    assert found.isnan().all() and not sizes.isfinite().any()
