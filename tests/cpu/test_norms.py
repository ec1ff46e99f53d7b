"""survey and clip_grad_norm_: against float64, for every order, layout, dtype and number of threads."""

import math

import pytest
import torch

import steepest
from steepest import norms

SHAPES = [(5, 7), (33,), (), (20_011,), (0,), (64, 130)]


def tensors(dtype=torch.float32, size=1.0):
    generator = torch.Generator().manual_seed(0)
    found = [(size * torch.randn(shape, generator=generator)).to(dtype) for shape in SHAPES]
    found.append(found[5].t())  # dense, in another order
    found.append(found[5][:, ::2])  # with gaps
    return found


@pytest.mark.parametrize("q", [1, 1.5, 2, 3, 12, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 2.0**-10, 2.0**13])
def test_norm_against_float64(q, dtype, size):
    found = steepest.survey(tensors(dtype, size), q=q)
    exact = torch.cat([t.double().flatten() for t in tensors(dtype, size)])
    # Sums are float64; one rounding to float32 at the end.
    torch.testing.assert_close(found.norm.double(), torch.linalg.vector_norm(exact, q), rtol=2.0**-23, atol=0)
    assert found.max_abs == exact.abs().max() and not found.nonfinite
    assert found.norm.dtype == found.max_abs.dtype == torch.float32 and found.norm.shape == ()


@pytest.mark.parametrize("q", [2, 3, 40])
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_powers_do_not_overflow(q, size):
    x = torch.full((1000,), size)
    torch.testing.assert_close(steepest.survey([x], q=q).norm.double() / size, torch.tensor(1000.0).double() ** (1 / q))


@pytest.mark.parametrize("bad, largest", [(math.inf, math.inf), (-math.inf, math.inf), (math.nan, math.nan)])
@pytest.mark.parametrize("q", [1, 2, 3, math.inf])
def test_one_bad_element_is_found(bad, largest, q):
    x = tensors()
    x[3][17_001] = bad
    found = steepest.survey(x, q=q)
    assert found.nonfinite
    for value in (found.norm, found.max_abs):
        assert value == largest or (math.isnan(largest) and value.isnan())


def test_nothing_and_zeros():
    for x in ([], [torch.zeros(0)], [torch.zeros(5)]):
        for q in (1, 2, 3, math.inf):
            found = steepest.survey(x, q=q)
            assert found.norm == 0 and found.max_abs == 0 and not found.nonfinite


def test_does_not_depend_on_threads():
    x = [torch.randn(300_001), torch.randn(7)]
    before = torch.get_num_threads()
    results = set()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.add(float(steepest.survey(x).norm))
    finally:
        torch.set_num_threads(before)
    assert len(results) == 1


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: steepest.survey(torch.ones(3)), TypeError, "tensors is a Tensor, expected a list"),
        (lambda: steepest.survey([torch.ones(3).double()]), TypeError, "float64"),
        (lambda: steepest.survey([torch.ones(3)], q=0.5), ValueError, "q is 0.5"),
        (lambda: steepest.survey([torch.ones(3)], q=math.nan), ValueError, "q is nan"),
        (lambda: steepest.survey([torch.ones(3), torch.ones(3, device="meta")]), ValueError, "meta"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("norm_type", [1, 2, 3.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clips_as_torch_does(norm_type, max_norm, dtype):
    x = [t for t in tensors(dtype) if t.numel()]  # torch has no inf norm of an empty tensor

    def params(exact):
        found = [torch.zeros(3, requires_grad=True)]  # without a gradient
        for t in x:
            found.append(torch.zeros(t.shape, dtype=exact or dtype, requires_grad=True))
            found[-1].grad = t.to(exact) if exact else t.clone()
        return found

    ours, theirs = params(None), params(torch.float64)
    norm = steepest.clip_grad_norm_(ours, max_norm, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    torch.testing.assert_close(norm.double(), expected, rtol=2.0**-23, atol=0)
    # Norm, sum, quotient in float32; coefficient and product in the gradients' dtype.
    for p, q in zip(ours[1:], theirs[1:]):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=3 * 2.0**-23 + torch.finfo(dtype).eps, atol=0)
    assert ours[0].grad is None


def test_non_finite_norms_are_refused_before_any_change():
    p = torch.zeros(3, requires_grad=True)
    p.grad = torch.tensor([1.0, math.inf, 2.0])
    with pytest.raises(RuntimeError, match="is not finite"):
        steepest.clip_grad_norm_(p, 1.0, error_if_nonfinite=True)
    assert p.grad.tolist() == [1.0, math.inf, 2.0]
    assert steepest.clip_grad_norm_(p, 1.0) == math.inf
    assert p.grad[0] == 0 and p.grad[1].isnan()


@pytest.mark.parametrize("q", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("n", [1, 511, 512, 600, 8192, 8193, 2 * 8192 + 600])
def test_the_librarys_survey_reads_every_element_and_nothing_beside_them(q, n):
    """Within NaN; its three numbers are those of any C program."""
    whole = torch.full((n + 64,), math.nan)
    x = whole[32 : 32 + n]
    x.copy_(torch.linspace(-1, 0.5, n))
    total, largest, flag = norms.native([x], q, 1.0)
    assert (total, largest, flag) == (
        pytest.approx(0 if math.isinf(q) else (x.double().abs() ** q).sum().item()),
        1,
        False,
    )
    for place in (0, n - 1):
        for value in (math.nan, math.inf, -math.inf, torch.finfo(torch.float32).max):
            kept, x[place] = x[place].item(), value
            total, largest, flag = norms.native([x], q, 1.0)
            assert flag == (not math.isfinite(value)) and (math.isnan(value) or largest == abs(value))
            x[place] = kept
