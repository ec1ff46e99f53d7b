"""Steps that are counted where the parameters live: the same numbers, no waiting, and replays as a CUDA graph's.

On the CPU the library takes the very path that a GPU takes where `_native.asynchronous` says so.  A replay is a native
call made again: like a graph's, it knows nothing but addresses.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch

import steepest
from steepest import _native, optim, sam_ops
from steepest._native import lib, reader

KINDS = {
    "adam": (optim.Adam, dict(weight_decay=0.1)),
    "adam-amsgrad": (optim.Adam, dict(amsgrad=True, maximize=True)),
    "adamw": (optim.AdamW, dict(cautious=True, l1=0.01)),
    "sgd": (optim.SGD, dict(momentum=0.9, nesterov=True)),
    "sgd-plain": (optim.SGD, dict()),
    "rmsprop": (optim.RMSprop, dict(centered=True, momentum=0.9)),
    "adagrad": (optim.Adagrad, dict(lr_decay=0.1)),
    "lion": (optim.Lion, dict()),
}
KEPT = {
    "float32": (torch.float32, {}),
    "block8": (torch.float32, dict(state_dtype="block8")),
    "noise, average": (torch.float32, dict(gradient_noise=(0.1, 0.55), ema_decay=0.9)),
    "master": (torch.bfloat16, dict(master_weights=True)),
    "stochastic": (torch.bfloat16, dict(stochastic_rounding=True)),
}


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (7,), (), (0, 2), (300,), (5, 6))
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    made[-1] = made[-1].t()[:, ::2]  # with gaps between its elements
    return [p.requires_grad_() for p in made]


def set_gradients(params, t, scale=1.0):
    generator = torch.Generator().manual_seed(t + 1)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def train(optimizer, params, steps=5):
    for t in range(steps):
        set_gradients(params, t)
        if t == 2:
            params[1].grad = None
        optimizer.step()


def assert_same(a, b, params_a, params_b):
    for p, q in zip(params_a, params_b):
        assert torch.equal(p, q)
        assert set(a.state[p]) == set(b.state[q])
        for key in a.state[p]:
            assert torch.equal(torch.as_tensor(a.state[p][key]), torch.as_tensor(b.state[q][key])), key


@pytest.fixture
def on_device(monkeypatch):
    """The CPU is treated as a device that the host would have to wait for, and waiting for it is an error."""
    monkeypatch.setattr(_native, "asynchronous", lambda device: True)

    def waits(*args, **kwargs):
        raise AssertionError("the host waits for the device")

    def start():
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
            monkeypatch.setattr(torch.Tensor, name, waits)

    yield start
    monkeypatch.undo()


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_steps_that_the_host_counts(kind, kept):
    cls, options = KINDS[kind]
    dtype, storage = KEPT[kept]
    count = 5 if kept == "block8" else 6  # 8-bit states of parameters with gaps are refused
    a, b = parameters(dtype)[:count], parameters(dtype)[:count]
    ours = cls(a, **options, **storage, max_grad_norm=1.0)
    capturable = cls(b, **options, **storage, max_grad_norm=1.0, capturable=True)
    train(ours, a)
    train(capturable, b)
    assert_same(ours, capturable, a, b)
    assert [int(capturable.state[p]["step"]) for p in b] == [5, 4, 5, 5, 5, 5][:count]


def groups(params, *values):
    return [{"params": [p], **values[i % len(values)]} for i, p in enumerate(params)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_in_tensors_equal_numbers(dtype):
    a, b = parameters(), parameters()
    values = [dict(lr=0.125, weight_decay=0.25, betas=(0.5, 0.75)), dict(lr=0.5, weight_decay=0.0, betas=(0.25, 0.5))]

    def tensors(group):
        held = {name: torch.tensor(group[name], dtype=dtype) for name in ("lr", "weight_decay")}
        return {**held, "betas": tuple(torch.tensor([[beta]], dtype=dtype) for beta in group["betas"])}

    ours = optim.AdamW(groups(a, *values))
    capturable = optim.AdamW(groups(b, *map(tensors, values)), capturable=True)
    train(ours, a)
    train(capturable, b)
    assert_same(ours, capturable, a, b)


def test_a_replayed_step_reads_everything_from_memory(monkeypatch):
    """Like a graph, a native call that is made again must follow gradients, learning rate and step count."""
    a, b = parameters()[:-1], parameters()[:-1]
    lr = torch.tensor(0.125)
    ours = optim.AdamW(a, lr=0.125, max_grad_norm=1.0)
    capturable = optim.AdamW(b, lr=lr, capturable=True)
    set_gradients(a, 0), set_gradients(b, 0)
    recorded = []
    original = lib.step_states
    monkeypatch.setattr(lib, "step_states", lambda *call: (recorded.append(call), original(*call)))
    capturable.step()
    monkeypatch.undo()
    ours.max_grad_norm = None
    ours.step()
    ((read, rows, call),) = recorded
    for t in range(1, 6):
        for p, q in zip(a, b):
            q.grad.copy_(torch.randn(q.shape, generator=torch.Generator().manual_seed(t)))
            p.grad = q.grad.clone()
        ours.param_groups[0]["lr"] = 0.125 / t
        lr.fill_(ours.param_groups[0]["lr"])
        ours.param_groups[0]["lr"] = float(lr)
        ours.step()
        original(read, rows, call)
    assert_same(ours, capturable, a, b)
    assert int(capturable.state[b[0]]["step"]) == 6


def test_scheduler_writes_into_the_learning_rate():
    params = parameters()
    lr = torch.tensor(1.0)
    optimizer = optim.SGD(params, lr=lr, capturable=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(optimizer, params, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is lr and lr == 0.5
    before = params[0].detach().clone()
    set_gradients(params, 9)
    optimizer.step()
    assert torch.equal(params[0], before - 0.5 * params[0].grad)


def test_counters_stay_where_they_are():
    """Graphs know them by address, whichever parameters step and whatever happens to the optimizer's tables."""
    params = parameters()
    optimizer = optim.Adam(params, capturable=True)
    train(optimizer, params, 2)
    before = [optimizer.state[p]["step"].data_ptr() for p in params]
    params[1].grad = None
    optimizer.step()
    set_gradients(params, 1)
    optimizer.step()
    assert [optimizer.state[p]["step"].data_ptr() for p in params] == before
    assert len(set(before)) == len(before)
    optimizer.state[params[0]]["step"].fill_(10)  # and what is written there counts
    optimizer.step()
    assert int(optimizer.state[params[0]]["step"]) == 11


def test_checkpoints_go_both_ways():
    a, b, c = parameters(), parameters(), parameters()
    first = optim.Adam(a, capturable=True)
    train(first, a, 3)
    saved = first.state_dict()
    second, third = optim.Adam(b, capturable=True), optim.Adam(c)
    for params in (b, c):
        for p, q in zip(params, a):
            p.data.copy_(q)
    second.load_state_dict(copy.deepcopy(saved))  # torch's loading takes tensors as they are, not copies of them
    third.load_state_dict(copy.deepcopy(saved))
    third.param_groups[0]["capturable"] = False
    for optimizer, params in ((first, a), (second, b), (third, c)):
        set_gradients(params, 7)
        optimizer.step()
        assert_same(first, optimizer, a, params)


def test_torch_goes_on_with_a_checkpoint():
    a, b = parameters()[:-1], parameters()[:-1]
    ours, theirs = optim.Adam(a, capturable=True), torch.optim.Adam(b)
    train(ours, a, 2)
    for p, q in zip(a, b):
        q.data.copy_(p)
    theirs.load_state_dict(ours.torch_state_dict())
    before = b[0].detach().clone()
    set_gradients(b, 3)
    theirs.step()  # which torch refuses with capturable=True here
    assert not torch.equal(b[0], before) and int(theirs.state[b[0]]["step"]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lr=torch.tensor([0.1, 0.2])), r"lr is a torch.float32 tensor of shape \(2,\), expected one"),
        (dict(betas=(torch.tensor(1), 0.9)), "betas is a torch.int64 tensor"),
        (dict(lr=torch.tensor(-1.0)), "lr"),
    ],
)
def test_wrong_tensors_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        optim.Adam(parameters(), capturable=True, **options)


def scaled_step(optimizer, scale, found):
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(found)
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_is_not_waited_for(kind, on_device):
    cls, options = KINDS[kind]
    a, b = parameters()[:-1], parameters()[:-1]
    ours, theirs = cls(a, **options, max_grad_norm=1.0), cls(b, **options, max_grad_norm=1.0)
    for t, (bad, bad_elsewhere) in enumerate([(0.0, 0.0), (1.0, 0.0), (math.nan, 0.0), (0.0, 0.0), (1.0, 0.0)]):
        set_gradients(a, t, 8.0)
        set_gradients(b, t, 8.0)
        if t == 1:
            on_device()  # the first step makes the states
        if not bad:
            scaled_step(theirs, 8.0, bad_elsewhere)
        scaled_step(ours, 8.0, bad)
    steps = [ours.state[p]["step"] for p in a]
    assert all(torch.equal(p, q) for p, q in zip(a, b))
    assert all(torch.equal(step, torch.tensor(2.0)) for step in steps)


def test_max_grad_norm_equals_the_host_s(on_device):
    a, b = parameters()[:-1], parameters()[:-1]
    ours, capturable = optim.AdamW(a, max_grad_norm=0.5), optim.AdamW(b, max_grad_norm=0.5, capturable=True)
    set_gradients(a, 0), set_gradients(b, 0)
    capturable.step()
    set_gradients(b, 1)
    on_device()
    capturable.step()
    norm = capturable.grad_norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "asynchronous", lambda device: False)
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(torch.Tensor, name, getattr(torch._C.TensorBase, name))
        ours.step()
        set_gradients(a, 1)
        ours.step()
        assert all(torch.equal(p, q) for p, q in zip(a, b)) and torch.equal(norm, ours.grad_norm)


def lists():
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(shape, generator=generator) for shape in ((300, 40), (7,), (0,), (), (9000,))]
    return [*made, made[0].bfloat16(), torch.randn(8, 8, generator=generator)[:, :3]]


@pytest.mark.parametrize("q", [1.0, 1.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("bad", [None, math.inf, math.nan])
def test_survey_equals_the_host_s(q, bad, monkeypatch):
    tensors = lists()
    if bad is not None:
        tensors[1][3] = bad
    expected = steepest.survey(tensors, q=q)
    monkeypatch.setattr(_native, "asynchronous", lambda device: True)
    found = steepest.survey(tensors, q=q)
    assert torch.allclose(
        found.norm, expected.norm, rtol=0 if q in (1.0, 2.0, math.inf) else 2**-23, atol=0, equal_nan=True
    )
    assert torch.allclose(found.max_abs, expected.max_abs, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.nonfinite, expected.nonfinite)


@pytest.mark.parametrize("q", [1.25, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("adaptive", [False, True])
def test_steepness_equals_the_host_s(q, adaptive, monkeypatch):
    grads = lists()
    grads[0][0, 0] = grads[0][1, 1] = 9.0
    weights = [torch.ones_like(g) for g in grads]
    weighing = [sam_ops.Weighing.of(adaptive, 0.01)] * len(grads)
    expected = sam_ops.measure(grads, weights, weighing, q)
    monkeypatch.setattr(_native, "asynchronous", lambda device: True)
    found = sam_ops.measure(grads, weights, weighing, q)
    for name in ("norm", "largest", "coefficient"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype and torch.allclose(a, b, rtol=2**-45 if a.dtype == torch.float64 else 2**-23, atol=0)
    assert torch.equal(found.nonfinite, expected.nonfinite)
    assert sam_ops.inner(grads[:1], grads[:1]).dtype == torch.float64


def test_clipping_is_not_waited_for(on_device):
    a, b = parameters(), parameters()
    set_gradients(a, 0), set_gradients(b, 0)
    expected = torch.nn.utils.clip_grad_norm_(a, 0.5)
    on_device()
    norm = steepest.clip_grad_norm_(b, 0.5)
    assert torch.allclose(norm, expected)
    assert all(torch.allclose(p.grad, q.grad) for p, q in zip(a, b))


def sam_passes(sam, params, t, found=0.0, bad=False):
    set_gradients(params, 2 * t, 8.0)
    sam.first_step(zero_grad=True)
    set_gradients(params, 2 * t + 1, 8.0)
    if bad:
        params[0].grad.fill_(math.inf)
    sam.grad_scale, sam.found_inf = torch.tensor(8.0), torch.tensor(found)
    try:
        sam.second_step()
    finally:
        del sam.grad_scale, sam.found_inf


@pytest.mark.parametrize("p", [1, 1.5, 2, math.inf])
@pytest.mark.parametrize("base", ["fused", "torch"])
def test_sam_waits_for_nothing(p, base, on_device):
    def build(params):
        inner = optim.AdamW(params, lr=0.1) if base == "fused" else torch.optim.AdamW(params, lr=0.1, fused=True)
        return optim.SAM(inner, rho=0.5, p=p, adaptive=True)

    a, b = parameters()[:-1], parameters()[:-1]
    ours, expected = build(a), build(b)
    for t in range(3):
        sam_passes(expected, b, t)
        sam_passes(ours, a, t)
    on_device()
    before = [q.detach().clone() for q in a]
    sam_passes(ours, a, 3, found=1.0, bad=True)
    assert all(torch.equal(q, kept) for q, kept in zip(a, before))  # skipped, and home
    sam_passes(ours, a, 4)
    sam_passes(expected, b, 4)
    assert all(torch.equal(q, r) for q, r in zip(a, b))
    assert not any(torch.equal(q, kept) for q, kept in zip(a, before) if q.numel())


def test_native_calls_check_what_is_counted():
    p, g = torch.ones(3), torch.ones(3)
    counter = lib.Addresses([])
    from steepest.engine import Call
    from steepest.rules import hyper_fields, sgd

    call = Call(sgd("sgd_", momentum=False), counters=counter)
    with pytest.raises(ValueError, match="counters and the lists of tensors differ in length"):
        lib.step(reader, [[p], [g]], call.native([(hyper_fields({"lr": 1.0}), 1)], None))
    live = Call(sgd("sgd_", momentum=False), live=((0, 0, False, counter_address := p.data_ptr()),))
    assert counter_address
    with pytest.raises(ValueError, match="live values need counters"):
        lib.step(reader, [[p], [g]], live.native([(hyper_fields({"lr": 1.0}), 1)], None))
    assert torch.equal(p, torch.ones(3))


def step_with_growing_lr(optimizer, params, steps, lr=None, start=None):
    """With learning rates 0, 1/8, 2/8, ...; from the second step on, when there are states, `start` forbids waiting.
    Returns the parameters after each step."""
    seen = []
    for t in range(steps):
        if t == 1 and start is not None:
            start()
        set_gradients(params, t)
        if lr is None:
            optimizer.param_groups[0]["lr"] = 0.125 * t
        else:
            lr.fill_(0.125 * t)
        optimizer.step()
        seen.append([p.detach().clone() for p in params])
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, dict(cautious=True, nesterov=False), dict(normuon=0.95, scale="spectral")])
def test_muon_reads_its_learning_rate_where_it_is(options, dtype, on_device, monkeypatch):
    """Momentum and polar factors do not depend on the weights.  A step rounds four times the eager way (the product by
    1 - lr weight_decay, the factor on the change, their sum, storing), three times the capturable one: 4 u |W| each,
    for weights of at most 4."""
    sides = []
    for live in (False, True):
        generator = torch.Generator().manual_seed(1)
        shapes = ((12, 7), (7, 12), (5,), (3, 4, 4))
        params = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
        lr, decay = (torch.tensor(0.0), torch.tensor(0.25)) if live else (0.0, 0.25)
        optimizer = optim.Muon(
            params, lr=lr, weight_decay=decay, matrices="stack", adamw=dict(lr=0.125), capturable=live, **options
        )  # fmt: skip
        assert [group["algorithm"] for group in optimizer.param_groups] == ["muon", "adamw"]
        step_with_growing_lr(optimizer, params, 5, *((lr, on_device) if live else ()))
        sides.append(params)
    monkeypatch.undo()
    before = torch.randn(12, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert (sides[1][0] - before).abs().max() > 0.1
    for k, (p, q) in enumerate(zip(*sides)):
        bound = 0 if k == 2 else 4 * 4 * torch.finfo(dtype).eps / 2 * 4
        assert (p - q).abs().max() <= bound, k


@pytest.mark.parametrize("norm", ["l2", "linf", "spectral"])
@pytest.mark.parametrize("maximize", [False, True])
def test_normed_descent_reads_its_learning_rate_where_it_is(norm, maximize, on_device, monkeypatch):
    """The same directions; of sums in float32 one is rounded twice where the other is fused."""
    sides = []
    for live in (False, True):
        params = parameters()
        lr, decay = (torch.tensor(0.0), torch.tensor(0.25)) if live else (0.0, 0.25)
        options = dict(norm=norm, normalized=norm != "linf", maximize=maximize, capturable=live)
        optimizer = optim.NormedDescent(params, lr=lr, weight_decay=decay, **options)
        sides.append(step_with_growing_lr(optimizer, params, 3, *((lr, on_device) if live else ())))
    monkeypatch.undo()
    for start, between, p, q in zip(*sides[0], sides[1][-1]):
        if p.numel():
            # Two steps, each rounding a product, a factor and a sum.  A change is at most the sum of two weights.
            largest = 2 * max(x.abs().max().item() for x in (start, between, p))
            assert (p - q).abs().max() <= 2 * 3 * 2**-24 * largest and not torch.equal(p, start)
