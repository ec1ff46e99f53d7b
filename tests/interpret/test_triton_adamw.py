"""The Triton AdamW kernel in Triton's interpreter: equal, bit for bit, to the rule written in numpy and to C++."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from steepest.conformance.memory import Guarded, differing
from steepest.kernels import adamw
from steepest.kernels.portable import narrow, widen

pytestmark = pytest.mark.interpret

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]  # params and grads, states
HYPER = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
TILE = adamw.TILE
# Nothing, one element, both sides of the vector width and of the tile, several tiles.
SIZES = (0, 1, 7, 8, TILE - 1, TILE, TILE + 1, 3 * TILE + 5)


def derived_scalars(*, lr, betas, eps, weight_decay, step):
    """The seven float32 numbers of adamw_step, rounded once from float64."""
    beta1, beta2 = betas
    lerp, bias2_sqrt = np.float32(1 - beta1), math.sqrt(1 - beta2**step)
    rest = [beta2, 1 - beta2, -(lr * bias2_sqrt / (1 - beta1**step)), eps * bias2_sqrt]
    return (np.float32(1 - lr * weight_decay), lerp, np.float32(1) - lerp, *map(np.float32, rest))


def twin(p, g, m, v, vmax, scalars, maximize=False, grad_scale=None):
    """One step of float32 arrays; every numpy operation rounds once, as the kernel's must."""
    decay, lerp, lerp_rest, beta2, beta2_rest, negative_step_size, eps = scalars
    if grad_scale is not None:
        g = g / np.float32(grad_scale)
    if maximize:
        g = -g
    p = p * decay
    toward = g - m
    m = m + lerp * toward if lerp < 0.5 else g - toward * lerp_rest
    v = v * beta2 + (beta2_rest * g) * g
    if vmax is not None:
        vmax = np.maximum(vmax, v)  # keeps a NaN of either side
    p = p + (negative_step_size * m) / (np.sqrt(v if vmax is None else vmax) + eps)
    return p, m, v, vmax


def twin_lists(tensors, scalars, **options):
    """What params, exp_avgs, exp_avg_sqs (and max_exp_avg_sqs) must become; `tensors` is the kernel's argument."""
    results = []
    for i in range(len(tensors[0])):
        row = [None if role is None else role[i].float().numpy() for role in tensors]
        with np.errstate(all="ignore"):
            p, m, v, vmax = twin(*row, scalars if isinstance(scalars, tuple) else scalars[i], **options)
        new = [p, m, v] if vmax is None else [p, m, v, vmax]
        old = [tensors[0][i], tensors[2][i], tensors[3][i]] + ([] if vmax is None else [tensors[4][i]])
        results.append([torch.from_numpy(np.asarray(x)).to(t.dtype) for x, t in zip(new, old)])
    return [list(role) for role in zip(*results)]


def guarded_lists(dtypes, amsgrad, sizes=SIZES, offsets=(0,)):
    """Guarded parameters, gradients and states as after some steps; tensor i starts offsets[i % ...] elements off."""
    param, state = dtypes
    roles = [(param, 1.0), (param, 1.0), (state, 0.1), (state, 0.01)] + ([(state, 0.01)] if amsgrad else [])
    guarded = []
    for role, (dtype, scale) in enumerate(roles):
        values = [torch.randn(n).mul(scale) for n in sizes]
        values = [x.abs() if role >= 3 else x for x in values]
        guarded.append([Guarded(x.to(dtype), offset=offsets[i % len(offsets)]) for i, x in enumerate(values)])
    return guarded


def views(guarded):
    tensors = [[item.view for item in role] for role in guarded]
    return tensors if len(tensors) == 5 else [*tensors, None]


def written(tensors):
    return [role for role in (tensors[0], tensors[2], tensors[3], tensors[4]) if role is not None]


def assert_equal(tensors, expected):
    for role, wanted in zip(written(tensors), expected):
        assert [differing(ours, theirs) for ours, theirs in zip(role, wanted)] == [0] * len(wanted)


def test_the_last_tile_ends_with_the_tensor():
    """First of all and with a whole tile of room, so that a missing tail mask fails here instead of crashing later."""
    buffers = [torch.ones(3 * TILE) for _ in range(4)]
    tensors = [[x[TILE : 2 * TILE - 3]] for x in buffers]
    adamw.adamw_step(*tensors, None, [derived_scalars(**HYPER, step=1)], None)
    assert all((x[:TILE] == 1).all() and (x[2 * TILE - 3 :] == 1).all() for x in buffers)
    assert (tensors[0][0] != 1).all()


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_every_bit_equals_the_numpy_twin_and_nothing_else_is_written(dtypes, amsgrad):
    guarded = guarded_lists(dtypes, amsgrad, offsets=(0, 1, 0, 3))
    tensors = views(guarded)
    for step in (1, 2, 1000):
        scalars = derived_scalars(**HYPER, step=step)
        expected = twin_lists(tensors, scalars)
        adamw.adamw_step(*tensors, [scalars], None)
        assert_equal(tensors, expected)
    assert sum(item.overwritten() for role in guarded for item in role) == 0
    assert not any(t.isnan().any() for role in written(tensors) for t in role)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.5), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("maximize, grad_scale", [(True, None), (False, 1.7), (True, 1024.0)])
def test_options(betas, maximize, grad_scale):
    tensors = views(guarded_lists((F32, F32), False, sizes=(5, TILE + 3)))
    scalars = derived_scalars(**{**HYPER, "betas": betas}, step=3)
    expected = twin_lists(tensors, scalars, maximize=maximize, grad_scale=grad_scale)
    scale = None if grad_scale is None else torch.tensor(grad_scale)
    adamw.adamw_step(*tensors, [scalars], None, maximize=maximize, grad_scale=scale, found_inf=torch.zeros(1))
    assert_equal(tensors, expected)


@pytest.mark.parametrize("found_inf", [1.0, math.nan])
def test_found_inf_leaves_everything(found_inf):
    tensors = views(guarded_lists((F32, F32), True, sizes=(5, TILE, TILE + 3)))
    before = [[t.clone() for t in role] for role in written(tensors)]
    scalars = [derived_scalars(**HYPER, step=1)]
    adamw.adamw_step(*tensors, scalars, None, found_inf=torch.tensor(found_inf))
    assert_equal(tensors, before)
    adamw.adamw_step(*tensors, scalars, None, found_inf=torch.tensor(0.0))
    assert all(differing(old, new) for old, new in zip(before[0], tensors[0]))


def test_each_tensor_takes_its_own_scalars():
    tensors = views(guarded_lists((F32, F32), False, sizes=(3, TILE + 1, 0, 9), offsets=(0, 1)))
    table = [derived_scalars(**{**HYPER, "lr": lr}, step=step) for lr, step in ((1e-2, 1), (1e-3, 50))]
    index = [1, 0, 0, 1]
    expected = twin_lists(tensors, [table[i] for i in index])
    adamw.adamw_step(*tensors, table, index)
    assert_equal(tensors, expected)


def special_rows(param, state):
    """One tensor per role that together hold every combination of special gradients and states."""
    tiny, huge = np.float32(1e-45), np.float32(3.4e38)
    values = [0.0, -0.0, tiny, -tiny, 1e-39, 1e-30, 1.0, 1e19, huge, -huge, np.inf, -np.inf, np.nan]
    special = torch.tensor(values, dtype=F32)
    g, m, v = (x.reshape(-1) for x in torch.meshgrid(special, special, special, indexing="ij"))
    rows = [(torch.ones_like(g), param), (g, param), (m, state), (v.abs(), state), (v.flip(0).abs(), state)]
    return [[x.to(dtype)] for x, dtype in rows]


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_special_values(dtypes):
    tensors = special_rows(*dtypes)
    scalars = derived_scalars(**HYPER, step=2)
    expected = twin_lists(tensors, scalars)
    adamw.adamw_step(*tensors, [scalars], None)
    assert_equal(tensors, expected)


@pytest.mark.parametrize(
    "sizes, offsets, launches", [((17,) * 100, (0,), 1), ((17, 1024, 0, 9), (0, 1), 2), ((0, 0), (0,), 0)]
)
def test_launches_do_not_grow_with_the_number_of_tensors(monkeypatch, sizes, offsets, launches):
    tensors = views(guarded_lists((F32, F32), False, sizes=sizes, offsets=offsets))
    scalars = derived_scalars(**HYPER, step=1)
    expected = twin_lists(tensors, scalars)
    calls, original = [], adamw.launch_arguments
    monkeypatch.setattr(adamw, "launch_arguments", lambda *args: calls.append(args[-1]) or original(*args))
    adamw.adamw_step(*tensors, [scalars], None)
    assert_equal(tensors, expected)
    assert calls == [True, False][:launches]  # first the tensors that are 16-byte aligned, then the others


def test_no_tensors():
    adamw.adamw_step([], [], [], [], None, [derived_scalars(**HYPER, step=1)], None)


@triton.jit
def widen_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(out_ptr + offsets, widen(tl.load(x_ptr + offsets)))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_widen_is_exact_everywhere(dtype):
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    out = torch.empty(65536)
    widen_kernel[(1,)](x, out, 65536)
    assert differing(out, x.float()) == 0


@triton.jit
def narrow_kernel(x_ptr, out_ptr, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    offsets = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + offsets, narrow(tl.load(x_ptr + offsets), DTYPE))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_narrow_rounds_to_nearest_even_everywhere(dtype):
    """Every 16-bit value, the midpoint above it and both neighbours of each, against torch's conversion."""
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float().view(torch.int32)
    half_unit = 1 << 15 if dtype == BF16 else 1 << 12
    nearby = [patterns + offset for offset in (-1, 0, 1, half_unit - 1, half_unit, half_unit + 1)]
    # A NaN whose payload lies in the low half alone; float16's range below its subnormals; its overflow threshold.
    edges = torch.tensor([0x7F800001, 0x32FFFFFF, 0x33000000, 0x33000001, 0x477FEFFF, 0x477FF000], dtype=torch.int32)
    x = torch.cat([*nearby, edges, -edges - 1])
    x = torch.nn.functional.pad(x, (0, -len(x) % 65536)).view(F32)
    out = torch.empty_like(x, dtype=dtype)
    triton_dtype = {BF16: tl.bfloat16, F16: tl.float16}[dtype]
    narrow_kernel[(len(x) // 65536,)](x, out, triton_dtype, 65536)
    assert torch.equal(out.isnan(), x.isnan())
    assert differing(out, x.to(dtype)) == 0


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_every_bit_equals_the_cpp_kernel(dtypes, amsgrad):
    multi_tensor = pytest.importorskip("steepest.multi_tensor", reason="the native module is not built")
    ordinary = views(guarded_lists(dtypes, True))
    start = [role + extra for role, extra in zip(ordinary, special_rows(*dtypes))]
    results = {}
    for backend in ("cpu", "triton"):
        p, g, m, v, vmax = ([t.clone() for t in role] for role in start)
        options = {"max_exp_avg_sqs": vmax} if amsgrad else {}
        for step in (1, 2):
            multi_tensor.adamw_(
                p, g, m, v, **HYPER, step=step, grad_scale=torch.tensor(3.0), maximize=True, backend=backend, **options
            )
        results[backend] = p + m + v + vmax
    assert [differing(a, b) for a, b in zip(results["cpu"], results["triton"])] == [0] * len(results["cpu"])
