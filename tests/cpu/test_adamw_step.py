"""steepest.adamw_ on the CPU: against torch's for-loop, across layouts, threads and dtypes, and its refusals."""

from __future__ import annotations

import pytest
import torch

import steepest
from steepest import layout

HYPER = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
SHAPES = [(33, 17), (5,), (), (0, 3), (1,), (4, 3, 5, 5), (64, 1), (1025,)]


def lists(shapes=SHAPES, dtype=torch.float32, arrange=lambda t: t):
    """Parameters, gradients and states as after some steps, all in the layout that `arrange` gives."""
    make = lambda scale: [arrange((torch.randn(s) * scale).to(dtype)) for s in shapes]  # noqa: E731
    p, g, m, v = make(1.0), make(1.0), make(0.1), [t.square_() for t in make(0.1)]
    return p, g, m, v


def clone(tensors):
    return [t.clone(memory_format=torch.preserve_format) for t in tensors]


def transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.ndim > 1 else t


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t


def every_second(t):
    """A view with gaps: neither dense nor contiguous."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype) if t.ndim else None
    if wide is None:
        return t
    view = wide[..., ::2]
    view.copy_(t)
    return view


def ulps(ours, theirs, floor=0.1):
    """Largest difference in units of the last place of the larger of |theirs| and `floor`."""
    if not ours.numel():
        return 0.0
    size = theirs.double().abs().clamp(min=floor)
    return ((ours.double() - theirs.double()).abs() / torch.exp2(size.log2().floor() - 23)).max().item()


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("arrange", [lambda t: t, transposed, channels_last, every_second])
def test_fifty_steps_lie_within_eight_ulp_of_torch_for_loop(arrange, maximize, amsgrad):
    values = [torch.randn(s) for s in SHAPES]
    ours = [arrange(t.clone()).requires_grad_() for t in values]
    theirs = [t.clone().requires_grad_() for t in values]
    options = dict(lr=1e-2, weight_decay=0.1, amsgrad=amsgrad, maximize=maximize)
    a = steepest.optim.AdamW(ours, **options)
    b = torch.optim.AdamW(theirs, **options, foreach=False)
    for _ in range(50):
        for p, q in zip(ours, theirs):
            g = torch.randn(p.shape)
            p.grad, q.grad = arrange(g.clone()), g
        a.step()
        b.step()
    for p, q in zip(ours, theirs):
        assert ulps(p.detach(), q.detach()) <= 8
        for key in ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if amsgrad else ()):
            assert ulps(a.state[p][key], b.state[q][key]) <= 8
        assert a.state[p]["step"] == b.state[q]["step"] == 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_thread_count_never_changes_a_bit(dtype):
    shapes = [(1 << 17,), *SHAPES, (300, 401), *[(16,)] * 200]
    results = []
    for threads in (1, 2):
        torch.manual_seed(1)
        p, g, m, v = lists(shapes, dtype)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            steepest.adamw_(p, g, m, v, step=3, **HYPER)
        finally:
            torch.set_num_threads(before)
        results.append(p + m + v)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("role", [0, 1, 2, 3])
@pytest.mark.parametrize("arrange", [transposed, every_second])
def test_one_list_in_another_layout_gives_the_same_bits(role, arrange):
    plain = lists()
    mixed = [clone(role_list) for role_list in plain]
    mixed[role] = [arrange(t) for t in mixed[role]]
    steepest.adamw_(*plain, step=2, **HYPER)
    steepest.adamw_(*mixed, step=2, **HYPER)
    for a, b in zip(plain, mixed):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_neighbours_of_a_strided_view_are_untouched():
    whole = torch.randn(20, 20)
    before = whole.clone()
    p, g = whole[:, ::2], torch.randn(20, 10)
    m, v = torch.zeros(20, 10), torch.zeros(20, 10)
    steepest.adamw_([p], [g], [m], [v], step=1, **HYPER)
    assert torch.equal(whole[:, 1::2], before[:, 1::2])
    assert not torch.equal(whole[:, ::2], before[:, ::2])


def test_interleaved_views_are_no_aliases():
    whole = torch.randn(20, 20)
    p = [whole[:, ::2], whole[:, 1::2]]
    g, m, v = ([torch.randn(20, 10).abs() for _ in p] for _ in range(3))
    expected = [clone(role) for role in (p, g, m, v)]
    steepest.adamw_(p, g, m, v, step=1, **HYPER)
    steepest.adamw_(*expected, step=1, **HYPER)
    assert torch.equal(p[0], expected[0][0]) and torch.equal(p[1], expected[0][1])


def test_mixed_dtypes_devices_and_steps_in_one_call():
    rows = [lists([(7, 9)], dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.float16)]
    together = [[row[role][0].clone() for row in rows] for role in range(4)]
    steepest.adamw_(*together, step=[1, 2, 3, 1], **HYPER)
    for i, (row, step) in enumerate(zip(rows, (1, 2, 3, 1))):
        steepest.adamw_(*row, step=step, **HYPER)
        assert all(torch.equal(together[role][i], row[role][0]) for role in range(4))


def test_sixteen_bit_parameters_with_float32_states_round_once():
    p, g, m, v = lists([(999,)], torch.bfloat16)
    m, v = [m[0].float()], [v[0].float()]
    wide = [p[0].float()], [g[0].float()], clone(m), clone(v)
    steepest.adamw_(p, g, m, v, step=4, **HYPER)
    steepest.adamw_(*wide, step=4, **HYPER)
    assert torch.equal(p[0], wide[0][0].to(torch.bfloat16))
    assert torch.equal(m[0], wide[2][0]) and torch.equal(v[0], wide[3][0])


def test_grad_scale_divides_and_found_inf_skips():
    p, g, m, v = lists()
    scaled = clone(p), [t * 1024 for t in g], clone(m), clone(v)
    steepest.adamw_(p, g, m, v, step=1, **HYPER)
    steepest.adamw_(*scaled, step=1, grad_scale=torch.tensor(1024.0), **HYPER)
    assert all(torch.equal(a, b) for a, b in zip(p + m + v, scaled[0] + scaled[2] + scaled[3]))
    before = clone(p)
    steepest.adamw_(p, g, m, v, step=2, found_inf=torch.tensor([1.0]), **HYPER)
    assert all(torch.equal(a, b) for a, b in zip(p, before))


def test_gradients_are_only_read_and_versions_advance():
    p, g, m, v = lists()
    before, versions = clone(g), [t._version for t in p]
    steepest.adamw_(p, g, m, v, step=1, **HYPER)
    assert all(torch.equal(a, b) for a, b in zip(g, before))
    assert all(t._version > old for t, old in zip(p, versions))


def test_nan_and_inf_stay_where_they_are():
    p, g, m, v = lists([(1000,)])
    g[0][7], g[0][13] = torch.nan, torch.inf
    clean = clone(p), [g[0].nan_to_num(0, 0, 0)], clone(m), clone(v)
    steepest.adamw_(p, g, m, v, step=1, **HYPER)
    steepest.adamw_(*clean, step=1, **HYPER)
    others = torch.tensor([i not in (7, 13) for i in range(1000)])
    assert p[0][~others].isnan().all()
    assert torch.equal(p[0][others], clean[0][0][others])


def test_two_threads_may_step_different_tensors_at_once():
    from concurrent.futures import ThreadPoolExecutor

    work = [lists([(1 << 16,), (33,)]) for _ in range(8)]
    alone = [[clone(role) for role in row] for row in work]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda row: [steepest.adamw_(*row, step=t, **HYPER) for t in (1, 2, 3)], work))
    for row in alone:
        for t in (1, 2, 3):
            steepest.adamw_(*row, step=t, **HYPER)
    assert all(torch.equal(a, b) for x, y in zip(work, alone) for r, s in zip(x, y) for a, b in zip(r, s))


def bad(change, error, words):
    return pytest.param(change, error, words, id=words[0])


def _set(role, i, tensor):
    def change(call):
        call[role][i] = tensor(call[role][i]) if callable(tensor) else tensor

    return change


def _option(name, value):
    return lambda call: call.__setitem__(name, value)


def _alias(call):
    call["exp_avgs"][0] = call["params"][0]


def _overlap(call):
    base = torch.randn(600)
    call["params"][1], call["exp_avgs"][1] = base[:5], base[3:8]


def _non_leaf(call):
    call["params"][0] = torch.randn(33, 17, requires_grad=True) * 2


BAD = [
    bad(lambda c: c["grads"].pop(), ValueError, ["grads has 7 tensors", "params has 8"]),
    bad(lambda c: c.__setitem__("grads", torch.ones(3)), TypeError, ["grads is a Tensor", "list of tensors"]),
    bad(_set("grads", 0, torch.ones(17, 33)), ValueError, ["grads[0] has shape (17, 33)", "params[0] has (33, 17)"]),
    bad(_set("exp_avg_sqs", 1, torch.ones(6)), ValueError, ["exp_avg_sqs[1] has shape (6,)"]),
    bad(_set("params", 0, lambda t: t.double()), TypeError, ["params[0] has dtype torch.float64", "float32"]),
    bad(_set("grads", 0, lambda t: t.to(torch.complex64)), TypeError, ["grads[0] has dtype torch.complex64"]),
    bad(_set("grads", 0, lambda t: t.to_sparse()), ValueError, ["grads[0] is torch.sparse_coo", "to_dense"]),
    bad(_set("grads", 2, None), TypeError, ["grads[2] is NoneType"]),
    bad(_set("grads", 0, lambda t: t.to("meta")), ValueError, ["grads[0] is on meta"]),
    bad(_set("exp_avgs", 0, lambda t: t.bfloat16()), TypeError, ["states of one row differ in dtype"]),
    bad(_set("exp_avgs", 1, lambda t: torch.zeros(1).expand(5)), ValueError, ["exp_avgs[1] is an expanded view"]),
    bad(_alias, ValueError, ["exp_avgs[0] shares memory with params[0]"]),
    bad(_overlap, ValueError, ["exp_avgs[1] shares memory with params[1]"]),
    bad(lambda c: c["params"].__setitem__(3, c["params"][0]), ValueError, ["has shape (0, 3), params[3] has (33, 17)"]),
    bad(_non_leaf, ValueError, ["params[0] is not a leaf", "MulBackward0"]),
    bad(_option("lr", -1.0), ValueError, ["lr is -1.0", ">= 0"]),
    bad(_option("lr", float("nan")), ValueError, ["lr is nan"]),
    bad(_option("lr", "fast"), TypeError, ["lr is 'fast'", "expected a number"]),
    bad(_option("betas", (0.9, 1.0)), ValueError, ["betas[1] is 1.0", "[0, 1)"]),
    bad(_option("betas", 0.9), ValueError, ["betas is 0.9", "two numbers"]),
    bad(_option("eps", -1e-8), ValueError, ["eps is -1e-08"]),
    bad(_option("weight_decay", -0.1), ValueError, ["weight_decay is -0.1"]),
    bad(_option("step", 0), ValueError, ["step is 0"]),
    bad(_option("step", [1, 2]), ValueError, ["step has 2 numbers for 8 params"]),
    bad(_option("step", 1.5), ValueError, ["step is 1.5", "whole number"]),
    bad(_option("grad_scale", 2.0), ValueError, ["grad_scale is float", "one-element float32 tensor"]),
    bad(_option("found_inf", torch.zeros(2)), ValueError, ["found_inf is torch.float32 of shape (2,)"]),
    bad(_option("backend", "gpu"), ValueError, ["backend is 'gpu'", "auto, cpu, cuda, triton"]),
    bad(_option("backend", "cuda"), ValueError, ["backend='cuda'", "cpu"]),
    bad(_option("backend", "triton"), ValueError, ["TRITON_INTERPRET=1"]),
]


@pytest.mark.parametrize("change, error, words", BAD)
def test_bad_input_is_refused_with_nothing_changed(change, error, words):
    call = dict(zip(("params", "grads", "exp_avgs", "exp_avg_sqs"), lists()), step=1, **HYPER)
    change(call)
    tensors = [t for value in call.values() if isinstance(value, list) for t in value if isinstance(t, torch.Tensor)]
    readable = [t for t in tensors if t.device.type == "cpu" and t.layout == torch.strided]
    before = [t.detach().clone() for t in readable]
    with pytest.raises(error) as caught:
        steepest.adamw_(call.pop("params"), call.pop("grads"), call.pop("exp_avgs"), call.pop("exp_avg_sqs"), **call)
    assert str(caught.value).startswith("adamw_: ")
    for word in words:
        assert word in str(caught.value)
    assert all(torch.equal(t.detach(), old) for t, old in zip(readable, before))


def test_duplicated_parameter_is_refused():
    p, g, m, v = lists([(9,), (9,)])
    with pytest.raises(ValueError, match=r"params\[1\] shares memory with params\[0\]"):
        steepest.adamw_([p[0], p[0]], g, m, v, step=1, **HYPER)


@pytest.mark.parametrize("arrange", [lambda t: t, transposed, channels_last, every_second])
def test_dense_agrees_with_enumeration(arrange):
    for shape in SHAPES:
        t = arrange(torch.randn(shape))
        offsets = torch.arange(max(1, t.untyped_storage().nbytes() // 4)).as_strided(t.shape, t.stride()).flatten()
        enumerated = not t.numel() or offsets.unique().numel() == t.numel() == int(offsets.max() - offsets.min()) + 1
        assert layout.is_dense(t) == enumerated
