"""Weight normalisation and path normalisation, against float64."""

from __future__ import annotations

import math

import pytest
import torch

import steepest
from steepest import reference

CASES = [
    ((5,), 0),
    ((7, 33), 0),
    ((7, 33), 1),
    ((7, 33), -1),
    ((4, 3, 5, 5), 0),
    ((4, 3, 5, 5), 1),
    ((6, 17), None),
    ((1, 1), 0),
]


def problem(shape, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(shape, generator=generator)
    size = [1] * len(shape)
    if dim is not None:
        size[dim] = shape[dim]
    g = torch.randn(size, generator=generator)
    return v.requires_grad_(), (g if dim is not None else g.reshape(())).requires_grad_()


@pytest.mark.parametrize(("shape", "dim"), CASES)
def test_weight_norm_and_its_gradient(shape, dim):
    v, g = problem(shape, dim)
    exact = [x.detach().double().requires_grad_() for x in (v, g)]
    w, wanted = steepest.weight_norm(v, g, dim), reference.weight_norm(*exact, dim)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    w.backward(upstream), wanted.backward(upstream.double())
    unit = 2.0**-24
    # The factor g / ‖v‖ and the product are each rounded once; sums are float64.
    assert ((w.double() - wanted).abs() <= 2.1 * unit * wanted.abs() + 1e-45).all()
    # dv = f (dw - s v): f, s, s v, the difference and the product are rounded once each, and ‖v‖ was.
    others = [d for d in range(len(shape)) if dim is None or d != dim % len(shape)]
    norm = exact[0].detach().square().sum(others, keepdim=True).sqrt() if others else exact[0].detach().abs()
    inner = (exact[0].detach() * upstream).sum(others, keepdim=True) if others else exact[0].detach() * upstream
    factor = (exact[1].detach().reshape(norm.shape) / norm).abs()
    size = factor * (upstream.double().abs() + 2 * (inner / norm**2 * exact[0].detach()).abs())
    assert ((v.grad.double() - exact[0].grad).abs() <= 6 * unit * size).all()
    assert ((g.grad.double() - exact[1].grad).abs() <= 3 * unit * exact[1].grad.abs() + 1e-14).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_take_torchs_kernel(dtype):
    v, g = (x.detach().to(dtype) for x in problem((6, 9), 0))
    torch.testing.assert_close(steepest.weight_norm(v, g), reference.weight_norm(v.double(), g.double()).to(dtype))
    torch.testing.assert_close(
        steepest.weight_norm(v, g[:1, :1], None), reference.weight_norm(v.double(), g[:1, :1].double(), None).to(dtype)
    )


def test_rows_of_zeros_threads_and_views():
    v = torch.randn(600, 800)  # sixteen threads have 2^14 elements each
    v[7] = 0
    g = torch.randn(600, 1)
    w = steepest.weight_norm(v.requires_grad_(), g.requires_grad_())
    w.sum().backward()
    assert (w[7] == 0).all() and (v.grad[7] == 0).all() and g.grad[7] == 0 and v.grad.isfinite().all()
    before = torch.get_num_threads()
    try:
        for threads in (1, 16):
            torch.set_num_threads(threads)
            assert torch.equal(steepest.weight_norm(v, g), w)
    finally:
        torch.set_num_threads(before)
    strided = torch.randn(1200, 800)[::2, ::2]
    assert torch.equal(steepest.weight_norm(strided, g), steepest.weight_norm(strided.clone(), g))
    assert steepest.weight_norm(torch.randn(0, 5), torch.randn(0, 1)).shape == (0, 5)


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 100, 1000])
def test_inner_products_are_sixteen_running_sums_added_in_order(columns):
    """Of numbers that cancel, so that nothing is left but what the order of additions makes of them."""
    generator = torch.Generator().manual_seed(columns)
    sizes = torch.rand(columns, generator=generator) * 2.0 ** torch.randint(-40, 40, (columns,), generator=generator)
    dw = torch.cat((sizes, -sizes))[torch.randperm(2 * columns, generator=generator)]
    v, g = torch.ones(1, 2 * columns, requires_grad=True), torch.ones(1, 1, requires_grad=True)
    steepest.weight_norm(v, g).backward(dw[None])
    sums = [0.0] * 16
    for i, x in enumerate(dw.tolist()):
        sums[i % 16] += x
    total = 0.0
    for part in sums:
        total += part
    length = torch.tensor(math.sqrt(2 * columns)).double()
    assert g.grad.item() == (total / length).float().item() and (columns < 100 or total != 0)


@pytest.mark.parametrize("function", [steepest.weight_norm, reference.weight_norm, torch._weight_norm])
def test_a_row_with_nan_is_nan_and_no_other(function):
    v, g = torch.randn(3, 40).requires_grad_(), torch.randn(3, 1).requires_grad_()
    v.data[1, 5] = math.nan
    w = function(v, g, 0)
    w.sum().backward()
    for found in (w, v.grad, g.grad):
        assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("v", "g", "dim", "message"),
    [
        (torch.randn(3, 4), torch.randn(4, 1), 0, r"g has shape \(4, 1\), expected \(3, 1\)"),
        (torch.randn(3, 4), torch.randn(3, 1), 2, "dim is 2, expected None or a dimension of v, which has 2"),
        (torch.randn(3, 4), torch.randn(3, 1).double(), 0, "g is torch.float64 on cpu, v is torch.float32"),
        (torch.randn(()), torch.randn(()), None, "v has no dimension"),
        (torch.ones(3, 4).long(), torch.randn(3, 1), 0, "v is torch.int64, expected a floating-point tensor"),
    ],
)
def test_wrong_weights_are_refused(v, g, dim, message):
    with pytest.raises((ValueError, TypeError), match=message):
        steepest.weight_norm(v, g, dim)


def test_path_normalisation():
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (), (0,), (300, 400)]
    params, grads = ([torch.randn(s, generator=generator) for s in shapes] for _ in range(2))
    exact = [p.double() for p in params]
    wanted = reference.path_normalize_(exact, grads)
    norm = steepest.path_normalize_(params, grads)
    assert abs(norm - wanted) <= 2**-23 * wanted
    for p, q in zip(params, exact):
        assert ((p.double() - q).abs() <= 3 * 2.0**-24 * q.abs()).all()
    zeros = [torch.zeros(3)]
    assert steepest.path_normalize_([p := torch.ones(3)], zeros) == 0 and (p == 1).all()
    with pytest.raises(ValueError, match=r"params\[0\] is not a leaf"):
        steepest.path_normalize_([torch.ones(3, requires_grad=True) * 2], zeros)
