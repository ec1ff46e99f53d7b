"""SAM as an optimizer: weights come back bit for bit, whatever happens between the passes; what it moves is counted."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch

import steepest
from steepest import optim, sam_ops
from steepest.traffic import counted_traffic

SHAPES = [(16, 9), (), (0, 3), (33,), (4, 3, 2, 2), (257,)]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

# How weights are kept, and around which optimizer: name -> (dtype, constructor with learning rate 0).
MODES = {
    "adamw": (F32, lambda p: optim.AdamW(p, lr=0.0)),
    "sgd": (F32, lambda p: optim.SGD(p, lr=0.0, momentum=0.9)),
    "lion": (F32, lambda p: optim.Lion(p, lr=0.0)),
    "muon": (F32, lambda p: optim.Muon(p, lr=0.0, adamw={"lr": 0.0})),
    "torch adamw": (F32, lambda p: torch.optim.AdamW(p, lr=0.0)),
    "bf16 master": (BF16, lambda p: optim.AdamW(p, lr=0.0, master_weights=True)),
    "fp16 master": (F16, lambda p: optim.SGD(p, lr=0.0, momentum=0.9, master_weights=True)),
    "bf16 and 16 bits": (BF16, lambda p: optim.AdamW(p, lr=0.0, correction_bits=16)),
    "bf16 and 8 bits": (BF16, lambda p: optim.AdamW(p, lr=0.0, correction_bits=8)),
    "bf16": (BF16, lambda p: optim.AdamW(p, lr=0.0)),
    "bf16 stochastic": (BF16, lambda p: optim.AdamW(p, lr=0.0, stochastic_rounding=True)),
    "bf16 average": (BF16, lambda p: optim.AdamW(p, lr=0.0, ema_decay=0.9)),
    "fp16": (F16, lambda p: optim.AdamW(p, lr=0.0)),
    "torch sgd bf16": (BF16, lambda p: torch.optim.SGD(p, lr=0.0)),
}


class Passes:
    """Parameters whose gradients the test hands out pass by pass."""

    def __init__(self, dtype=F32, scale=1.0):
        self.generator = torch.Generator().manual_seed(0)
        self.params = [torch.nn.Parameter((0.1 + self.draw(shape).abs()).to(dtype)) for shape in SHAPES]
        self.scale, self.seen = scale, []

    def draw(self, shape):
        return torch.randn(shape, generator=self.generator)

    def closure(self, *present, value=None, error=None):
        """A closure that gives gradients to the parameters named for the pass at hand: present[0], then present[1]."""
        turn = iter(present)

        def run():
            for p in self.params:
                p.grad = None
            self.seen.append([p.detach().clone() for p in self.params])
            for i in next(turn):
                p = self.params[i]
                p.grad = (self.scale * self.draw(p.shape)).to(p.dtype)
                if value is not None and i == value[1] and len(self.seen) % 2 == value[0]:
                    p.grad.view(-1)[3] = value[2]
            if error is not None and len(self.seen) % 2 == 0:
                raise error
            return torch.zeros(())

        return run


def bits(tensors):
    return [t.detach().clone().view(torch.uint8) if t.dim() else t.detach().clone() for t in tensors]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


def stored(optimizer):
    """What holds weights besides the parameters."""
    return [v.clone() for e in optimizer.state.values() for k, v in e.items() if k in ("master", "residual", "ema")]


EVERY = (0, 1, 2, 3, 4, 5)
PRESENT = [
    ((EVERY, EVERY), "both"),
    (((0, 1, 3), (0, 4, 5)), "some in one pass only"),
    (((0, 3), ()), "none in the second"),
    (((), (0, 3)), "none in the first"),
    (((2,), (2,)), "an empty one alone"),
    (((), ()), "none"),
]


@pytest.mark.parametrize("p", [2.0, math.inf, 1.0, 3.0])
@pytest.mark.parametrize("mode", MODES)
def test_weights_come_back_bit_for_bit_whichever_pass_has_their_gradient(mode, p):
    dtype, base = MODES[mode]
    passes = Passes(dtype)
    optimizer = optim.SAM(base(passes.params), rho=2.0, p=p, adaptive=p == 2)
    start, kept = bits(passes.params), None
    for present, name in PRESENT * 2:
        optimizer.step(passes.closure(*present))
        assert same(start, bits(passes.params)), name
        # The second pass has seen other weights, wherever there was a gradient in the first.
        moved = [i for i in EVERY if not torch.equal(*(seen[i] for seen in passes.seen[-2:]))]
        if p != 1.0:
            assert moved == [i for i in present[0] if passes.params[i].numel()], name
        kept = kept or stored(optimizer)
        assert same(kept, stored(optimizer))
        kept = stored(optimizer)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("bad", [1, 0], ids=["first pass", "second pass"])
def test_weights_come_back_after_inf_and_nan(mode, value, bad):
    dtype, base = MODES[mode]
    passes = Passes(dtype)
    optimizer = optim.SAM(base(passes.params), rho=0.5, skip_nonfinite=True)
    optimizer.step(passes.closure(EVERY, EVERY))
    start = bits(passes.params)
    counts = [float(s["step"]) for s in optimizer.state.values() if "step" in s]
    optimizer.step(passes.closure(EVERY, EVERY, value=(bad, 5, value)))
    assert same(start, bits(passes.params))
    assert counts == [float(s["step"]) for s in optimizer.state.values() if "step" in s]  # skipped, not taken
    optimizer.step(passes.closure(EVERY, EVERY))
    assert same(start, bits(passes.params))


@pytest.mark.parametrize("mode", MODES)
def test_an_exception_in_the_second_pass_restores(mode):
    dtype, base = MODES[mode]
    passes = Passes(dtype)
    optimizer = optim.SAM(base(passes.params), rho=0.5)
    start = bits(passes.params)
    for error in (RuntimeError("out of memory"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            optimizer.step(passes.closure(EVERY, EVERY, error=error))
        assert same(start, bits(passes.params)) and not optimizer.perturbed
    assert not torch.equal(passes.seen[0][0], passes.seen[1][0])
    optimizer.step(passes.closure(EVERY, EVERY))
    assert same(start, bits(passes.params))


def test_an_exception_in_the_base_step_restores():
    passes = Passes()
    optimizer = optim.SAM(optim.AdamW(passes.params, lr=0.1), rho=0.5)
    optimizer.step(passes.closure(EVERY, EVERY))
    start = bits(passes.params)
    closure = passes.closure(EVERY, EVERY)

    def sparse_at_last():
        closure()
        if len(passes.seen) % 2 == 0:
            passes.params[0].grad = passes.params[0].grad.to_sparse()

    with pytest.raises(ValueError, match="sparse"):
        optimizer.step(sparse_at_last)
    assert same(start, bits(passes.params))


def test_between_the_passes_only_what_makes_sense_is_allowed():
    passes = Passes()
    optimizer = optim.SAM(optim.SGD(passes.params, lr=0.1))
    with pytest.raises(RuntimeError, match="not perturbed"):
        optimizer.step()
    passes.closure(EVERY)()
    optimizer.first_step()
    for forbidden in (
        optimizer.first_step,
        lambda: optimizer.step(passes.closure(EVERY)),
        lambda: optimizer.load_state_dict({}),
        lambda: pickle.dumps(optimizer),
        lambda: optimizer.add_param_group({"params": [torch.zeros(1)]}),
    ):
        with pytest.raises(RuntimeError, match="perturbed"):
            forbidden()
    with pytest.raises(RuntimeError, match="perturbed"), optimizer.ascent():
        pass
    optimizer.restore()
    assert same(passes.seen[0], passes.params)


def test_a_checkpoint_between_the_passes_has_no_copy_of_a_weight():
    passes = Passes()
    optimizer = optim.SAM(optim.AdamW(passes.params, lr=0.1))
    optimizer.step(passes.closure(EVERY, EVERY))
    shapes = [sorted(map(str, s)) for s in optimizer.state_dict()["state"].values()]
    passes.closure(EVERY)()
    home = [p.detach().clone() for p in passes.params]
    optimizer.first_step()
    packed = optimizer.state_dict()
    assert shapes == [sorted(map(str, s)) for s in packed["state"].values()]
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    found = []

    def walk(x):
        found.append(x) if isinstance(x, torch.Tensor) else [
            walk(y) for y in (x.values() if isinstance(x, dict) else x)
        ]

    walk({k: v for k, v in packed.items() if k != "param_groups"} | {"two_pass": {}})
    for tensor in found:
        for w in (*home, *passes.params):
            assert tensor.shape != w.shape or not w.numel() or w.dim() == 0 or not torch.equal(tensor, w)
    optimizer.second_step()


def test_checkpoints_pass_between_sam_and_its_base_optimizer():
    passes, others = Passes(), Passes()
    optimizer = optim.SAM(optim.AdamW(passes.params, lr=0.1), rho=0.3)
    optimizer.step(passes.closure(EVERY, EVERY))
    plain = torch.optim.AdamW(others.params, lr=0.5)
    plain.load_state_dict(optimizer.state_dict())
    assert plain.param_groups[0]["lr"] == 0.1
    assert torch.equal(plain.state[others.params[0]]["exp_avg"], optimizer.state[passes.params[0]]["exp_avg"])
    again = optim.SAM(optim.AdamW(Passes().params, lr=0.5), rho=0.3)
    again.load_state_dict(plain.state_dict())
    again.load_state_dict(optimizer.state_dict())
    assert again.passes == optimizer.passes == 1 and again.param_groups[0]["lr"] == 0.1
    assert again.param_groups is again.base_optimizer.param_groups
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.param_groups[0]["rho"] == 0.3 and twin.p == optimizer.p and not twin.perturbed


def trained(form: str, steps=4, scaler=None):
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    optimizer = optim.SAM(optim.AdamW(model.parameters(), lr=0.05), rho=0.1, model=model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    x, y = torch.randn(32, 6), torch.randn(32, 2)

    def backward(rows=slice(None), share=1.0):
        loss = (model(x[rows]) - y[rows]).square().mean() * share
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    def closure():
        optimizer.zero_grad()
        return backward()

    for _ in range(steps):
        if form == "closure":
            optimizer.step(closure, scaler=scaler)
        elif form == "contexts":
            optimizer.zero_grad()
            with optimizer.ascent():
                backward()
            with optimizer.descent(scaler=scaler):
                backward()
        else:
            optimizer.zero_grad()
            backward()
            optimizer.first_step(zero_grad=True)
            with optim.frozen_batchnorm(model):
                backward()
            optimizer.second_step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        scheduler.step()
    assert model[1].num_batches_tracked == steps  # the first pass's alone
    return [p.detach().clone() for p in model.parameters()] + [model[1].running_mean, model[1].running_var]


@pytest.mark.parametrize("scaled", [False, True])
def test_three_ways_to_write_a_step_are_one(scaled):
    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) if scaled else None

    first = trained("closure", scaler=scaler())
    assert same(first, trained("contexts", scaler=scaler())) and same(first, trained("steps", scaler=scaler()))
    # A scale that is a power of two changes no bit of a gradient, and the direction not at all.
    assert same(first, trained("closure"))


@pytest.mark.parametrize("base", [optim.AdamW, torch.optim.AdamW], ids=["ours", "torch"])
@pytest.mark.parametrize("bad", [1, 0], ids=["first pass", "second pass"])
def test_a_grad_scaler_skips_on_inf_in_either_pass(base, bad):
    passes = Passes(scale=64.0)
    optimizer, scaler = optim.SAM(base(passes.params, lr=0.1), rho=0.5), torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.zeros(()))  # a scaler sets itself up in its first call
    optimizer.step(passes.closure(EVERY, EVERY), scaler=scaler)
    scaler.update()
    start = bits(passes.params)
    optimizer.step(passes.closure(EVERY, EVERY, value=(bad, 0, math.inf)), scaler=scaler)
    scaler.update()
    assert same(start, bits(passes.params))
    assert scaler.get_scale() == (
        64.0 if bad else 32.0
    )  # torch looks at the gradients that it finds: the second pass's
    optimizer.step(passes.closure(EVERY, EVERY), scaler=scaler)
    assert not same(start, bits(passes.params))


def test_accumulated_gradients_climb_together():
    def run(parts):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 2).double().float()
        optimizer = optim.SAM(optim.SGD(model.parameters(), lr=0.1), rho=0.1)
        x, y = torch.randn(8, 6), torch.randn(8, 2)
        contexts = optimizer.ascent, optimizer.descent
        for context in contexts:
            with context():
                for rows in torch.arange(8).chunk(parts):
                    ((model(x[rows]) - y[rows]).square().sum() / 16).backward()
        return [p.detach().clone() for p in model.parameters()]

    for whole, parts in zip(run(1), run(4)):
        # Sums of 8 products in another order: some 8 u of numbers of order 1.
        assert (whole - parts).abs().max() <= 32 * 2.0**-24


def test_group_options_override_and_can_be_scheduled():
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:2], "rho": 0.5}, {"params": params[2:], "adaptive": True}]
    optimizer = optim.SAM(optim.SGD(groups, lr=0.0), rho=0.1, p=math.inf)
    for p in params:
        p.grad = torch.ones(4)
    optimizer.first_step()
    moves = [(p.detach() - 1)[0].item() for p in params]
    assert moves == pytest.approx([0.1, 0.5, 0.1 * 1.01], rel=1e-6)
    optimizer.restore()
    optimizer.param_groups[0]["rho"] = 0.25
    optimizer.first_step()
    assert params[0][0].item() == 1.25


BYTES = [
    ("fp32", dict(), 2.0, False, 48),
    ("p = inf", dict(), math.inf, False, 44),
    ("adaptive", dict(), 2.0, True, 52),
    ("master", dict(master_weights=True), 2.0, False, 38),
    ("correction bits", dict(correction_bits=16), 2.0, False, 38),
    ("bf16", dict(), 2.0, False, 24),
]


@pytest.mark.parametrize(("name", "options", "p", "adaptive", "expected"), BYTES, ids=[b[0] for b in BYTES])
def test_bytes_per_parameter_by_the_work_plan(name, options, p, adaptive, expected):
    dtype = F32 if name in ("fp32", "p = inf", "adaptive") else BF16
    params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in (100, 1, 923)]
    optimizer = optim.SAM(optim.AdamW(params, lr=0.1, **options), p=p, adaptive=adaptive)

    def closure():
        for w in params:
            w.grad = torch.ones_like(w)

    optimizer.step(closure)  # makes the states; from then on all is in place
    with counted_traffic() as traffic:
        optimizer.step(closure)
    assert traffic.bytes == expected * 1024


def test_wrong_arguments():
    params = [torch.nn.Parameter(torch.zeros(3))]
    with pytest.raises(TypeError, match="expected an instance of an optimizer"):
        optim.SAM(optim.AdamW)
    with pytest.raises(ValueError, match=r"p is 0.5, expected a number >= 1 or inf"):
        optim.SAM(optim.SGD(params), p=0.5)
    with pytest.raises(ValueError, match="rho is -1"):
        optim.SAM(optim.SGD(params), rho=-1)
    with pytest.raises(ValueError, match="per_rank=True needs model="):
        optim.SAM(optim.SGD(params), per_rank=True)
    with pytest.raises(ValueError, match=r"rho_min is 0\.1 and lr_max is None"):
        optim.GSAM(optim.SGD(params), rho_min=0.1)
    with pytest.raises(ValueError, match="q=1"):
        optim.GradientNormPenalty(optim.SGD(params), 0.1, q=1, squared=True)
    w, g = torch.zeros(3), torch.ones(3)
    for arguments, message in (
        (([w], [g], [torch.zeros(4)]), r"backups\[0\] has shape"),
        (([w], [g], [torch.zeros(3, dtype=BF16)]), "bit for bit"),
        (([w], [g], None), "expected backups, or masters"),
        (([w], [g], [w]), "shares memory"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            steepest.perturb_(*arguments)
        assert torch.equal(w, torch.zeros(3))
    with pytest.raises(ValueError, match="perturb_: rho is -1"):
        steepest.perturb_([w], [g], [torch.zeros(3)], rho=-1)
    assert torch.equal(w, torch.zeros(3))


def test_sharded_norms_are_those_of_the_whole():
    """Two halves of every parameter, each moved with the other's norm added: bit for bit the move of the whole."""
    generator = torch.Generator().manual_seed(1)
    w, g = (torch.randn(64, generator=generator) for _ in range(2))
    g[5] = g[40] = g.abs().max() + 1  # p = 1: a tie across the shards
    for p in (1.0, 1.5, 2.0, 3.0, math.inf):
        q = sam_ops.dual("test", p)
        whole, backup = [w.clone()], [torch.zeros_like(w)]
        steepest.perturb_(whole, [g], backup, rho=0.5, p=p)
        halves = []
        for rank in range(2):
            mine, other = (slice(32 * r, 32 * r + 32) for r in (rank, 1 - rank))

            def reduce_norm(norm, order, other=other, q=q):
                if order == 1.0 and q != 1.0:  # counts of p = 1
                    return norm + (g[other].abs() == g.abs().max()).sum()
                far = steepest.reference.sam.norm([g[other]], order)
                return torch.maximum(norm, far) if math.isinf(order) else (norm**order + far**order) ** (1 / order)

            part, zero = [w[mine].clone()], [sam_ops.Weighing()]
            found = sam_ops.measure([g[mine]], part, zero, q, reduce_norm)
            rows = [sam_ops.row("test", 0.5, zero[0], q)]
            sam_ops.ascend("test", [part, [g[mine]], [torch.zeros(32)]], rows, None, q, found)
            halves.append(part[0])
        # Largest and coefficient are rounded apart: two roundings of the direction, whose power they go through.
        exponent = 1 if q in (1.0, math.inf) else max(1.0, q - 1)
        assert (torch.cat(halves) - whole[0]).abs().max() <= 0.5 * 8 * exponent * 2.0**-24
