"""The torch verbs: elementwise bounds, memory order, panels."""

import pytest
import torch

from steepest.matrix import verbs as verbs_module
from steepest.matrix.polar import UNIT_ROUNDOFF
from steepest.matrix.verbs import TorchVerbs

F64 = torch.float64


@pytest.mark.parametrize("n", [1, 5, 191, 512, 531, 577])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_verbs(n, dtype):
    """Element by element within (k + 4)·u·Σ|terms|: k products summed in any order, two scalings and two sums.

    The float64 expectation of a float64 result errs as much again.
    """
    generator = torch.Generator().manual_seed(n)
    u = UNIT_ROUNDOFF[dtype] + UNIT_ROUNDOFF[F64]
    x = torch.randn(2, n, n + 3, generator=generator, dtype=dtype)
    table, wide = TorchVerbs(), x.double()
    y = table.gram(x)
    assert ((y - wide @ wide.mT).abs() <= (n + 7) * u * (wide.abs() @ wide.abs().mT)).all()
    spoilt = torch.stack((x[0], torch.full_like(x[1], torch.nan)))
    assert torch.equal(table.gram(spoilt)[0], y[0])
    if dtype == torch.float32:  # in float64 MKL rounds by the number of matrices on some processors
        assert torch.equal(table.gram(x[0]), y[0])

    a = (y + y.mT) / (2 * n)
    b = a @ a
    b = (b + b.mT) / 2
    c = a - b
    d, e = a.double(), b.double()
    got = table.symmetric_product(a, b, alpha=-0.75, beta=2.5, c=c, diagonal=1.5)
    eye = torch.eye(n, dtype=F64)
    exact = -0.75 * (d @ e) + 2.5 * c.double() + 1.5 * eye
    size = 0.75 * (d.abs() @ e.abs()) + 2.5 * c.double().abs() + 1.5 * eye
    # b is a² rounded, within (n + 2)·u·|a||a|, so a b is symmetric, and mirroring it right, up to twice that times |a|.
    asymmetry = 2 * 0.75 * (n + 2) * u * (d.abs() @ d.abs() @ d.abs())
    assert ((got - exact).abs() <= (n + 4) * u * size + asymmetry).all()
    q = table.long_product(a, x)
    assert ((q - d @ wide).abs() <= n * u * (d.abs() @ wide.abs())).all()


def test_torch_verbs_keep_the_memory_order_of_a_transposed_operand():
    x = torch.randn(2, 40, 10).mT
    assert TorchVerbs().long_product(torch.eye(10).expand(2, 10, 10), x).mT.is_contiguous()


def test_torch_verbs_do_not_read_an_addend_that_is_not_given():
    a = torch.eye(520)
    assert torch.equal(TorchVerbs().symmetric_product(a, a, alpha=2.0), 2 * a)
    with pytest.raises(ValueError, match=r"beta is 1\.0, but c is None"):
        TorchVerbs().symmetric_product(a, a, beta=1.0)


@pytest.mark.parametrize("number", [0.0, 1.0, 2.0, -1.0])
def test_torch_verbs_take_any_number(number):
    """Powers of two and a permutation: nothing is rounded."""
    eye, swapped = torch.eye(6), torch.eye(6).flip(0)
    x = torch.randn(6, 4)
    found = TorchVerbs().symmetric_product(swapped, swapped, alpha=number, beta=number, c=swapped, diagonal=number)
    assert torch.equal(found, number * eye + number * swapped + number * eye)
    found = TorchVerbs().long_product(swapped, x, alpha=number, shift=number)
    assert torch.equal(found, number * x.flip(0) + number * x)


def test_torch_verbs_take_batches_of_any_shape():
    x = torch.randn(2, 3, 2, 5, 7)
    flat = x.flatten(0, 2)
    assert torch.equal(TorchVerbs().gram(x).flatten(0, 2), TorchVerbs().gram(flat))
    assert torch.equal(TorchVerbs().gram(x[0]).flatten(0, 1), TorchVerbs().gram(flat[:6]))
    assert torch.equal(TorchVerbs().gram(x[0, 0]), TorchVerbs().gram(flat[:2]))


def test_symmetric_fraction_is_the_area_of_the_panels():
    assert verbs_module.panel_ends(511, "cpu") == [511] and verbs_module.panel_ends(512, "cpu") != [512]
    for n in (10, 511, 512, 700, 4096):
        ends = verbs_module.panel_ends(n, "cpu")
        covered = torch.zeros(n, n, dtype=torch.bool)
        for start, end in zip([0, *ends], ends):
            covered[start:end, :end] = True
        assert covered.tril().sum() == n * (n + 1) // 2
        assert covered.double().mean().item() == pytest.approx(verbs_module.symmetric_fraction(n, "cpu"))
    assert verbs_module.symmetric_fraction(511, "cpu") == verbs_module.symmetric_fraction(4096, "cuda") == 1
