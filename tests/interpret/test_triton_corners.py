"""Corners of the kernels and of what they are launched with, where a mutant went unnoticed; interpreted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from steepest.conformance.memory import differing, poisoned_memory
from steepest.kernels import blocks, chain, grouped, long
from steepest.kernels.momentum import Momentum

pytestmark = pytest.mark.interpret
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_memory():
        yield


# --- momentum ---------------------------------------------------------------------------------------------------------


def below(x: float) -> float:
    return float(np.nextafter(np.float32(x), np.float32(0)))


# The largest element, the power of two of the step before, whether that brings it into [8, 32768).
LARGEST = (
    (8.0, 1.0, True), (below(8.0), 1.0, False), (below(32768.0), 1.0, True), (32768.0, 1.0, False), (4.0, 2.0, True),
    (below(4.0), 2.0, False), (40000.0, 0.5, True), (0.0, 4.0, True), (2.0**-125, 1.0, False), (2.0**115, 1.0, False),
)  # fmt: skip


def test_powers_of_two_at_their_borders():
    """Without momentum the result is the gradient times the power of two: this step's, or a better one at once."""
    values = [torch.tensor([size / 4, -size, size / 2]) for size, _, _ in LARGEST]
    outs, prescale = [torch.empty(3) for _ in values], torch.tensor([power for _, power, _ in LARGEST])
    buffers = [torch.ones(3) for _ in values]  # a Momentum knows addresses alone
    laid = Momentum(values, buffers, outs, prescale, 0.0)
    laid.launch(0.0, False)
    assert laid.again.tolist() == [int(not fits) for _, _, fits in LARGEST]
    for value, out, power, next_power, (size, _, fits) in zip(
        values, outs, [p for _, p, _ in LARGEST], prescale.tolist(), LARGEST
    ):
        better = power
        if size > 0:
            better = 2.0 ** min(max(11 - math.frexp(size)[1], -100), 100)
        assert next_power == better
        assert torch.equal(out, value * (power if fits else better))


def test_an_infinite_gradient_leaves_the_power_of_two_alone():
    g, b, u, prescale = torch.tensor([1.0, math.inf]), torch.ones(2), torch.empty(2), torch.tensor([2.0])
    laid = Momentum([g], [b], [u], prescale, 0.0)
    laid.launch(0.9, False)
    assert laid.again.tolist() == [1] and prescale.tolist() == [2.0] and u.tolist() == [2.0, math.inf]


@pytest.mark.parametrize("nesterov", [True, False])
def test_half_a_momentum_takes_the_form_that_torch_takes(nesterov):
    """start + w (end - start) for w < 1/2, the other one from there on: their roundings differ."""
    generator = torch.Generator().manual_seed(0)
    g, b = (torch.randn(500, generator=generator) * 10 ** torch.linspace(-6, 6, 500).roll(k) for k in (0, 99))
    out, kept = torch.empty(500), b - (b - b)
    half, rest = torch.tensor(0.5), torch.tensor(0.5)
    buffer = g - (g - b) * rest
    assert not torch.equal(buffer, b + half * (g - b))
    Momentum([g], [kept], [out], torch.full((1,), 2.0**-6), 0.0).launch(0.5, nesterov)
    assert torch.equal(kept, buffer)


@pytest.mark.parametrize("role", [0, 1, 2])
def test_one_misaligned_list_forbids_vector_accesses(role):
    memory = [torch.zeros(9), torch.zeros(9), torch.zeros(9)]
    assert all(x.data_ptr() % 16 == 0 for x in memory)
    assert Momentum(*([x[:8]] for x in memory), torch.ones(1), 0.0).options["ALIGNED"]
    lists = [[x[1:] if k == role else x[:8]] for k, x in enumerate(memory)]
    assert not Momentum(*lists, torch.ones(1), 0.0).options["ALIGNED"]


# --- long products ----------------------------------------------------------------------------------------------------


def unit_of_long(q, x, aligned=True):
    return long.launch_arguments(q, x, x, None, (1.0, 0.0), None, None, aligned, "ieee")[2]["UNIT"]


def shifted(x):
    return torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)


def test_long_products_in_vectors_only_where_everything_is_a_multiple_of_them():
    q, x = torch.ones(2, 8, 8), torch.ones(2, 8, 16)
    assert unit_of_long(q, x) == 4
    assert unit_of_long(q, x, aligned=False) == 1
    assert unit_of_long(shifted(q), x) == 1
    assert unit_of_long(q, shifted(x)) == 1
    assert unit_of_long(q, torch.ones(2, 8, 18)) == 1
    assert unit_of_long(torch.ones(2, 10, 10), torch.ones(2, 10, 16)) == 1
    assert unit_of_long(torch.ones(2, 8, 9)[:, :, :8], x) == 1


def test_a_shift_of_one():
    generator = torch.Generator().manual_seed(0)
    x, q = torch.randn(2, 8, 24, generator=generator), torch.randn(2, 8, 8, generator=generator)
    q = q + q.mT
    found = long.long_product(q, x, shift=1.0)
    exact = x.double() + q.double() @ x.double()
    size = x.double().abs() + q.double().abs() @ x.double().abs()
    assert ((found.double() - exact).abs() <= 12 * 2.0**-24 * size).all()  # eight products, their sums, the shift


def apply(x, p, *, cautious=False, seed=None, keep=0.5, step=-1.0):
    table = torch.tensor([t.data_ptr() for t in p], dtype=torch.int64)
    long.apply_long_product(
        torch.eye(x.shape[1]).expand(len(x), -1, -1).contiguous(), x, list(p), table, torch.tensor([keep, step]),
        cautious=cautious, seed=seed,
    )  # fmt: skip


def test_cautious_decay_leaves_alone_what_does_not_move():
    """Towards zero alone decays: not away from it, and not where the step is zero."""
    x = torch.tensor([[[1.0, -1.0, 0.0, 1.0, -1.0, 0.0, 2.0, 0.0]] * 8])
    p = torch.tensor([[4.0, 4.0, 4.0, -4.0, -4.0, -4.0, 0.0, 0.0]] * 8)
    apply(x, [p], cautious=True)
    assert p[0].tolist() == [2.0 - 1.0, 5.0, 4.0, -5.0, -2.0 + 1.0, -4.0, -2.0, 0.0]


def apply_arguments(x, params):
    """UNIT of the launch that apply_long_product makes."""
    found = {}

    class Launch:
        def __getitem__(self, grid):
            return lambda *arguments, **options: found.update(options)

    kept, long.long_kernel = long.long_kernel, Launch()
    try:
        apply(x, params)
    finally:
        long.long_kernel = kept
    return found["UNIT"]


def test_parameters_are_written_in_vectors_only_where_their_rows_are_multiples_of_them():
    x = torch.ones(1, 8, 16)
    assert apply_arguments(x, [torch.ones(8, 16)]) == 4
    assert apply_arguments(x, [shifted(torch.ones(8, 16))]) == 1
    assert apply_arguments(x, [torch.ones(8, 16, dtype=BF16)]) == 4
    narrow = torch.ones(1, 8, 12)  # three vectors of float32, one and a half of bfloat16
    assert apply_arguments(narrow, [torch.ones(8, 12)]) == 4
    assert apply_arguments(narrow, [torch.ones(8, 12, dtype=BF16)]) == 1


@triton.jit
def round_at_random(x_ptr, random_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, long.stochastic_bfloat16(tl.load(x_ptr + i), tl.load(random_ptr + i)))


def test_what_is_not_finite_is_not_rounded_at_random():
    """Whatever a NaN carries in the bits that would be cut, or carries into."""
    bits = np.array([0x7F800001, 0x7FFFFFFF, 0xFF80FFFF, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x3F800000, 0x3F80FFFF])
    x = torch.from_numpy(bits.astype(np.uint32).view(np.float32).copy())
    for random in (0, 1, 0xFFFF):
        y = torch.empty(8)
        round_at_random[(1,)](x, torch.full((8,), random, dtype=torch.int32), y, N=8)
        assert y[:4].isnan().all() and y[4:6].tolist() == [math.inf, -math.inf] and y[6] == 1.0
        assert y[7] == (1.0 if random == 0 else 1.0 + 2.0**-7)


# --- chains -----------------------------------------------------------------------------------------------------------


def test_a_chains_input_may_be_any_operand_and_scratch_is_as_large_as_stated():
    """scratch = x; y = 2 scratch + 3 x: linear steps, whose operands A and B are not read."""
    x, y = torch.arange(2 * 8 * 16, dtype=F32).view(2, 8, 16), torch.empty(2, 8, 16)
    steps = np.full((2, chain.STEP_COLUMNS.value), -1)
    for name, values in {"KIND": (0, 0), "ROWS": (8, 8), "COLS": (16, 16), "K": (0, 0), "MIRROR": (0, 0), "A": (0, 0),
                         "B": (0, 0), "C": (0, 2), "E": (-1, 0), "D": (2, 1)}.items():  # fmt: skip
        steps[:, getattr(chain, name).value] = values
    numbers = np.array([[0.0, 1.0, 0.0, 0.0], [0.0, 2.0, 3.0, 0.0]])
    shapes = ((8, 16), (8, 16), (8, 16))
    tables, elements = chain.device_tables(steps, numbers, shapes, 2, F32, x.device)
    assert elements == 2 * 8 * 16
    chain.run_chain(tables, x, y, torch.empty(elements))
    assert torch.equal(y, 5 * x)


# --- groups and blocks ------------------------------------------------------------------------------------------------


def test_products_of_a_group_add_c_once_unless_told_otherwise():
    generator = torch.Generator().manual_seed(0)
    a, c = (torch.randn(9, 9, generator=generator) for _ in range(2))
    a, c = a + a.mT, c + c.mT
    group = grouped.group_of_products([a], [a], c=[c])
    group.launch()
    exact, size = a.double() @ a.double() + c.double(), a.double().abs() @ a.double().abs() + c.double().abs()
    assert ((group.outs[0].double() - exact).abs() <= 12 * 2.0**-24 * size).all()


def fits(a, b=None, c=None, out=None):
    outs = None if out is None else [out]
    group = grouped.group_of_products([a], [a if b is None else b], c=[c], outs=outs)
    return group._fits(0)


def test_groups_in_vectors_only_where_everything_is_a_multiple_of_them():
    a = torch.eye(8)
    assert fits(a)
    assert not fits(shifted(a)) and not fits(a, b=shifted(a)) and not fits(a, c=shifted(a))
    assert not fits(a, out=shifted(a))
    assert not fits(torch.eye(6)) and not fits(torch.zeros(8, 9)[:, :8])


def test_blocks_are_moved_in_vectors_only_where_everything_is_a_multiple_of_them():
    weights, stack = torch.zeros(2, 8, 8), torch.zeros(2, 8, 8)
    targets = blocks.Targets(list(weights))
    assert targets.unit == 4 and targets.fits(list(weights)) and not targets.fits(list(torch.zeros(2, 8, 8)))

    def launched(*roles):
        _, arguments, options = blocks.move_arguments(*roles, targets, torch.zeros(2, 5), 0.9, False)
        return options["UNIT"], arguments[3].tolist(), arguments[7]

    addresses = [w.data_ptr() for w in weights]
    assert launched(stack, stack, stack) == (4, [[a, 2] for a in addresses], 2)
    for k in range(3):
        roles = [shifted(stack) if k == i else stack for i in range(3)]
        assert launched(*roles) == (1, [[a, 8] for a in addresses], 8)
    assert differing(weights, torch.zeros(2, 8, 8)) == 0
