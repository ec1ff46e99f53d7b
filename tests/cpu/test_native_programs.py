"""Corners of recorded matrix programs and of their plans where a mutant went unnoticed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from steepest._native import lib
from steepest.matrix import root_plan
from steepest.matrix.native import LARGE, Program, Recorder, _assign, _plain, native_wins

F32 = torch.float32


@pytest.mark.parametrize("alpha, beta, diagonal", list(itertools.product((1.0, 3.0), (0.0, 0.5), (0.0, 0.5))))
def test_combinations_are_recorded_with_their_numbers(alpha, beta, diagonal):
    """Small integers, powers of two: nothing is rounded."""
    a, c = (torch.arange(18.0).view(2, 3, 3) - 5 * i for i in range(2))

    def algorithm(verbs, x, y):
        return verbs.combination(x, alpha=alpha, beta=beta, c=y if beta else None, diagonal=diagonal)

    (found,) = Program(algorithm, (), ((3, 3, F32), (3, 3, F32)))(a, c)
    assert torch.equal(found, alpha * a + beta * c + diagonal * torch.eye(3))


def test_a_results_memory_is_not_lent_to_what_its_own_product_reads():
    n = math.isqrt(LARGE) + 1
    recorder = Recorder()
    x = recorder.operand(n, n, F32)
    gram = recorder.gram(x)
    result = recorder.symmetric_product(gram, gram)
    _, ops = _assign(recorder, [x.number, result.number], 1)
    assert all(op[2] not in op[3:5] for op in ops)


def test_for_which_dtypes_the_kernels_are_taken_unasked():
    assert native_wins(F32) == (lib.matrix_clone() != "default")
    assert not any(native_wins(dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16))


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_columns_apart_are_brought_together(columns):
    x = torch.arange(2.0 * 4 * 2 * columns).view(2, 4, 2 * columns)[..., ::2]
    assert torch.equal(_plain(x), x)
    assert _plain(x).stride(-1) == 1 or columns == 1


def test_products_that_polynomials_take():
    """M² for degree 2; for 3 and 4 one more, M² times what is left over it."""
    assert [root_plan._polynomial_products(degree) for degree in (1, 2, 3, 4)] == [0, 1, 2, 2]


@pytest.mark.parametrize("p", [1, 2, 4])
def test_newtons_first_step_scales_the_spectrum_to_half_of_p_plus_one(p):
    """x h(s m) s^(1/p) with h(t) = (1 + 1/p) - t/p and s = (p + 1)/2."""
    scale = (p + 1) / 2
    first = root_plan.newton_schedule(p, 1e-3, 1e-3).coefficients[0]
    assert first == pytest.approx(((1 + 1 / p) * scale ** (1 / p), -(scale ** (1 / p + 1)) / p), rel=1e-15)


@pytest.mark.parametrize("method", ["eigh", "composite", "newton"])
def test_a_batch_costs_what_its_matrices_do(method):
    one, many = (root_plan.plan((*lead, 8, 8), method=method, ridge=1e-3) for lead in ((), (2, 3)))
    assert many.flops == 6 * one.flops > 0


def test_what_a_plan_of_roots_counts():
    def planned(n, backend, **options):
        return root_plan.plan((5, n, n), backend=backend, ridge=1e-3, **options)

    n = 40
    found = planned(n, "torch", method="eigh")
    assert (found.products, found.flops) == (1, 12 * n**3 * 5)
    found = planned(n, "native", method="composite")
    assert found.flops == 2 * n * root_plan.symmetric_work(n) * found.products * 5 and found.products > 1
    found = planned(n, "torch", method="composite", precision="float64")
    assert found.flops == 2 * n**3 * found.products * 5
    found = planned(n, "torch", method="composite")
    assert found.flops == round(2 * n**3 * found.products * root_plan.symmetric_fraction(n, "cpu") * 5)
    for n in (root_plan.RESIDENT_ROWS, root_plan.RESIDENT_ROWS + 1):
        found = planned(n, "triton", method="composite", device="cuda")
        resident = n == root_plan.RESIDENT_ROWS
        fraction = root_plan.tape.symmetric_fraction(n) if resident else 0.5
        assert found.resident == resident and found.flops == round(2 * n**3 * found.products * fraction * 5)


@pytest.mark.parametrize("n, itemsize, precision", [(40, 4, "float32"), (40, 8, "float64"), (10_000, 4, "float32")])
def test_how_many_roots_are_computed_at_a_time(n, itemsize, precision):
    """Four matrices of each are to stay in cache; at least one is computed."""
    found = root_plan.plan((10**6, n, n), backend="torch", method="composite", ridge=1e-3, precision=precision)
    assert found.group == max(1, root_plan.GROUP_BYTES // (4 * n * n * itemsize))
