"""How optimizers keep their tensors: trajectories, rounding at random, checkpoints, averages, noise."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch

import steepest
from steepest import optim, reference
from steepest.reference import storage as codec
from steepest.storage import num_blocks

CLASSES = {
    "SGD": dict(lr=0.1, momentum=0.9),
    "Adagrad": dict(lr=0.1),
    "RMSprop": dict(lr=0.01, centered=True, momentum=0.5),
    "Adam": dict(lr=0.01, amsgrad=True),
    "AdamW": dict(lr=0.01),
    "Lion": dict(lr=0.01),
}
MODES = {
    "master": dict(master_weights=True),
    "16 bits": dict(correction_bits=16),
    "8 bits": dict(correction_bits=8),
    "random": dict(stochastic_rounding=True),
    "block8": dict(state_dtype="block8"),
    "16-bit states": dict(state_dtype=torch.bfloat16),
    "all": dict(correction_bits=8, state_dtype="block8", ema_decay=0.9, gradient_noise=(1e-4, 0.55), seed=3),
}
SHAPES = ((40, 33), (257,), (), (0,), (3, 0), (128,))


def parameters(dtype=torch.bfloat16, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (0.1 * torch.randn(p.shape, generator=generator)).to(p.dtype)


def run(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        give_gradients(params, step)
        optimizer.step()


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CLASSES)
def test_masters_walk_the_float32_trajectory(name, dtype):
    low = parameters(dtype)
    full = [torch.nn.Parameter(p.detach().float()) for p in low]
    a = getattr(optim, name)(low, **CLASSES[name], master_weights=True)
    b = getattr(optim, name)(full, **CLASSES[name])
    for step in range(10):
        give_gradients(low, step)
        for p, q in zip(low, full):
            q.grad = p.grad.float()
        a.step(), b.step()
    for p, q in zip(low, full):
        assert same(a.state[p]["master"], q.detach())
        assert same(p.detach(), q.detach().to(dtype))


@pytest.mark.parametrize("name", CLASSES)
def test_16_correction_bits_are_a_master(name):
    one, other = parameters(), parameters()
    a = getattr(optim, name)(one, **CLASSES[name], master_weights=True)
    b = getattr(optim, name)(other, **CLASSES[name], correction_bits=16)
    run(a, one, 10), run(b, other, 10)
    for p, q in zip(one, other):
        assert same(a.state[p]["master"], codec.join(q.detach(), b.state[q]["residual"]))
        assert b.state[q]["exp_avg" if "Adam" in name else list(b.state[q])[-2]].dtype == torch.float32


def test_8_correction_bits_keep_24_bits():
    x = torch.randn(10_000) * torch.exp2(torch.randint(-20, 20, (10_000,)).float())
    high, low = codec.split(x, torch.int8)
    back = codec.join(high, low)
    # 16 bits of significand, rounded to nearest.
    assert ((back - x).abs() <= x.abs() * 2.0**-16).all()
    assert ((back - x).abs() > 0).float().mean() > 0.9
    assert ((high.float() - x).abs() <= x.abs() * 2.0**-8).all()


def test_stochastic_rounding_has_no_bias_and_hits_neighbours_only():
    count = 1 << 20
    for x in (1.001, -3.1415926, 1e-30, 65000.0):
        value = torch.full((count,), x)
        words, _ = codec.random_words(torch.arange(count), seed=1, step=1, purpose=codec.ROUNDING)
        rounded = codec.round_stochastic(value, words)
        found = rounded.unique().float()
        below, above = found.min().double(), found.max().double()
        assert len(found) == 2 and below < x < above
        # The mean of `count` draws of a two-valued variable: five standard deviations.
        share = (x - below) / (above - below)
        deviation = (above - below) * math.sqrt(share * (1 - share) / count)
        assert abs(rounded.double().mean() - torch.tensor(x, dtype=torch.float32).double()) < 5 * deviation


def test_rounding_to_nearest_loses_small_steps_and_stochastic_rounding_does_not():
    def moved(**options):
        p = torch.nn.Parameter(torch.ones(1 << 14, dtype=torch.bfloat16))
        optimizer = optim.SGD([p], lr=1e-4, **options)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        value = p.detach()
        if "residual" in optimizer.state[p]:
            value = codec.join(value, optimizer.state[p]["residual"])
        return float((1 - value.double()).mean())

    assert moved() == 0.0
    # 100 steps of 1e-4; below 1 neighbours are 2^-8 apart, so the mean of 2^14 elements deviates by about
    # sqrt(0.01 * 2^-8 / 2^14) = 5e-5.
    assert moved(stochastic_rounding=True) == pytest.approx(0.01, abs=5 * 5e-5)
    # 100 errors of at most half of 2^-16; a master's float32 rounding is far smaller.
    assert moved(correction_bits=8) == pytest.approx(0.01, abs=100 * 2.0**-17)


def test_8_bit_codes_are_within_half_a_step_and_unbiased():
    generator = torch.Generator().manual_seed(0)
    for magnitude in (False, True):
        x = torch.randn(128 * 500, generator=generator) * torch.exp(2 * torch.randn(128 * 500, generator=generator))
        x = x.abs() if magnitude else x
        index = torch.arange(x.numel())
        exponents = codec.block8_exponents(x, index, magnitude)
        total = torch.zeros_like(x, dtype=torch.float64)
        draws = 200
        for step in range(draws):
            words, _ = codec.random_words(index, seed=1, step=step, purpose=codec.ROUNDING)
            back = codec.block8_decode(
                codec.block8_encode(x, exponents, index, magnitude, words), exponents, index, magnitude
            )
            top = torch.exp2(exponents.double() - 127).repeat_interleave(128)
            smallest = 1.125 * top * 2.0 ** (-31 if magnitude else -15)
            # One step of 3 bits of significand, or one smallest code.
            assert ((back - x).abs() <= torch.maximum(x.abs() / 8, smallest)).all()
            total += back.double()
        wanted = x.double() if not magnitude else torch.maximum(x.double(), smallest)
        # A draw's variance is at most a quarter of the step squared; six deviations over 64,000 elements.
        step_size = torch.maximum(x.abs().double() / 8, smallest)
        assert ((total / draws - wanted).abs() <= 6 * step_size / 2 / math.sqrt(draws) + x.abs() * 1e-4).all()
        if magnitude:
            assert (back[x > 0] > 0).all()  # a second moment never becomes 0 under a first that is not


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 3e38])
def test_8_bit_scales_neither_under_nor_overflow(scale):
    x = scale * torch.rand(256).clamp(min=0.01)
    index = torch.arange(256)
    for magnitude in (False, True):
        exponents = codec.block8_exponents(x, index, magnitude)
        half = torch.full_like(index, 0x7FFF)
        back = codec.block8_decode(
            codec.block8_encode(x, exponents, index, magnitude, half), exponents, index, magnitude
        )
        assert back.isfinite().all() and ((back - x).abs() <= x / 8 + 1e-37).all()


def test_a_block_with_inf_becomes_nan_and_its_neighbours_do_not_notice():
    p = torch.nn.Parameter(torch.ones(384))
    optimizer = optim.AdamW([p], state_dtype="block8")
    p.grad = torch.full((384,), 0.1)
    p.grad[200] = torch.inf
    optimizer.step()
    p.grad = torch.full((384,), 0.1)
    optimizer.step()
    assert p.detach()[128:256].isnan().all()
    assert p.detach()[:128].isfinite().all() and p.detach()[256:].isfinite().all()


def test_a_second_moment_in_8_bits_decays():
    """With rounding to nearest it would stay: 0.999 of a code is nearer to it than to the next."""
    p = torch.nn.Parameter(torch.zeros(4096))
    optimizer = optim.AdamW([p], lr=0.0, betas=(0.9, 0.99), state_dtype="block8")
    p.grad = torch.ones(4096)
    optimizer.step()
    for _ in range(200):
        p.grad = torch.zeros(4096)
        optimizer.step()
    entry = optimizer.state[p]
    v = codec.block8_decode(entry["exp_avg_sq"], entry["exp_avg_sq_exponents"], torch.arange(4096), True)
    # 200 random roundings of up to 1/8 each spread an element by about exp(+-0.9); the mean of 4096 is far closer.
    assert v.double().mean() == pytest.approx(0.01 * 0.99**200, rel=0.15)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CLASSES)
def test_checkpoints_come_back_exactly(name, mode):
    params = parameters()
    make = getattr(optim, name)
    optimizer = make(params, **CLASSES[name], **MODES[mode])
    run(optimizer, params, 3)
    file = io.BytesIO()
    torch.save(dict(model=params, optimizer=optimizer.state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = make(copies, **CLASSES[name])
    other.load_state_dict(saved["optimizer"])
    for p, q in zip(params, copies):
        assert optimizer.state[p].keys() == other.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert same(value, other.state[q][key]), key
    run(optimizer, params, 3, first=3), run(other, copies, 3, first=3)
    assert all(same(p.detach(), q.detach()) for p, q in zip(params, copies))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in CLASSES if name != "Lion"])
def test_torch_takes_the_converted_checkpoint(name, mode):
    params = parameters()
    optimizer = getattr(optim, name)(params, **CLASSES[name], **MODES[mode])
    run(optimizer, params, 3)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = getattr(torch.optim, name)(copies, **CLASSES[name])
    other.load_state_dict(optimizer.torch_state_dict())
    plain = {key for key in optimizer.state[params[0]] if key not in ("master", "residual", "ema")}
    assert set(other.state[copies[0]]) == {key for key in plain if not key.endswith("_exponents")}
    assert all(value.dtype == torch.bfloat16 for key, value in other.state[copies[0]].items() if key != "step")
    run(other, copies, 1, first=3)


def test_a_checkpoint_of_torch_is_taken_into_any_mode():
    for mode, options in MODES.items():
        params = parameters()
        theirs = torch.optim.AdamW(params, lr=0.01)
        run(theirs, params, 3)
        copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
        ours = optim.AdamW(copies, lr=0.01, **options)
        loaded = theirs.state_dict()
        for group in loaded["param_groups"]:
            group.update(options)
        ours.load_state_dict(loaded)
        run(ours, copies, 1, first=3), run(theirs, params, 1, first=3)
        for p, q in zip(params, copies):
            # One step of at most about 3 lr, rounded to bfloat16 on both sides.
            assert ((p - q).abs() <= 0.03 + 2**-8 * p.abs()).all(), mode
        assert ours.state[copies[0]]["step"] == 4


def test_averages_follow_the_weights_and_can_be_looked_at():
    params = parameters(torch.float32)
    optimizer = optim.AdamW(params, lr=0.1, ema_decay=0.75)
    with pytest.raises(ValueError, match="no averages yet"), optimizer.ema_weights():
        pass
    expected = [p.detach().double() for p in params]
    for step in range(4):
        run(optimizer, params, 1, first=step)
        expected = [e + 0.25 * (p.detach().double() - e) for e, p in zip(expected, params)]
    for p, e in zip(params, expected):
        torch.testing.assert_close(optimizer.state[p]["ema"].double(), e, rtol=4 * 4 * 2**-24, atol=4 * 4 * 2**-24)
    own = [p.detach().clone() for p in params]
    with optimizer.ema_weights():
        assert all(same(p.detach(), optimizer.state[p]["ema"]) for p in params)
    assert all(same(p.detach(), q) for p, q in zip(params, own))


def test_noise_is_normal_annealed_and_its_own():
    def noise(step, seed=0, count=1 << 18):
        p, g = torch.zeros(count), torch.zeros(count)
        steepest.sgd_([p], [g], lr=1.0, step=step, gradient_noise=(0.25, 0.55), seed=seed)
        return p.double()

    first, later, other = noise(1), noise(1000), noise(1, seed=1)
    for x, step in ((first, 1), (later, 1000), (other, 1)):
        variance = 0.25 / (1 + step) ** 0.55
        n = x.numel()
        assert abs(x.mean()) < 5 * math.sqrt(variance / n)
        assert abs(x.var() / variance - 1) < 5 * math.sqrt(2 / n)
        assert abs((x**4).mean() / variance**2 - 3) < 5 * math.sqrt(96 / n)
    for x, y in ((first, later), (first, other)):
        assert abs((x * y).mean() / (x.std() * y.std())) < 5 / math.sqrt(n)


@pytest.mark.parametrize("options", [dict(gradient_noise=(0.1, 0.5)), dict(stochastic_rounding=True)])
def test_shards_draw_what_the_whole_tensor_draws(options):
    torch.manual_seed(0)
    whole, g = torch.randn(1000).bfloat16(), torch.randn(1000).bfloat16()
    parts = [part.clone() for part in whole.split([300, 0, 513, 187])]
    steepest.sgd_([whole], [g], lr=0.1, step=7, seed=5, first_index=[40], **options)
    for part, grad, start in zip(parts, g.split([300, 0, 513, 187]), (0, 300, 300, 813)):
        steepest.sgd_([part], [grad.clone()], lr=0.1, step=7, seed=5, first_index=[40 + start], **options)
    assert same(torch.cat(parts), whole)


def test_threads_do_not_change_what_is_drawn():
    def result(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            params = parameters(shapes=((70_001,), (5,), (300, 301)))
            optimizer = optim.AdamW(params, **MODES["all"])
            run(optimizer, params, 3)
            return params
        finally:
            torch.set_num_threads(before)

    assert all(same(p.detach(), q.detach()) for p, q in zip(result(1), result(3)))


def test_parameters_are_numbered_whether_they_have_gradients_or_not():
    one, other = parameters(), parameters()
    a = optim.SGD(one, lr=0.1, gradient_noise=(0.1, 0.5))
    b = optim.SGD(other, lr=0.1, gradient_noise=(0.1, 0.5))
    give_gradients(one, 0), give_gradients(other, 0)
    other[0].grad = None
    a.step(), b.step()
    assert all(same(p.detach(), q.detach()) for p, q in zip(one[1:], other[1:]))


def test_masters_are_taken_anew_when_asked():
    params = parameters()
    for options in (dict(master_weights=True), dict(correction_bits=16)):
        optimizer = optim.SGD(params, lr=0.1, **options)
        run(optimizer, params, 2)
        with torch.no_grad():
            for p in params:
                p.fill_(2.0)
        optimizer.reset_masters()
        for p in params:
            p.grad = torch.full_like(p, 1.0)
        optimizer.step()
        assert all((p == torch.tensor(1.9).bfloat16()).all() for p in params)


def test_mixed_types_in_one_group():
    params = parameters(torch.bfloat16) + parameters(torch.float32)
    optimizer = optim.AdamW(params, lr=0.01, master_weights=True)
    run(optimizer, params, 2)
    assert ["master" in optimizer.state[p] for p in params] == [True] * len(SHAPES) + [False] * len(SHAPES)
    assert all(optimizer.state[p]["exp_avg"].dtype == torch.float32 for p in params)


def test_layouts_of_8_bit_states():
    p = torch.nn.Parameter(torch.randn(4, 6, 5, 7).to(memory_format=torch.channels_last))
    optimizer = optim.AdamW([p], state_dtype="block8")
    run(optimizer, [p], 2)
    assert optimizer.state[p]["exp_avg"].stride() == p.stride()
    assert optimizer.state[p]["exp_avg_exponents"].shape == (num_blocks(p.numel()),)
    before = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
    p.data = p.data.contiguous()
    give_gradients([p], 3)
    with pytest.raises(ValueError, match="8-bit states must lie in memory as their parameter does"):
        optimizer.step()
    assert same(p.detach(), before[1]) and optimizer.state[p]["step"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(correction_bits=4), "correction_bits is 4, expected 0, 8 or 16"),
        (dict(state_dtype="int8"), "state_dtype is 'int8', expected None"),
        (dict(master_weights=True, correction_bits=8), "exclude each other"),
        (dict(gradient_noise=0.1), r"expected \(eta, gamma\)"),
        (dict(gradient_noise=(-1, 0.5)), r"gradient_noise\[0\] is -1"),
        (dict(ema_decay=1.5), r"expected a number in \[0, 1\]"),
        (dict(seed=-1), "seed is -1"),
        (dict(stochastic_rounding=True, state_dtype=torch.float16), "is to bfloat16"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        optim.AdamW(parameters(), **options)


def test_wrong_options_name_the_known_ones():
    with pytest.raises(TypeError, match="unknown argument 'master_weight'; known besides the rule's: master_weights"):
        optim.Lion(parameters(), master_weight=True)
    with pytest.raises(ValueError, match="correction_bits is for bfloat16 parameters, found float16"):
        optim.AdamW(parameters(torch.float16), correction_bits=8)
    with pytest.raises(TypeError, match="unknown argument 'master'"):
        steepest.sgd_([], [], lr=0.1, step=1, master=[])


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (lambda p: dict(masters=[p.detach().bfloat16()]), "masters.0. has dtype torch.bfloat16; supported: float32"),
        (lambda p: dict(residuals=[torch.zeros(8)]), "residuals.0. has dtype torch.float32; supported: int16, int8"),
        (lambda p: dict(masters=[torch.zeros(7)]), r"masters.0. has shape \(7,\), params.0. has \(8,\)"),
        (lambda p: dict(masters=[torch.zeros(8)], sources=[p.clone()]), "masters hold the parameters by themselves"),
        (lambda p: dict(averages=[torch.zeros(8)]), "averages and average_decay go together"),
        (lambda p: dict(sources=[p.float()]), "sources.0. has dtype torch.float32, params.0. has torch.bfloat16"),
        (lambda p: dict(state_exponents=[]), "state_exponents has 0 lists"),
        (lambda p: dict(state_exponents=[[torch.zeros(1, dtype=torch.uint8)]]), "torch.bfloat16; supported: uint8"),
        (lambda p: dict(first_index=[1, 2]), "first_index has 2 numbers for 1 params"),
        (lambda p: dict(masters=[]), "masters has 0 tensors, params has 1"),
    ],
)  # fmt: skip
def test_wrong_lists_are_refused_before_anything_changes(kept, message):
    p, g, m = torch.ones(8).bfloat16(), torch.ones(8).bfloat16(), torch.zeros(8).bfloat16()
    with pytest.raises((ValueError, TypeError), match=message):
        steepest.sgd_([p], [g], [m], lr=0.1, momentum=0.9, step=1, **kept(p))
    assert (p == 1).all() and (m == 0).all()


def test_a_master_that_shares_memory_is_refused():
    p, g, master = torch.ones(8).bfloat16(), torch.ones(8).bfloat16(), torch.ones(12)
    with pytest.raises(ValueError, match=r"averages\[0\] shares memory with masters\[0\]"):
        steepest.sgd_([p], [g], lr=0.1, step=1, masters=[master[:8]], averages=[master[4:]], average_decay=0.9)


def test_random_words_are_philox():
    """Known answers of Random123 1.14 (kat_vectors, philox2x32 10)."""
    import numpy as np

    known = [
        (0x00000000, 0x00000000, 0x00000000, 0xFF1DAE59, 0x6CD10DF2),
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0x2C3F628B, 0xAB4FD7AD),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0xDD7CE038, 0xF62A4C12),
    ]
    for a, b, key, x, y in known:
        assert codec.philox(np.array([a], np.uint64), np.array([b], np.uint64), key) == (x, y)


# --- calls against the reference, bit for bit -------------------------------------------------------------------------


def adam_lists(param, grad, state, states=2, shapes=((700,), (129,), (), (8, 3))):
    generator = torch.Generator().manual_seed(5)
    lists = [[torch.randn(s, generator=generator).to(dtype) for s in shapes] for dtype in (param, grad)]
    return lists + [[torch.zeros(s, dtype=state) for s in shapes] for _ in range(states)]


def assert_as_the_reference(lists, steps=3, exponents=None, **options):
    """adam_ of the kernels and of the reference from the same start, with other gradients in every step."""
    found = []
    for function in (steepest.adam_, reference.adam_):
        mine, own = copy.deepcopy(lists), copy.deepcopy(exponents)
        kept = {} if own is None else {"state_exponents": own}
        for step in range(1, steps + 1):
            grads = [g / step for g in mine[1]]
            more = {"max_exp_avg_sqs": mine[4]} if len(mine) > 4 else {}
            function(mine[0], grads, mine[2], mine[3], lr=0.01, step=step, **more, **kept, **options)
        found.append([t for role in (*mine, *(own or [])) for t in role])
    assert all(same(a, b) for a, b in zip(*found))
    assert not torch.equal(found[0][0], lists[0][0])


@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtypes_together(param, grad, state):
    """Also those of which only some are the same: 16-bit calls of one dtype have a way of their own."""
    assert_as_the_reference(adam_lists(param, grad, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        dict(gradient_noise=(0.25, 0.0)),  # a deviation of exactly 0.5
        dict(gradient_noise=(0.25, 0.0), maximize=True),
        dict(maximize=True),
        dict(clip_coefficient=torch.tensor(0.3)),
        dict(clip_coefficient=torch.tensor(0.3), maximize=True, weight_decay=0.1),
        dict(clip_coefficient=torch.tensor(0.3), grad_scale=torch.tensor(1.0)),
        dict(clip_coefficient=torch.tensor(0.3), grad_scale=torch.tensor(3.0)),
        dict(clip_value=0.5, maximize=True),
        dict(l1=0.1),
    ],
)
def test_what_is_done_to_gradients_in_every_dtype(dtype, options):
    assert_as_the_reference(adam_lists(dtype, dtype, dtype), **options)


def test_three_states_of_8_bits_draw_bits_of_their_own():
    lists = adam_lists(torch.bfloat16, torch.bfloat16, torch.uint8, states=3)
    exponents = [[torch.zeros(num_blocks(p.numel()), dtype=torch.uint8) for p in lists[0]] for _ in range(3)]
    assert_as_the_reference(lists, steps=5, exponents=exponents, seed=3)
