"""Shampoo's kernels, interpreted: statistics with their summaries, and preconditioned blocks with their norms."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import steepest
from steepest.conformance.memory import Guarded, differing, poisoned_memory
from steepest.kernels import blocks
from steepest.kernels.statistics import apply_precondition, precondition, update_statistics
from steepest.optim import shampoo_fused

pytestmark = pytest.mark.interpret
U = 2.0**-24
SHAPES = [(2, 40, 72), (3, 33, 7), (1, 1, 5), (2, 8, 8)]


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_memory():
        yield


def statistic(n, batch):
    x = torch.randn(batch, n, n)
    s = x @ x.mT
    return s.tril() + s.tril(-1).mT


@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_of_both_sides_and_what_is_known_of_them(shape):
    """|S - exact| <= gamma_(k + 3) (keep |S| + weight |G||Gᵀ|): k roundings of the sum, 3 of the rest."""
    batch, n, m = shape
    g = Guarded(torch.randn(shape))
    sides = [Guarded(statistic(size, batch)) for size in (n, m)]
    before = [s.view.double() for s in sides]
    keep, weight = torch.full((batch,), 0.9), torch.full((batch,), 0.1)
    keep[0], weight[0] = 1.0, 0.0  # a block that is left alone
    summaries = update_statistics(g.view, sides[0].view, sides[1].view, keep, weight)
    x = g.view.double()
    a, w = keep.double()[:, None, None], weight.double()[:, None, None]
    for s, old, product, size, k, found in zip(
        sides, before, (x @ x.mT, x.mT @ x), (x.abs() @ x.abs().mT, x.abs().mT @ x.abs()), (m, n), summaries
    ):
        exact = a * old + w * product
        assert ((s.view - exact).abs() <= (k + 3) * U * (a * old.abs() + w * size)).all()
        assert torch.equal(s.view, s.view.mT) and differing(s.view[0], old[0].float()) == 0
        # Sums of what was stored: one rounding per addition, all of one sign.
        new, count = s.view.double(), s.view.shape[-1]
        for value, truth, terms in (
            (found.trace, new.diagonal(dim1=1, dim2=2).sum(1), count),
            (found.squares, new.square().sum((1, 2)), count**2 + 1),
            (found.bound, new.abs().sum(2).amax(1), count),
            (found.effective_dimension, steepest.reference.effective_dimension(new), count**2 + 2 * count + 4),
        ):
            assert ((value - truth).abs() <= terms * U * truth.abs()).all()
        assert (found.bound >= torch.linalg.eigvalsh(new)[:, -1] * (1 - count * U)).all()
        assert (found.stable_rank <= count * (1 + 1e-5)).all()
        assert s.overwritten() == 0
    assert g.overwritten() == 0 and differing(g.view, x.float()) == 0


def test_sums_and_determinism_and_neighbours():
    g, ones = torch.randn(3, 20, 12), torch.ones(3)

    def run(g):
        left, right = torch.zeros(3, 20, 20), torch.zeros(3, 12, 12)
        for _ in range(2):
            summaries = update_statistics(g, left, right, ones, ones)
        return left, right, summaries[0].bound

    first, second = run(g), run(g)
    assert all(differing(a, b) == 0 for a, b in zip(first, second))
    assert ((first[0] - 2 * g @ g.mT).abs() <= 40 * U * (g.abs() @ g.abs().mT)).all()
    g[1, 3, 4] = torch.nan
    spoilt = run(g)
    assert all(differing(a[::2], b[::2]) == 0 for a, b in zip(first, spoilt))
    assert spoilt[0][1, 3].isnan().all() and spoilt[2][1].isnan()


@pytest.mark.parametrize("shape", SHAPES)
def test_preconditioned_blocks_and_their_norms(shape):
    """Two products: gamma_m, gamma_n and one rounding between them; the norm from what was not yet rounded."""
    batch, n, m = shape
    g, left, right = torch.randn(shape), statistic(n, batch), statistic(m, batch)
    d, norm = precondition(g, left, right)
    exact = left.double() @ g.double() @ right.double()
    size = left.double().abs() @ (g.double().abs() @ right.double().abs())
    bound = (n + m + 2) * U * size
    assert ((d - exact).abs() <= bound).all()
    assert ((norm - exact.flatten(1).norm(dim=1)).abs() <= bound.flatten(1).norm(dim=1) + (n * m) * U * norm).all()


def test_what_does_not_fit_is_refused():
    g, one = torch.zeros(2, 3, 4), torch.ones(2)
    left, right = torch.zeros(2, 3, 3), torch.zeros(2, 4, 4)
    for call in (
        lambda: update_statistics(g, right, left, one, one),
        lambda: update_statistics(g.double(), left, right, one, one),
        lambda: update_statistics(g, left, right, torch.ones(3), one),
        lambda: update_statistics(g.mT, right, left, one, one),
        lambda: precondition(g, left, right.mT[:, :3]),
        lambda: precondition(g, left, right, input_precision="half"),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


@pytest.mark.parametrize("options", [{}, {"betas": (0.9, 1.0), "grafting": "none"}])
def test_shampoo_over_the_kernels_is_shampoo_over_torch(monkeypatch, options):
    """Roots amplify the rounding of statistics by kappa / p = 250 at ridge 1e-3: three steps of 1e-2 each."""
    start, runs, calls = [torch.randn(12, 20), torch.randn(5, 9)], [], []
    real = shampoo_fused.update_statistics
    monkeypatch.setattr(shampoo_fused, "update_statistics", lambda *a: calls.append(len(runs)) or real(*a))
    for fused in (False, True):
        monkeypatch.setattr(shampoo_fused, "on_device", lambda g, fused=fused: fused)
        params = [p.clone().requires_grad_() for p in start]
        optimizer = steepest.optim.Shampoo(params, lr=1e-2, ridge=1e-3, precondition_frequency=1, **options)
        torch.manual_seed(2)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape)
            optimizer.step()
        runs.append(params)
    assert calls == [1] * 6  # three steps of two shapes, in the second run only
    for p, q, s in zip(*runs, start):
        moved = (p.detach() - s).norm()
        assert (p - q).norm() <= 3 * 250 * 30 * U * moved and moved > 0.01


# --- the step ---------------------------------------------------------------------------------------------------------


def gappy(batch, n, m, dtype):
    """Blocks of a larger parameter each: rows lie apart, and what is between them must stay."""
    whole = [Guarded(torch.randn(n + 2, m + 3).to(dtype)) for _ in range(batch)]
    return whole, [w.view[1 : n + 1, 2 : m + 2] for w in whole]


def numbers_of(batch):
    """keep, step, on, ratio, ready; the second block is skipped, the last one has no root."""
    numbers = torch.tensor([[0.9, -0.1, 1.0, 2.5, 1.0]]).repeat(batch, 1)
    numbers[1:2, 2] = 0.0
    numbers[-1, 4] = 0.0
    return numbers


def moves(before, value, numbers, dtype):
    """Exact, and the bound: three roundings in float32 and one to dtype."""
    keep, step, on = (x.double()[:, None, None] for x in numbers[:, :3].unbind(1))
    w = torch.stack([b.double() for b in before])
    exact = torch.where(on != 0, w * keep + step * value, w * keep)
    size = (w * keep).abs() + torch.where(on != 0, (step * value).abs(), 0.0)
    return exact, 3 * U * size + torch.finfo(dtype).eps / 2 * exact.abs() * (dtype != torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 33, 7), (3, 8, 64)])
def test_a_product_that_writes_the_parameter(shape, dtype):
    batch, n, m = shape
    g, left, right = torch.randn(shape), statistic(n, batch) / n, statistic(m, batch) / m
    g[1, 0, 0] = torch.nan  # a block that is off is decayed, whatever its step holds
    whole, views = gappy(batch, n, m, dtype)
    before, kept = [v.clone() for v in views], [w.view.clone() for w in whole]
    numbers = numbers_of(batch)
    norm = apply_precondition(g, left, right, blocks.Targets(views), numbers)
    clean = g.double().nan_to_num(0.0)
    value = left.double() @ clean @ right.double()
    size = left.double().abs() @ (clean.abs() @ right.double().abs())
    exact, bound = moves(before, value, numbers, dtype)
    bound += 0.1 * (n + m + 2) * U * size * numbers[:, 2].double()[:, None, None] * 1.01
    assert ((torch.stack(views).double() - exact).abs() <= bound).all()
    assert ((norm - value.flatten(1).norm(dim=1))[[0, 2]].abs() <= 1e-5 * norm[[0, 2]]).all()
    for w, old, view in zip(whole, kept, views):
        old[1 : n + 1, 2 : m + 2] = view
        assert differing(w.view, old) == 0 and w.overwritten() == 0


@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 33, 41), (3, 8, 64)])
def test_a_pass_that_scales_takes_up_momentum_and_writes(shape, dtype, momentum, nesterov):
    batch, n, m = shape
    d, graft, buffer = (torch.randn(shape) for _ in range(3))
    d[1, 0, 0] = graft[1, 0, 0] = torch.nan
    d[2] = torch.nan  # it has no root: the graft counts
    whole, views = gappy(batch, n, m, dtype) if n == 33 else ((), [torch.randn(n, m).to(dtype) for _ in range(batch)])
    before, kept, old = [v.clone() for v in views], [w.view.clone() for w in whole], buffer.double()
    numbers = numbers_of(batch)
    targets = blocks.Targets(views)
    assert targets.unit == (1 if n == 33 else 16 // dtype.itemsize)
    blocks.move(d, graft, targets, numbers, buffer=buffer, momentum=momentum, nesterov=nesterov)
    value = torch.where(numbers[:, 4].double()[:, None, None] != 0, 2.5 * d.double(), graft.double()).nan_to_num(0.0)
    size = value.abs()
    if momentum:
        new, size = momentum * old + value, momentum * old.abs() + size
        assert ((buffer - new).abs()[[0, 2]] <= 3 * U * size[[0, 2]]).all() and differing(
            buffer[1], old[1].float()
        ) == 0
        value, size = (value + momentum * new, 2 * size) if nesterov else (new, size)
    exact, bound = moves(before, value, numbers, dtype)
    assert ((torch.stack(views).double() - exact).abs() <= bound + 6 * U * 0.1 * size * 1.01).all()
    for w, rest, view in zip(whole, kept, views):
        rest[1 : n + 1, 2 : m + 2] = view
        assert differing(w.view, rest) == 0 and w.overwritten() == 0


def test_targets_that_do_not_fit_are_refused():
    d, numbers, views = torch.zeros(2, 3, 4), torch.ones(2, 5), [torch.zeros(3, 4), torch.zeros(3, 4)]
    for call in (
        lambda: blocks.Targets([views[0], views[1].double()]),
        lambda: blocks.Targets([torch.zeros(4, 3).mT]),
        lambda: blocks.move(d[:1], d[:1], blocks.Targets(views), numbers),
        lambda: blocks.move(d, d.mT, blocks.Targets(views), numbers),
        lambda: blocks.move(d, d, blocks.Targets(views), numbers[:, :4]),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()
    with pytest.raises(ValueError, match="there is no buffer"):
        blocks.move(d, d, blocks.Targets(views), numbers, momentum=0.9)


@pytest.mark.parametrize(
    "options",
    [
        {"grafting": "none"},
        {"grafting": "none", "weight_decay": 0.1, "betas": (0.9, 1.0), "packed_statistics": True},
        {"grafting": "adam", "weight_decay": 0.1, "precondition_frequency": 2},
        {"grafting": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"grafting": "none", "momentum": 0.9, "statistic": "kl"},
    ],
)
def test_a_step_that_kernels_write_is_that_of_torch(monkeypatch, options):
    """Blocks and edges, a parameter without a gradient, one whose gradient is not finite, and a vector under AdamW."""
    start = [torch.randn(20, 28), torch.randn(9, 5), torch.randn(9, 5), torch.randn(7)]
    runs, calls, real = [], [], shampoo_fused.step
    monkeypatch.setattr(shampoo_fused, "step", lambda *a: calls.append(len(runs)) or real(*a))
    for fused in (False, True):
        monkeypatch.setattr(shampoo_fused, "on_device", lambda g, fused=fused: fused)
        params = [p.clone().requires_grad_() for p in start]
        options = {"ridge": 1e-3, "precondition_frequency": 1, "block_size": 16, **options}
        optimizer = steepest.optim.Shampoo(params, lr=1e-2, **options)
        torch.manual_seed(2)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape)
                if i == 1 and step == 1:
                    p.grad[2, 2] = torch.inf
                if i == 2 and step == 0:
                    p.grad = None
            optimizer.step()
        runs.append(params)
    assert set(calls) == {1} and len(calls) >= 3 * 2
    for p, q, s in zip(*runs, start):
        moved = (p.detach() - s).norm()
        assert (p - q).norm() <= 3 * 250 * 30 * U * moved and moved > 1e-3
