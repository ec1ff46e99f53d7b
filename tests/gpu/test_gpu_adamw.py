"""AdamW on a real GPU: bit for bit the CPU's result, asynchronous, capturable in a graph."""

from __future__ import annotations

import pytest
import torch

import steepest
from steepest._native import WITH_CUDA

pytestmark = pytest.mark.gpu
HYPER = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
TRIPLES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
SHAPES = [(1 << 20,), (1023,), (), (0, 4), (5,), (257, 129), *[(16,)] * 1500]


def lists(dtype, state_dtype, offset=0):
    def make(t, kind):
        flat = torch.zeros(t.numel() + offset, dtype=kind)[offset:]
        return flat.view(t.shape).copy_(t)

    shapes = SHAPES
    p, g, m = ([torch.randn(s) for s in shapes] for _ in range(3))
    v = [torch.rand(s) for s in shapes]
    return (
        [make(t, dtype) for t in p],
        [make(t, dtype) for t in g],
        [make(t, state_dtype) for t in m],
        [make(t, state_dtype) for t in v],
    )


def to_cuda(tensors, offset):
    out = []
    for t in tensors:
        flat = torch.empty(t.numel() + offset, dtype=t.dtype, device="cuda")[offset:]
        out.append(flat.view(t.shape).copy_(t))
    return out


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype, state_dtype", TRIPLES)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_gpu_equals_cpu_bit_for_bit(backend, dtype, state_dtype, offset):
    if backend == "cuda" and not WITH_CUDA:
        pytest.skip("built without nvcc")
    cpu = lists(dtype, state_dtype)
    gpu = [to_cuda(role, offset) for role in cpu]
    for t in (1, 2, 3):
        steepest.adamw_(*cpu, step=t, **HYPER)
        steepest.adamw_(*gpu, step=t, backend=backend, **HYPER)
    for a, b in zip(cpu, gpu):
        for x, y in zip(a, b):
            assert torch.equal(x, y.cpu())


@pytest.mark.skipif(not WITH_CUDA, reason="built without nvcc")
def test_graph_replay_equals_eager_bitwise():
    cpu = lists(torch.float32, torch.float32)
    eager, captured = ([to_cuda(role, 0) for role in cpu] for _ in range(2))
    steepest.adamw_(*eager, step=1, **HYPER)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        steepest.adamw_(*captured, step=1, **HYPER)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(eager, captured):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.skipif(not WITH_CUDA, reason="built without nvcc")
def test_found_inf_and_grad_scale_are_read_on_the_device():
    cpu = lists(torch.float32, torch.float32)
    scaled, skipped = ([to_cuda(role, 0) for role in cpu] for _ in range(2))
    for g in scaled[1]:
        g.mul_(1024)
    before = [p.clone() for p in skipped[0]]
    steepest.adamw_(*cpu, step=1, **HYPER)
    steepest.adamw_(*scaled, step=1, grad_scale=torch.tensor(1024.0, device="cuda"), **HYPER)
    steepest.adamw_(*skipped, step=1, found_inf=torch.ones(1, device="cuda"), **HYPER)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(cpu[0], scaled[0]))
    assert all(torch.equal(a, b) for a, b in zip(before, skipped[0]))
