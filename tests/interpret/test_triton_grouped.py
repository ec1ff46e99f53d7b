"""Symmetric products of mixed shapes in one launch, interpreted, against float64 and the kernel for one shape."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from steepest.conformance.memory import Guarded, differing, poisoned_memory
from steepest.kernels.grouped import group_of_grams, group_of_products
from steepest.kernels.symmetric import gram, symmetric_product

pytestmark = pytest.mark.interpret
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = [(40, 24), (1, 8), (72, 16), (33, 7), (8, 130), (0, 4), (5, 0)]


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_memory():
        yield


def guarded(shapes, dtype, **options):
    return [Guarded(torch.randn(shape).to(dtype), offset=k % 2, **options) for k, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_grams_of_mixed_shapes_are_those_of_single_ones(dtype):
    """Rows and columns, aligned or not, in at most four launches."""
    xs = guarded(SHAPES, dtype) + guarded([(24, 40), (16, 9)], dtype, layout="transposed")
    outs = [Guarded(torch.zeros(x.view.shape[0], x.view.shape[0], dtype=dtype)) for x in xs]
    alphas = [1.0 + k / 8 for k in range(len(xs))]
    group = group_of_grams([x.view for x in xs], alphas=alphas, outs=[out.view for out in outs])
    assert 2 <= group.launches <= 4
    group.launch()
    for x, out, alpha in zip(xs, outs, alphas):
        exact = alpha * (x.view.double() @ x.view.double().mT)
        alone = gram(x.view, alpha=alpha)
        size = alpha * (x.view.double().abs() @ x.view.double().abs().mT)
        assert ((out.view.double() - exact).abs() <= (x.view.shape[1] + 4) * 2.0**-24 * size + ulp(exact, dtype)).all()
        assert (
            (out.view.double() - alone.double()).abs()
            <= 2 * ((x.view.shape[1] + 4) * 2.0**-24 * size + ulp(exact, dtype))
        ).all()
        assert torch.equal(out.view, out.view.mT) and out.overwritten() == 0
    assert sum(x.overwritten() for x in xs) == 0


def ulp(exact, dtype):
    unit, tiny = {F32: (0, 2.0**-149), F16: (2.0**-11, 2.0**-24), BF16: (2.0**-8, 2.0**-133)}[dtype]
    return unit * exact.abs() * (1 + 2.0**-10) + tiny


def test_aligned_matrices_of_all_shapes_take_one_launch():
    group = group_of_grams([torch.randn(shape) for shape in [(16, 8), (40, 24), (8, 100)]])
    assert group.launches == 1


def test_products_with_and_without_c_and_numbers_that_change_on_the_device():
    a = []
    for n in (9, 32, 70):
        x = torch.randn(n, n) / n**0.5
        a.append(x @ x.mT)
    a = [x.tril() + x.tril(-1).mT for x in a]
    b = [symmetric_product(x, x) for x in a]
    c = [None, a[1], b[2]]
    numbers = [(0.5, 0.0, 1.0), (-1.5, 2.0, 0.25), (2.0, 0.5, 0.0)]
    group = group_of_products(a, b, c=c, numbers=numbers)
    first = [x.clone() for x in group.launch()]
    group.numbers.mul_(torch.tensor([2.0, 4.0, 0.5]))
    second = group.launch()
    for scaled, results in ((1.0, first), (None, second)):
        for x, y, z, (alpha, beta, diagonal), found in zip(a, b, c, numbers, results):
            if scaled is None:
                alpha, beta, diagonal = 2 * alpha, 4 * beta, diagonal / 2
            options = dict(alpha=alpha, diagonal=diagonal) | ({} if z is None else dict(beta=beta, c=z))
            expected = symmetric_product(x, y, **options)
            size = abs(alpha) * (x.double().abs() @ y.double().abs()) + abs(beta) * (
                0 if z is None else z.double().abs()
            )
            assert ((found - expected).abs() <= 2 * (len(x) + 4) * 2.0**-24 * (size + abs(diagonal))).all()


def test_a_bad_matrix_spoils_only_itself():
    xs = [torch.randn(33, 12), torch.randn(20, 8)]
    clean = [x.clone() for x in group_of_grams(xs).launch()]
    xs[0][3, 4] = torch.nan
    found = group_of_grams(xs).launch()
    assert found[0].isnan().sum() == 2 * 33 - 1 and differing(found[1], clean[1]) == 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: group_of_grams([]), "got no matrices"),
        (lambda: group_of_grams([torch.zeros(2, 3, 4)]), r"xs\[0\] has shape \(2, 3, 4\)"),
        (lambda: group_of_grams([torch.zeros(3, 4), torch.zeros(3, 4).half()]), r"xs\[1\] is torch.float16"),
        (lambda: group_of_grams([torch.zeros(6, 8)[::2, ::2]]), "strides"),
        (lambda: group_of_grams([torch.zeros(3, 4)], input_precision="bf16"), "input_precision is 'bf16'"),
        (lambda: group_of_products([torch.zeros(3, 3)], []), "got 1 a, 0 b"),
        (lambda: group_of_products([torch.zeros(3, 3)], [torch.zeros(4, 4)]), "number 0 have shapes"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
