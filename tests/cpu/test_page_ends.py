"""Tensors that end where their memory does: whoever reads or writes an element too many does not come back."""

from __future__ import annotations

import ctypes
import math
import mmap

import pytest
import torch

import steepest
from steepest._native import lib, reader

PAGE = mmap.PAGESIZE
SIZES = (1, 15, 17, 511, 513, 8193)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Edge:
    """Memory with a page behind it that nobody may touch."""

    def __init__(self):
        self.kept: list[mmap.mmap] = []

    def put(self, values: torch.Tensor) -> torch.Tensor:
        nbytes = values.numel() * values.element_size()
        pages = -(-nbytes // PAGE)
        memory = mmap.mmap(-1, (pages + 1) * PAGE)
        self.kept.append(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * PAGE
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), 0) == 0, ctypes.get_errno()
        whole = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=pages * PAGE - nbytes)
        return whole.copy_(values)


@pytest.fixture
def edge():
    return Edge()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("n", SIZES)
def test_steps(edge, n, dtype):
    values = [(torch.rand(n) + (k == 3)).to(dtype) for k in range(5)]  # v is more than m squared
    expected, found = [v.clone() for v in values], [edge.put(v) for v in values]
    for lists in (expected, found):
        p, g, m, v, top = ([t] for t in lists)
        steepest.adamw_(p, g, m, v, lr=0.1, step=1)
        steepest.adamw_(p, g, m, v, max_exp_avg_sqs=top, lr=0.1, step=2, clip_value=0.5)
        steepest.sgd_(p, g, lr=0.1, step=1, l1=0.01, cautious=True, decoupled=True, weight_decay=0.1)
        steepest.rmsprop_(p, g, v, grad_avgs=m, momentum_buffers=top, lr=0.1, step=1)
        steepest.lion_(p, g, m, lr=0.1, step=1, gradient_noise=(0.1, 0.5), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


@pytest.mark.parametrize("n", SIZES)
def test_storage_of_other_kinds(edge, n):
    blocks = -(-n // 128)
    p, g = torch.rand(n).to(BF16), torch.rand(n).to(BF16)
    codes, exponents = [torch.randint(0, 100, (n,), dtype=torch.uint8) for _ in range(2)], torch.full((blocks,), 120)
    residual, average = torch.zeros(n, dtype=torch.int8), torch.rand(n)
    lists = [p, g, *codes, *(exponents.to(torch.uint8) for _ in range(2)), residual, average]
    expected, found = [t.clone() for t in lists], [edge.put(t) for t in lists]
    for p, g, m, v, m_exponents, v_exponents, low, ema in (expected, found):
        steepest.adamw_(
            [p], [g], [m], [v], lr=0.1, step=1, state_exponents=[[m_exponents], [v_exponents]], residuals=[low],
            averages=[ema], average_decay=0.9, seed=1,
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


@pytest.mark.parametrize("q", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("n", SIZES)
def test_surveys(edge, n, dtype, q):
    x, w = torch.rand(n).to(dtype), torch.rand(n).to(dtype)
    a, b = edge.put(x), edge.put(w)
    assert lib.survey(reader, [a], q, 1.0, 1) == lib.survey(reader, [x], q, 1.0, 1)
    for inner in (False, True):
        options = (0.5, 0.25, 1.0 if inner else q, 1.0, inner, 1)
        assert lib.survey_weighed(reader, [a], [b], *options) == lib.survey_weighed(reader, [x], [w], *options)


@pytest.mark.parametrize("n", SIZES)
def test_climbs_and_returns(edge, n):
    values = [torch.rand(n) for _ in range(3)]
    expected, found = [v.clone() for v in values], [edge.put(v) for v in values]
    for p, g, backup in (expected, found):
        for order in (2.0, 1.0, 1.5, math.inf):
            steepest.perturb_([p], [g], [backup], p=order, adaptive=True)
            steepest.restore_([p], [backup])
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("q", [1.0, 2.0, 6.0, 1.5])
def test_a_survey_relative_to_a_scale(q, scale):
    x = torch.rand(20 * 8192, dtype=torch.float64).float()
    total, largest, bad = lib.survey(reader, [x], q, scale, 1)
    # Running sums of a block's sixteenth, those of 16 lanes and 20 blocks; a power to q 2^-50 (|log2| + 1), which is
    # below 3 on average; torch sums in pairs and is allowed as much.
    bound = 2 * (8192 / 16 + 16 + 20 + 24 * q) * 2.0**-53
    assert total == pytest.approx((x.double() / scale).pow(q).sum().item(), rel=bound)
    assert largest == x.max().item() and not bad
