"""Muon's fused passes, interpreted: momentum and norms, products that write the parameter, whole steps."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import steepest
from steepest.conformance.memory import Guarded, differing, poisoned_memory
from steepest.kernels import long
from steepest.kernels.momentum import TILE, Momentum
from steepest.matrix.fused_muon import FusedMuon
from steepest.matrix.polar import plan
from steepest.optim import muon_fused

pytestmark = pytest.mark.interpret
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
UNIT = {F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}
TINY = {F32: 2.0**-150, F16: 2.0**-25, BF16: 2.0**-134}


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_memory():
        yield


# --- momentum ---------------------------------------------------------------------------------------------------------

SIZES = (1, 7, TILE, TILE + 9)


def lerp(start, end, weight, rest):
    """torch's formula without its fused multiply-add: float32, every operation rounded."""
    weight, rest = torch.tensor(weight), torch.tensor(rest)
    return start + weight * (end - start) if weight < 0.5 else end - (end - start) * rest


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (F32, F32, F16), (BF16, BF16, F16), (BF16, F32, F16)], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_momentum_is_torchs_formula_bit_for_bit_up_to_the_power_of_two(dtypes, nesterov, offset):
    roles = [[Guarded(torch.randn(n).to(d), offset=offset) for n in SIZES] for d in dtypes]
    grads, buffers, outs = ([g.view for g in role] for role in roles)
    kept = [g.clone() for g in grads]
    expected = [lerp(b.float(), g.float(), 1 - 0.9, 0.9) for g, b in zip(grads, buffers)]
    expected = [e.to(dtypes[1]) for e in expected]
    laid = Momentum(grads, buffers, outs, torch.ones(len(SIZES)), 2**-10)
    laid.launch(0.9, nesterov)
    for g, b, e, u, scale in zip(grads, buffers, expected, outs, laid.scale.tolist()):
        assert differing(b, e) == 0
        update = lerp(g.float(), e.float(), 0.9, 1 - 0.9) if nesterov else e.float()
        power = 2.0 ** (11 - update.abs().max().frexp().exponent.item())
        # Whether this step's cast had to be done again (all started from 1) or 1 was near enough.
        used = power if not 8 <= update.abs().max() < 32768 else 1.0
        assert differing(u, (update * used).to(dtypes[2])) == 0
        norm = u.double().norm().item()
        assert scale == pytest.approx(1 / ((1 + 2**-10) * norm), rel=len(SIZES) * 2**-20)
    assert all(differing(g, k) == 0 for g, k in zip(grads, kept))
    assert sum(x.overwritten() for role in roles for x in role) == 0


def test_no_history_spoils_a_step():
    """Gradients whose size changes by 1e30 from step to step, zeros, and a NaN that stays in its own matrix."""
    sizes = [(1e-15, 1.0, 1.0), (1e15, 0.0, 1.0), (1e-15, 1e9, 1.0), (1.0, 0.0, 1.0)]
    prescale = torch.ones(3)
    for step, factors in enumerate(sizes):
        grads = [f * torch.randn(40, 9) for f in factors]
        if step == 2:
            grads[2][3, 4] = torch.nan
        buffers, outs = [torch.zeros(40, 9) for _ in grads], [torch.zeros(40, 9).half() for _ in grads]
        laid = Momentum(grads, buffers, outs, prescale, 2**-10)
        laid.launch(0.5, False)
        for i, (g, u, s) in enumerate(zip(grads, outs, laid.scale.tolist())):
            if step == 2 and i == 2:
                assert u[3, 4].isnan() and u.isnan().sum() == 1
            elif not g.any():
                assert not u.any() and s == 1
            else:
                exact = g.double() / g.double().norm() / (1 + 2**-10)
                assert (u.double() * s - exact).norm() <= 2**-11 * exact.norm()


# --- products ---------------------------------------------------------------------------------------------------------


def symmetric(n, batch, dtype):
    q = torch.randn(batch, n, n, dtype=torch.float64) / n
    return (q + q.mT).to(dtype)


def exact_product(q, x, alpha, shift, scale):
    q, x = q.double(), x.double()
    product = x @ q if x.shape[1] > x.shape[2] else q @ x
    size = (x.abs() @ q.abs()) if x.shape[1] > x.shape[2] else q.abs() @ x.abs()
    scale = scale.double()[:, None, None]
    return scale * (alpha * product + shift * x), scale * (abs(alpha) * size + abs(shift) * x.abs())


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("shape", [(2, 40, 72), (2, 72, 40), (1, 7, 33), (3, 17, 5), (1, 9, 9)])
def test_long_products_are_within_their_bound(shape, dtype):
    """k roundings of the sum and 5 of the rest, float32, and one of the result."""
    x, k = torch.randn(shape).to(dtype), min(shape[1:])
    q, scale = symmetric(k, shape[0], dtype), torch.rand(shape[0]) + 0.5
    found = long.long_product(q, x, alpha=-0.7, shift=1.5, scale=scale)
    exact, size = exact_product(q, x, -0.7, 1.5, scale)
    bound = (k + 5) * 2.0**-24 * size + UNIT[dtype] * exact.abs() * (1 + 2**-10) + TINY[dtype]
    assert ((found.double() - exact).abs() <= bound).all()
    plain, size = exact_product(q, x, 1.0, 0.0, torch.ones(shape[0]))
    bound = (k + 5) * 2.0**-24 * size + UNIT[dtype] * plain.abs() * (1 + 2**-10) + TINY[dtype]
    assert ((long.long_product(q, x).double() - plain).abs() <= bound).all()


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("param", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(2, 40, 72), (2, 33, 7)])
def test_applied_products_write_the_parameters_and_nothing_else(shape, param, cautious):
    x, k = torch.randn(shape).half(), min(shape[1:])
    q, scale = symmetric(k, shape[0], F16), torch.ones(shape[0])
    guarded = [Guarded(torch.randn(shape[1:]).to(param), offset=i) for i in range(shape[0])]
    params = [g.view for g in guarded]
    before = torch.stack([p.double() for p in params])
    table, hyper = torch.tensor([p.data_ptr() for p in params]), torch.tensor([0.9, -0.5])
    long.apply_long_product(q, x, params, table, hyper, scale=scale, cautious=cautious)
    exact, size = exact_product(q, x, 1.0, 0.0, scale)
    margin = (k + 5) * 2.0**-24 * size  # an update within rounding of zero may fall on either side
    keep = 0.9 if not cautious else torch.where(exact * before > 0, 0.9, 1.0)
    expected = before * keep - 0.5 * exact
    bound = 0.5 * margin + 3 * 2.0**-24 * (before.abs() + exact.abs())
    bound += (UNIT[param] if param != F32 else 0) * expected.abs() * 1.01
    near = (exact.abs() <= margin) & bool(cautious)
    after = torch.stack([p.double() for p in params])
    assert (((after - expected).abs() <= bound) | near).all() and near.sum() < 3
    assert sum(g.overwritten() for g in guarded) == 0


def test_stochastic_rounding_takes_a_neighbour_and_is_unbiased():
    n = 64
    params, x = [torch.ones(n, n).to(BF16)], torch.ones(1, n, n).half()
    q = torch.eye(n).half()[None]
    table, hyper = torch.tensor([params[0].data_ptr()]), torch.tensor([1.0, 2.0**-9])  # a quarter of the way up
    long.apply_long_product(q, x, params, table, hyper, seed=3)
    up = 1 + 2.0**-7
    assert set(params[0].float().unique().tolist()) == {1.0, up}
    share = (params[0].float() == up).double().mean().item()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / n**2) ** 0.5
    again = [torch.ones(n, n).to(BF16)]
    long.apply_long_product(q, x, again, torch.tensor([again[0].data_ptr()]), hyper, seed=3)
    assert differing(again[0], params[0]) == 0


def test_what_does_not_fit_is_refused():
    x, q = torch.zeros(2, 4, 6), torch.zeros(2, 4, 4)
    for call in (
        lambda: long.long_product(q[:1], x),
        lambda: long.long_product(q, x.mT),
        lambda: long.long_product(q.half(), x),
        lambda: long.apply_long_product(q, x, [x[0]], torch.zeros(1).long(), torch.zeros(2)),
        lambda: long.apply_long_product(q, x, [x[0], x[1].mT], torch.zeros(2).long(), torch.zeros(2)),
        lambda: Momentum([x[0]], [x[0].mT], [x[0]], torch.ones(1), 0.0),
    ):
        with pytest.raises(ValueError, match=r"expected|got"):
            call()


# --- whole steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shapes, options",
    [
        ([(20, 33), (33, 20)], {}),
        ([(12, 5, 2)], {"matrices": "flatten", "cautious": True, "nesterov": False}),
        ([(24, 10)], {"matrices": (8, (16, 2)), "momentum_dtype": BF16, "scale": "spectral"}),
    ],
)
def test_a_fused_optimizer_step_is_the_plain_one_within_the_bound_of_half_precision(monkeypatch, shapes, options):
    """Polar factors in float16 came within 3e-2 of float32's (polar_rounding bounds them by 3); two steps of lr."""
    start = [torch.randn(s) for s in shapes]
    runs = []
    for fused in (False, True):
        monkeypatch.setattr(muon_fused, "on_device", lambda p, fused=fused: fused)
        params = [p.clone().requires_grad_() for p in start]
        optimizer = steepest.optim.Muon(params, lr=0.1, momentum=0.9, schedule="polar-express-safe", **options)
        torch.manual_seed(1)
        for step in range(2):
            for p in params:
                p.grad = 10.0 ** (6 * step - 3) * torch.randn(p.shape)
            kept = [p.grad.clone() for p in params]
            optimizer.step()
            assert all(torch.equal(p.grad, k) for p, k in zip(params, kept))
        assert bool(optimizer._fused.kept) == fused
        runs.append((params, optimizer))
    (plain, a), (fused, b) = runs
    for p, q, s in zip(plain, fused, start):
        moved = (p.detach() - s).norm()
        assert (p - q).norm() <= 0.03 * moved
        first, second = (o.state[x]["momentum_buffer"] for o, x in ((a, p), (b, q)))
        assert first.dtype == second.dtype
        # torch's lerp has one rounding less: two units of what went in, and perhaps the next number of the format.
        assert (first.float() - second.float()).abs().max() <= 4 * UNIT[first.dtype] * first.abs().max()


def test_a_prepared_step_fits_the_tensors_that_it_was_made_for():
    roles = [[torch.randn(4, 6) for _ in range(2)] for _ in range(3)]
    step = FusedMuon(*roles, plan((4, 6), F16, "cuda"))
    assert step.fits(*roles) and step.fits(*([t.view(4, 6) for t in role] for role in roles))
    assert not step.fits(*([role[0]] for role in roles))
    for role in range(3):
        others = [list(tensors) for tensors in roles]
        others[role][1] = others[role][1].clone()
        assert not step.fits(*others)
