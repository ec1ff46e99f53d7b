"""The joint survey of several lists on the CPU (csrc/engine/measure), which capturable optimizers and SAM read: every
number that it gives, against numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from steepest import norms

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LISTS = {F32: [(1000,), (3, 5), ()], BF16: [(129,), (2, 2)], F16: [(70,)]}
SUM = 2.0**-40  # of products and squares in float64, each exact or rounded once to float32 before


def lists(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(dtype) for dtype, shapes in LISTS.items() for s in shapes]


def measured(tensors, q, *, weights=None, alpha=0.0, eps=1.0, max_norm=1.0, grad_scale=None, **kind):
    measure = norms.new_measure(q, **kind)
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        chosen = [i for i, t in enumerate(tensors) if t.dtype is dtype]
        own = None if weights is None else [weights[i] for i in chosen]
        norms.add_lists(measure, [tensors[i] for i in chosen], own, alpha, eps)
    scale = None if grad_scale is None else torch.tensor(grad_scale)
    return norms.run_measure(measure, torch.device("cpu"), max_norm=max_norm, grad_scale=scale)


def flat(tensors):
    return np.concatenate([t.double().flatten().numpy() for t in tensors])


def weighed(tensors, weights, alpha, eps):
    """float32 products, as the survey forms them."""
    rows = [
        t.float().numpy() * (np.abs(w.float().numpy()) * np.float32(alpha) + np.float32(eps))
        for t, w in zip(tensors, weights)
    ]
    return np.concatenate([np.asarray(row, np.float64).flatten() for row in rows])


def check(found, x, q):
    """Norm, its float32, largest and steepness of the elements x."""
    largest = np.abs(x).max()
    norm = largest if math.isinf(q) else largest * (np.abs(x / largest) ** q).sum() ** (1 / q)
    torch.testing.assert_close(found.norm.item(), norm, rtol=1e-6 if q not in (1, 2) else SUM, atol=0)
    assert found.norm32.item() == np.float32(found.norm.item())
    assert found.largest.item() == np.float32(largest) and not found.nonfinite
    if not math.isinf(q):
        assert found.steepness.item() == np.float32(largest / found.norm.item())


@pytest.mark.parametrize("q", [1.0, 1.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_norms_over_lists_of_several_dtypes(q, scale):
    tensors = lists()
    if scale == 1:
        check(measured(tensors, q), flat(tensors), q)
    tensors = [t for t in tensors if t.dtype is not F16]  # of smaller range
    tensors = [(t.double() * scale).to(t.dtype) for t in tensors]
    check(measured(tensors, q), flat(tensors), q)


@pytest.mark.parametrize("q", [1.0, 1.5, 2.0, 3.0, math.inf])
def test_weighed_norms(q):
    tensors, weights = lists(), lists(1)
    check(measured(tensors, q, weights=weights, alpha=0.5, eps=0.25), weighed(tensors, weights, 0.5, 0.25), q)


def test_inner_product():
    tensors, weights = lists(), lists(1)
    found = measured(tensors, 1.0, weights=weights, inner=True)
    expected = flat(tensors) @ flat(weights)
    size = np.abs(flat(tensors)) @ np.abs(flat(weights))
    assert abs(found.norm.item() - expected) <= SUM * size and abs(expected) > 1e-3 * size


@pytest.mark.parametrize("count", [1, 3])
def test_the_steepness_of_the_largest_norm_is_shared_by_those_that_attain_it(count):
    """Spread over the lists; one that is a single unit smaller does not count."""
    tensors = [torch.full((5,), 0.5), torch.full((4,), 0.5, dtype=BF16), torch.full((9,), -0.5)]
    tensors[0][1] = 2 - 2.0**-23
    for k in range(count):
        tensors[k][2] = -2.0 if k % 2 else 2.0
    found = measured(tensors, math.inf, count_largest=True)
    assert found.steepness.item() == np.float32(1 / count) and found.norm.item() == found.largest.item() == 2
    assert measured(tensors, math.inf).steepness.item() == 1


@pytest.mark.parametrize("q", [1.0, 1.5, 2.0, math.inf])
def test_zeros_and_nothing_at_all(q):
    for tensors in ([torch.zeros(7), torch.zeros(2, dtype=BF16)], [torch.zeros(0)]):
        found = measured(tensors, q, count_largest=math.isinf(q))
        assert found.norm.item() == found.norm32.item() == found.largest.item() == 0 and not found.nonfinite
        assert found.clip_coefficient.item() == 1
    if math.isinf(q):
        assert measured([torch.zeros(3)], q, count_largest=True).steepness.item() == 1


@pytest.mark.parametrize("q", [1.0, 1.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 3])
def test_what_is_not_finite_is_flagged(q, value, place):
    tensors = lists()
    tensors[place].view(-1)[-1] = value
    found = measured(tensors, q, count_largest=math.isinf(q))
    assert found.nonfinite
    expected = abs(value)
    for x in (found.norm.item(), found.largest.item(), found.norm32.item()):
        assert x == expected or (math.isnan(x) and math.isnan(expected))
    coefficient = found.clip_coefficient.item()
    assert math.isnan(coefficient) if math.isnan(value) else coefficient == 0
    assert not measured(lists(), q).nonfinite
    largest = [torch.full((2,), torch.finfo(F32).max)]
    found = measured(largest, q, count_largest=math.isinf(q))
    assert not found.nonfinite
    norm = largest[0][0].item() * 2 ** (0 if math.isinf(q) else 1 / q)
    torch.testing.assert_close(found.norm.item(), norm, rtol=1e-6, atol=0)


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 4.999999, 5.0, 5.000001, 5.00001, 6.0, math.inf])
@pytest.mark.parametrize("grad_scale", [None, 1.0, 3.0, 1024.0])
def test_the_clip_coefficient_is_torchs_for_unscaled_gradients(max_norm, grad_scale):
    """max_norm / (norm + 1e-6), at most 1, as clip_grad_norm_ rounds it, of a norm of 5."""
    tensors = [torch.tensor([3.0]) * (grad_scale or 1), torch.tensor([4.0, 0.0]) * (grad_scale or 1)]
    found = measured(tensors, 2.0, max_norm=max_norm, grad_scale=grad_scale)
    assert found.norm32.item() == 5 and found.norm.item() == 5 * (grad_scale or 1)
    expected = torch.clamp(max_norm / (torch.tensor(5.0) + 1e-6), max=1.0)
    assert found.clip_coefficient.item() == expected.item()


def test_one_list_read_twice_gives_the_same_bits():
    tensors = lists()
    a, b = (measured(tensors, q) for q in (3.0, 3.0))
    assert a.norm.item() == b.norm.item() and a.steepness.item() == b.steepness.item()
