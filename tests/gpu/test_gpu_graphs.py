"""Optimizers on a real GPU: graphs replay what eager steps do, skips are not waited for, norms have the CPU's bits."""

from __future__ import annotations

import contextlib
import functools
import math

import pytest
import torch

import steepest
from steepest import optim
from steepest._native import WITH_CUDA

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not WITH_CUDA, reason="built without nvcc")]
KINDS = {
    "adam": (optim.Adam, dict(weight_decay=0.1, amsgrad=True)),
    "adamw": (optim.AdamW, dict(cautious=True, l1=0.01)),
    "sgd": (optim.SGD, dict(momentum=0.9, nesterov=True)),
    "rmsprop": (optim.RMSprop, dict(centered=True, momentum=0.9)),
    "adagrad": (optim.Adagrad, dict(lr_decay=0.1)),
    "lion": (optim.Lion, dict()),
}
KEPT = {
    "float32": (torch.float32, {}),
    "block8, noise": (torch.float32, dict(state_dtype="block8", gradient_noise=(0.1, 0.55))),
    "stochastic": (torch.bfloat16, dict(stochastic_rounding=True)),
    "master": (torch.float16, dict(master_weights=True)),
}
SHAPES = [(1 << 18,), (1023,), (), (0, 4), (257, 129), *[(16,)] * 300]


def parameters(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in SHAPES]


def set_gradients(params, t):
    """In place from the second time on, as a graph's own backward pass would."""
    generator = torch.Generator().manual_seed(t + 1)
    for p in params:
        fresh = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        if p.grad is None:
            p.grad = fresh
        else:
            p.grad.copy_(fresh)


def assert_same(a, b):
    for p, q in zip(a, b):
        assert torch.equal(p.cpu(), q.cpu())


@contextlib.contextmanager
def without_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step_in_turn(sides):
    """Six steps of (parameters, lr, optimizer) by side; "graph" captures the third and replays from there on."""
    graph = torch.cuda.CUDAGraph()
    for t in range(6):
        for side, (params, lr, optimizer) in sides.items():
            set_gradients(params, t)
            lr.fill_(0.125 / (t + 1))
            if side != "graph" or t < 2:
                optimizer.step()
                continue
            if t == 2:
                with torch.cuda.graph(graph):
                    optimizer.step()
            graph.replay()


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_equal_eager_ones_and_the_cpu_s(kind, kept):
    cls, options = KINDS[kind]
    dtype, storage = KEPT[kept]
    sides = {}
    for side, device in (("cpu", "cpu"), ("eager", "cuda"), ("graph", "cuda")):
        params = parameters(device, dtype)
        lr = torch.tensor(0.125, device=device)
        sides[side] = params, lr, cls(params, lr=lr, **options, **storage, max_grad_norm=1.0, capturable=True)
    step_in_turn(sides)
    for side in ("eager", "graph"):
        assert_same(sides["cpu"][0], sides[side][0])
        for p, q in zip(sides["cpu"][0], sides[side][0]):
            a, b = sides["cpu"][2].state[p], sides[side][2].state[q]
            assert all(torch.equal(a[key], b[key].cpu()) for key in a), side
            assert int(b["step"]) == 6


def muon(params, lr, **options):
    return optim.Muon(params, lr=lr, adamw=dict(lr=0.125), capturable=True, **options)


def spectral(params, lr):
    return optim.NormedDescent(params, lr=lr, norm="spectral", weight_decay=0.25, capturable=True)


MATRIX_KINDS = {
    "muon": muon,
    "muon, normuon": functools.partial(muon, normuon=0.95),
    "muon, tuned": functools.partial(muon, schedule="tuned", cautious=True),
    "spectral descent": spectral,
}


@pytest.mark.parametrize("kind", MATRIX_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_steps_of_matrices_equal_eager_ones(kind, dtype):
    shapes = [(128, 64), (200, 333), (333, 200), (17,), *[(64, 64)] * 5]
    sides = {}
    for side in ("eager", "graph"):
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(s, generator=generator).to("cuda", dtype).requires_grad_() for s in shapes]
        lr = torch.tensor(0.0, device="cuda")
        sides[side] = params, lr, MATRIX_KINDS[kind](params, lr)
    step_in_turn(sides)
    assert_same(sides["eager"][0], sides["graph"][0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaler_s_skip_is_not_waited_for(kind):
    cls, options = KINDS[kind]
    cpu, gpu = parameters("cpu"), parameters("cuda")
    plain, scaled = cls(cpu, **options, max_grad_norm=1.0), cls(gpu, **options, max_grad_norm=1.0)
    for t, bad in enumerate((False, False, True, False, True)):
        for params in (cpu, gpu):
            set_gradients(params, t)
        if not bad:
            plain.step()
        for p in gpu:
            p.grad.mul_(1024)
        scaled.grad_scale = torch.tensor(1024.0, device="cuda")
        scaled.found_inf = torch.tensor(float(bad), device="cuda")
        with without_waiting() if t else contextlib.nullcontext():
            scaled.step()
        del scaled.grad_scale, scaled.found_inf
    assert_same(cpu, gpu)
    assert all(int(scaled.state[p]["step"]) == 3 for p in gpu)


@pytest.mark.parametrize("q", [1.0, 1.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_survey_has_the_cpu_s_bits(q, dtype):
    cpu = [p.detach() for p in parameters("cpu", dtype)]
    gpu = [p.cuda() for p in cpu]
    expected = steepest.survey(cpu, q=q)
    with without_waiting():
        found = steepest.survey(gpu, q=q)
    assert torch.equal(found.max_abs.cpu(), expected.max_abs)
    if q in (1.0, 2.0, math.inf):
        assert torch.equal(found.norm.cpu(), expected.norm)
    else:  # the root is another function there
        torch.testing.assert_close(found.norm.cpu(), expected.norm, rtol=2**-23, atol=0)
    gpu[1][7] = math.nan
    assert bool(steepest.survey(gpu, q=q).nonfinite)


def test_clipping_equals_its_formula():
    """torch's own float32 norm is further away from the exact one than this is."""
    params = parameters("cuda")
    set_gradients(params, 0)
    before = [p.grad.clone() for p in params]
    with without_waiting():
        norm = steepest.clip_grad_norm_(params, 1.0)
    exact = math.sqrt(sum(float(g.double().square().sum()) for g in before))
    assert abs(float(norm) - exact) <= 2**-23 * exact
    coefficient = (1.0 / (norm + 1e-6)).clamp(max=1.0)
    assert_same([g * coefficient for g in before], [p.grad for p in params])


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_in_a_graph_equals_eager(p, adaptive):
    sides = {}
    for side in ("eager", "graph"):
        params = parameters("cuda")
        base = optim.AdamW(params, lr=0.125, capturable=True)
        second = [torch.zeros_like(q) for q in params]
        sides[side] = params, second, optim.SAM(base, rho=0.5, p=p, adaptive=adaptive)

    def passes(params, second, sam):
        sam.first_step()
        for q, gradient in zip(params, second):
            q.grad.copy_(gradient)
        sam.second_step()

    graph = torch.cuda.CUDAGraph()
    for t in range(5):
        for side, (params, second, sam) in sides.items():
            set_gradients(params, 2 * t)
            generator = torch.Generator().manual_seed(1000 + t)
            for gradient in second:
                gradient.copy_(torch.randn(gradient.shape, generator=generator))
            if side == "eager" or t < 2:
                passes(params, second, sam)
                continue
            if t == 2:
                with torch.cuda.graph(graph):
                    passes(params, second, sam)
            graph.replay()
    assert_same(sides["eager"][0], sides["graph"][0])


def test_a_skipped_sam_step_comes_home_without_waiting():
    params = parameters("cuda")
    sam = optim.SAM(optim.AdamW(params, lr=0.125), rho=0.5)
    for t in range(3):
        before = [q.detach().clone() for q in params]
        set_gradients(params, t)
        with without_waiting() if t else contextlib.nullcontext():
            sam.first_step()
            sam.grad_scale, sam.found_inf = torch.ones((), device="cuda"), torch.full((), float(t == 2), device="cuda")
            sam.second_step()
        del sam.grad_scale, sam.found_inf
    assert_same(before, params)
