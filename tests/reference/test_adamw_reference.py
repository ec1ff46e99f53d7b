"""The AdamW oracle: against the paper's formula in 50 digits, torch's for-loop, and numpy's float32 arithmetic."""

from __future__ import annotations

from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch

from steepest.conformance.bounds import Tracked
from steepest.reference import adamw_
from steepest.reference.adamw import element, scalars, square_root

HYPER = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def state(shape, dtype, amsgrad=False):
    p, g, m, v = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
    lists = [p, g, 0.1 * m, 0.01 * v.square()] + ([0.01 * torch.randn(shape).square()] if amsgrad else [])
    return [x.to(dtype) for x in lists]


def float64_bound(p, g, m, v, steps, first_step, hyper, vmax=None):
    """(p, m, v, vmax) with running error bounds for float64 arithmetic; g is a list of gradients."""
    x = [None if t is None else Tracked.exact(t, torch.float64) for t in (p, m, v, vmax)]
    for k in range(steps):
        s = scalars(**hyper, step=first_step + k).map(lambda value: Tracked.constant(value, torch.float64))
        x = element(x[0], Tracked.exact(g[k], torch.float64), *x[1:], s)
    return x


def paper_step(p, g, m, v, step, lr, betas, eps, weight_decay):
    """Algorithm 2 of Loshchilov & Hutter 2019 in 50-digit decimals, with eta_t = 1 and lr * lambda as the decay."""
    p, g, m, v, lr, b1, b2, eps, decay = map(Decimal, (p, g, m, v, lr, *betas, eps, weight_decay))
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    update = (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + eps)
    return p - lr * decay * p - lr * update, m, v


def exact_scalars(step, lr, betas, eps, weight_decay):
    lr, b1, b2, eps, decay = map(Decimal, (lr, *betas, eps, weight_decay))
    return {
        "decay": 1 - lr * decay, "lerp": 1 - b1, "beta2": b2, "beta2_rest": 1 - b2,
        "negative_step_size": -lr * (1 - b2**step).sqrt() / (1 - b1**step), "eps": eps * (1 - b2**step).sqrt(),
    }  # fmt: skip


@pytest.mark.parametrize("step", [1, 2, 1000, 10**9])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.95), (0.0, 0.0)])
def test_one_step_is_the_papers(step, betas):
    getcontext().prec = 50
    hyper = {**HYPER, "betas": betas}
    ours, exact = scalars(**hyper, step=step), exact_scalars(step, **hyper)
    # With u = 2^-53: 1 - beta^t is off by 2 u (power) + u (difference), relatively to 1 - beta^t itself, and a root or
    # a quotient adds u; the other scalars are two operations.
    cancellation = 1 / (1 - max(betas) ** step)
    deviation = {name: abs(Decimal(value) - exact[name]) for name, value in vars(ours).items()}
    assert all(error <= abs(exact[name]) * Decimal(4 * 2**-53 * cancellation) for name, error in deviation.items())

    p, g, m, v = state((20,), torch.float64)
    tracked = type(ours)(
        **{
            name: Tracked(
                *(torch.tensor(float(x), dtype=torch.float64) for x in (value, deviation[name])), torch.float64
            )
            for name, value in vars(ours).items()
        }
    )
    bound = element(*(Tracked.exact(x, torch.float64) for x in (p, g, m, v)), None, tracked)
    rows = zip(*(x.tolist() for x in (p, g, m, v)))
    expected = zip(*(paper_step(*row, step, **hyper) for row in rows))
    adamw_([p], [g], [m], [v], step=step, **hyper)
    for values, trues, number in zip((p, m, v), expected, bound):
        for value, true, error in zip(values.tolist(), trues, number.error.tolist()):
            assert abs(Decimal(value) - true) <= Decimal(error)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_twenty_steps_in_float64_are_torchs(amsgrad, maximize):
    steps = 20
    p = torch.randn(50, dtype=torch.float64)
    grads = [torch.randn(50, dtype=torch.float64) for _ in range(steps)]
    theirs = p.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], amsgrad=amsgrad, maximize=maximize, foreach=False, **HYPER)
    ours, m, v = p.clone(), torch.zeros_like(p), torch.zeros_like(p)
    vmax = torch.zeros_like(p) if amsgrad else None
    for k, g in enumerate(grads):
        theirs.grad = g.clone()
        optimizer.step()
        options = {"max_exp_avg_sqs": [vmax]} if amsgrad else {}
        adamw_([ours], [g], [m], [v], step=k + 1, maximize=maximize, **options, **HYPER)
    signed = [-g if maximize else g for g in grads]
    zero = torch.zeros_like(p)
    bound = float64_bound(p, signed, zero, zero, steps, 1, HYPER, zero if amsgrad else None)
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    pairs = [(ours, theirs.detach()), *zip((m, v, vmax), (optimizer.state[theirs].get(name) for name in names))]
    for (a, b), tracked in zip(pairs, bound):
        if a is not None:
            # Two implementations, each within the bound of the exact trajectory.
            assert ((a - b).abs() <= 2 * tracked.error).all()


def numpy_step(p, g, m, v, s):
    """float32, one correctly rounded operation at a time."""
    f = {name: np.float32(value) for name, value in vars(s).items()}
    p = p * f["decay"]
    toward = g - m
    m = m + f["lerp"] * toward if f["lerp"] < 0.5 else g - toward * (np.float32(1) - f["lerp"])
    v = v * f["beta2"] + (f["beta2_rest"] * g) * g
    return p + (f["negative_step_size"] * m) / (np.sqrt(v) + f["eps"]), m, v


@pytest.mark.parametrize("beta1", [0.9, 0.3])
def test_float32_is_rounded_operation_by_operation(beta1):
    hyper = {**HYPER, "betas": (beta1, 0.999)}
    p, g, m, v = state((100_003,), torch.float32)
    expected = numpy_step(*(x.numpy().copy() for x in (p, g, m, v)), scalars(**hyper, step=7))
    adamw_([p], [g], [m], [v], step=7, **hyper)
    for ours, theirs in zip((p, m, v), expected):
        assert np.array_equal(ours.numpy().view(np.int32), theirs.view(np.int32))


def test_square_root_is_correctly_rounded_where_torchs_is_not():
    x = torch.randint(0, 0x7F800000, (1_000_000,), dtype=torch.int32).view(torch.float32)
    subnormal = torch.arange(0, 1 << 23, 97, dtype=torch.int32).view(torch.float32)
    for values in (x, subnormal):
        assert torch.equal(square_root(values), torch.from_numpy(np.sqrt(values.numpy())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_tensors_are_stepped_in_float32_and_rounded_once(dtype):
    lists = state((1000,), dtype)
    wide = [x.float() for x in lists]
    for p, g, m, v in (lists, wide):
        adamw_([p], [g], [m], [v], step=3, **HYPER)
    for narrow, full in zip(lists, wide):
        assert torch.equal(narrow, full.to(dtype))


def test_grad_scale_divides_and_found_inf_skips():
    a = state((65,), torch.float32)
    b = [x.clone() for x in a]
    b[1] = b[1] * 4
    adamw_(*([x] for x in a), step=1, **HYPER)
    adamw_(*([x] for x in b), step=1, grad_scale=torch.tensor([4.0]), found_inf=torch.zeros(1), **HYPER)
    assert all(torch.equal(x, y) for x, y in zip(a[0::2] + a[3:], b[0::2] + b[3:]))
    before = [x.clone() for x in a]
    adamw_(*([x] for x in a), step=2, found_inf=torch.ones(1), **HYPER)
    assert all(torch.equal(x, y) for x, y in zip(a, before))


def test_one_step_number_per_tensor():
    a = [[x.clone(), x.clone()] for x in state((9,), torch.float32)]
    b = [[x.clone() for x in role] for role in a]
    adamw_(*a, step=[1, 50], **HYPER)
    for i, step in enumerate((1, 50)):
        adamw_(*([role[i]] for role in b), step=step, **HYPER)
    assert all(torch.equal(x, y) for r, s in zip(a, b) for x, y in zip(r, s))


def test_amsgrad_keeps_the_maximum_and_nan():
    p, g, m, v, vmax = state((4,), torch.float32, amsgrad=True)
    vmax[0], vmax[1], g[2] = 100.0, float("nan"), float("nan")
    adamw_([p], [g], [m], [v], max_exp_avg_sqs=[vmax], step=1, **HYPER)
    assert vmax[0] == 100 and vmax[1].isnan() and vmax[2].isnan() and vmax[3] >= v[3]


def test_lists_of_different_length_are_refused():
    p, g, _m, v = state((3,), torch.float32)
    with pytest.raises(ValueError, match="adamw_: exp_avgs has 0 tensors, params has 1"):
        adamw_([p], [g], [], [v], step=1, **HYPER)
