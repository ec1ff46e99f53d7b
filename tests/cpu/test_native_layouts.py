"""How tensors are handed to the C library's matrix programs, and where their matrices lie meanwhile."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from steepest.matrix.native import LARGE, NativeVerbs, Program, Recorder, _array, _assign, _plain
from steepest.matrix.verbs import TorchVerbs

F32 = torch.float32
BASE = torch.randn(60, generator=torch.Generator().manual_seed(3))


APART = (((2, 3, 5), (15, 5, 1)), ((2, 3, 5), (20, 6, 1)), ((2, 1, 5), (7, 1, 1)), ((2, 3, 1), (9, 2, 7)))
OTHERS = (((2, 3, 5), (9, 2, 1)), ((2, 2, 5), (9, 2, 1)), ((2, 3, 5), (9, 4, 1)), ((2, 3, 5), (1, 5, 3)))


def test_rows_that_overlap_are_copied_and_no_others():
    for shape, strides in OTHERS:
        x = BASE.as_strided(shape, strides)
        assert _plain(x).is_contiguous() and torch.equal(_plain(x), x)
    for shape, strides in APART:
        x = BASE.as_strided(shape, strides)
        assert _plain(x) is x


def test_strides_are_given_where_they_count():
    """Of one row, or one matrix, torch's may be anything."""
    for shape, strides, expected in (
        ((2, 3, 5), (20, 6, 1), (6, 20)),
        ((2, 2, 5), (20, 6, 1), (6, 20)),
        ((2, 1, 5), (7, 1, 1), (5, 7)),
        ((1, 3, 5), (3, 6, 1), (6, 0)),
        ((2, 3, 1), (9, 2, 1), (2, 9)),
    ):
        x = BASE.as_strided(shape, strides)
        assert _array(x) == (x.data_ptr(), *expected)


@pytest.mark.parametrize("alpha, beta, diagonal", list(itertools.product((1.0, 3.0), (0.0, 0.5), (0.0, 0.5))))
def test_combinations_of_any_numbers(alpha, beta, diagonal):
    """Small integers, powers of two: nothing is rounded."""
    a, c = (torch.arange(18.0).view(2, 3, 3) - 5 * i for i in range(2))
    numbers = dict(alpha=alpha, beta=beta, c=c if beta else None, diagonal=diagonal)
    expected = alpha * a + beta * c + diagonal * torch.eye(3)
    assert torch.equal(NativeVerbs().combination(a, **numbers), expected)
    assert torch.equal(TorchVerbs().combination(a, **numbers), expected)


def test_products_that_commute_are_counted():
    program = Program(lambda verbs, a, b: verbs.commuting_product(a, b), (), ((20, 20, F32), (20, 20, F32)))
    program(torch.randn(3, 20, 20), torch.randn(3, 20, 20))
    assert program.executed == 3 * program.flops > 0


def test_an_operand_of_the_last_product_is_not_where_the_result_will_be():
    """A large result's memory is lent to matrices before it, but not to those that its own product reads."""
    n = math.isqrt(LARGE) + 1
    recorder = Recorder()
    x = recorder.operand(n, n, F32)
    squared = recorder.gram(recorder.gram(x))
    result = recorder.symmetric_product(squared, squared)
    shapes, ops = _assign(recorder, [x.number, result.number], 1)
    places = [(op[2], set(op[3:5])) for op in ops]
    assert all(written not in read for written, read in places)
    assert places[-1][0] == 1 and places[0][0] == 1 and len(shapes) == 3  # lent to the first Gram matrix
