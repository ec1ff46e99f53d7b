"""Chains of small matrix products by one program each, interpreted: single steps, polar factors, inverse roots."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from steepest.conformance.cases.roots import definite, plant
from steepest.conformance.memory import Guarded, differing, poisoned_memory
from steepest.conformance.polar_bounds import measure
from steepest.conformance.root_bounds import figures
from steepest.kernels import chain as kernels
from steepest.matrix import polar, root_plan, roots, tape
from steepest.matrix.triton_verbs import TritonVerbs

pytestmark = pytest.mark.interpret
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
UNIT = {F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}
TINY = {F32: 2.0**-150, F16: 2.0**-25, BF16: 2.0**-134}  # half the smallest number


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_memory():
        yield


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("kind", [tape.PRODUCT, tape.GRAM_OF_ROWS, tape.GRAM_OF_COLUMNS])
def test_one_step_is_within_its_bound(kind, dtype):
    """alpha A B + beta C + diagonal I, of more than one tile: k roundings of the sum, 4 of the rest, 1 of the store."""
    n, k = 72, 24
    shape = (k, n) if kind == tape.GRAM_OF_COLUMNS else (n, k)
    x = Guarded(torch.randn(2, *shape).to(dtype)).view
    table = [(kind, n, n, k, 0, 0, -1, -1, 2, kind > 0), (0, n, n, 0, 0, 0, 2, 2, 1, 0)]
    if kind == tape.PRODUCT:  # of a matrix with its square
        x = Guarded(torch.randn(2, n, n).to(dtype) / n).view
        table[0] = (kind, n, n, n, 0, 0, 0, -1, 2, 0)
    numbers = np.array([[-0.7, 0.3, 0.0, 2.0], [0.0, 0.5, 0.25, -1.0]])
    tables, size = kernels.device_tables(np.array(table), numbers, (shape, (n, n), (n, n)), 2, dtype, x.device)
    y, scratch = Guarded(torch.zeros(2, n, n, dtype=dtype)), Guarded(torch.zeros(size, dtype=dtype))
    kept = x.clone()
    kernels.run_chain(tables, x, y.view, scratch.view)
    a, eye = x.double(), torch.eye(n, dtype=torch.float64)
    left, right = ((a, a), (a, a.mT), (a.mT, a))[kind]
    addend = 0.3 * a if kind == tape.PRODUCT else 0 * eye
    first = -0.7 * (left @ right) + addend + 2 * eye
    u, steps = UNIT[dtype], left.shape[-1] + 4
    bound = steps * 2.0**-24 * (0.7 * (left.abs() @ right.abs()) + addend.abs() + 2 * eye) + u * first.abs()
    exact = 0.75 * first - eye
    bound = 0.75 * (bound + TINY[dtype]) + 2 * u * exact.abs() + 4 * 2.0**-24 * first.abs() + TINY[dtype]
    assert ((y.view.double() - exact).abs() <= bound).all()
    assert kind == tape.PRODUCT or torch.equal(y.view, y.view.mT)  # mirrored
    assert y.overwritten() == scratch.overwritten() == 0 and differing(x, kept) == 0


def polar_of(x, dtype):
    todo = polar.plan(x.shape, dtype, "cuda", working=dtype)
    assert todo.resident
    size = polar.initial_size(todo.norm, min(x.shape[-2:]), polar.UNIT_ROUNDOFF[dtype])
    return polar.iterate(polar.normalised(x, dtype, size), todo, TritonVerbs()), todo


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("shape", [(1, 5), (7, 3), (20, 33), (33, 20), (24, 72)])
def test_polar_factors_are_within_the_bounds_of_the_torch_verbs(shape, dtype):
    x = torch.randn(2, *shape)
    y, todo = polar_of(x, dtype)
    assert y.shape == x.shape and y.is_contiguous()
    for one, given in zip(y, x):
        wrong = [f for f in measure(given, one, todo).figures if not f.ok]
        assert not wrong, wrong


def test_a_bad_matrix_spoils_only_itself_and_results_are_deterministic():
    x = torch.randn(3, 9, 12)
    clean, _ = polar_of(x, F32)
    assert differing(clean, polar_of(x, F32)[0]) == 0
    x[1, 8, 11] = torch.nan
    spoilt, _ = polar_of(x, F32)
    assert spoilt[1].isnan().all()
    assert differing(spoilt[::2], clean[::2]) == 0
    assert differing(polar_of(x[2:], F32)[0], clean[2:]) == 0


@pytest.mark.parametrize("p, ridge, n", [(4, 1e-6, 21), (4, 1e-4, 68), (3, 1e-3, 9), (2, 1e-3, 4), (8, 1e-4, 17)])
def test_inverse_roots_are_within_the_bounds_of_the_torch_verbs(p, ridge, n):
    a = definite("statistic", n, seed=p)
    todo = root_plan.plan(a.shape, device="cuda", p=p, ridge=ridge, method="composite")
    assert todo.resident
    x, status = roots.execute(a[None], todo, ridge, False, TritonVerbs(todo.precision))
    assert status.ok.all() and torch.equal(x, x.mT)
    wrong = [f for f in figures(a, x[0], status.scale.item(), ridge, False, todo) if not f.ok]
    assert not wrong, wrong


def test_bad_blocks_get_their_status_and_leave_the_others_alone():
    a = definite("clustered", 8, seed=0, batch=(4,))
    plant(a[1], "nan")
    plant(a[2], "indefinite")
    todo = root_plan.plan(a.shape, device="cuda", ridge=1e-3)
    x, status = roots.execute(a, todo, 1e-3, False, TritonVerbs(todo.precision))
    assert status.ok.tolist() == [True, False, False, True]
    alone, _ = roots.execute(a[3:], todo, 1e-3, False, TritonVerbs(todo.precision))
    assert differing(alone, x[3:]) == 0


def test_layouts_that_the_kernel_cannot_read_are_refused():
    tables, _ = kernels.device_tables(
        np.array([(1, 8, 8, 8, 0, 0, -1, -1, 1, 0)]), np.ones((1, 4)), ((8, 8), (8, 8)), 1, F32, torch.device("cpu")
    )
    x, y = torch.zeros(1, 9, 12), torch.zeros(1, 8, 8)
    for bad in (x[:, 1:, 1:9], x[:, :7, :8], x[:, :8, :8].mT):
        with pytest.raises(ValueError, match="run_chain"):
            kernels.run_chain(tables, bad, y, y.flatten())
    with pytest.raises(ValueError, match="input_precision is 'tf16'"):
        kernels.run_chain(tables, y, y, y.flatten(), "tf16")
    with pytest.raises(ValueError, match="multiples of 4"):
        kernels.device_tables(
            np.array([(1, 7, 8, 8, 0, 0, -1, -1, 1, 0)]), np.ones((1, 4)), ((7, 8),), 1, F32, x.device
        )
