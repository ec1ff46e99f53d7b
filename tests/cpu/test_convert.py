"""Checkpoints of apex and bitsandbytes: a run goes on as if nothing had happened."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import steepest
from steepest.optim import from_apex, from_bitsandbytes

SHAPES = [(80, 70), (5,), (64, 64)]
OPTIMIZERS = {
    "AdamW": dict(weight_decay=0.1, betas=(0.8, 0.99)),
    "Adam": dict(betas=(0.8, 0.99)),
    "SGD": dict(momentum=0.7, weight_decay=0.1),
    "Adagrad": dict(weight_decay=0.1),
    "Lion": dict(weight_decay=0.1),
    "RMSprop": dict(alpha=0.8, weight_decay=0.1),
}


def parameters(dtypes=(torch.float32,) * 3):
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(d)) for s, d in zip(SHAPES, dtypes)]


def run(optimizer, params, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def copied(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def make(name, params, **options):
    return getattr(steepest.optim, name)(params, **{"lr": 0.01, **OPTIMIZERS[name], **options})


def as_apex(optimizer, names):
    """The layout of apex's state_dict: counters in the groups, float32 states."""
    packed = optimizer.state_dict()
    state = {n: {k: e[k].float() for k in names} for n, e in packed["state"].items()}
    known = ("params", "lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov")
    groups = [{k: v for k, v in group.items() if k in known} for group in packed["param_groups"]]
    if "exp_avg" in names:
        for group in groups:
            group |= {"bias_correction": True, "step": int(packed["state"][0]["step"])}
    return {"state": state, "param_groups": groups}


@pytest.mark.parametrize(
    ("name", "states"),
    [("AdamW", ("exp_avg", "exp_avg_sq")), ("Adam", ("exp_avg", "exp_avg_sq")), ("SGD", ("momentum_buffer",)),
     ("Adagrad", ("sum",))],
)  # fmt: skip
def test_apex_checkpoint_goes_on_bit_for_bit(name, states):
    params = parameters()
    whole = make(name, params)
    run(whole, params, range(3))
    saved, mine = as_apex(whole, states), copied(params)
    if "betas" in OPTIMIZERS[name]:  # as a capturable FusedAdam keeps them
        saved["param_groups"][0] |= {"lr": torch.tensor(0.01, dtype=torch.float64), "step": torch.tensor([3])}
    resumed = getattr(steepest.optim, name)(mine, lr=1.0)  # options come from the checkpoint
    if name == "SGD":
        resumed.param_groups[0]["momentum"] = 0.1
    resumed.load_state_dict(from_apex(resumed, saved))
    run(whole, params, range(3, 6))
    run(resumed, mine, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(params, mine))
    assert resumed.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("form", ["list", "param_groups_master", "FP16_Optimizer"])
def test_apex_masters_are_taken_over(form):
    dtypes = (torch.bfloat16, torch.float32, torch.bfloat16)
    params = parameters(dtypes)
    whole = make("AdamW", params, master_weights=True)
    run(whole, params, range(3))
    saved = as_apex(whole, ("exp_avg", "exp_avg_sq"))
    masters = [whole.state[p].get("master", p.detach()).clone() for p in params]
    mine = copied(params)
    resumed = make("AdamW", mine, master_weights=True)
    if form == "FP16_Optimizer":  # 16-bit parameters come first in its groups
        state = saved["state"]
        saved["state"] = {0: state[0], 1: state[2], 2: state[1]}
        saved = {"optimizer_state_dict": saved, "fp32_from_fp16": [[masters[0], masters[2]]], "overflow": False}
        given = None
    else:
        given = masters if form == "list" else [{"params": masters}]
    resumed.load_state_dict(from_apex(resumed, saved, given))
    run(whole, params, range(3, 6))
    run(resumed, mine, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(params, mine))
    assert all(torch.equal(whole.state[p]["master"], resumed.state[q]["master"]) for p, q in zip(params, mine) if p.dtype == torch.bfloat16)  # fmt: skip # noqa: E501


def test_apex_refusals_name_what_is_wrong():
    params = parameters()
    ours = make("AdamW", params)
    run(ours, params, range(1))
    good = as_apex(ours, ("exp_avg", "exp_avg_sq"))
    group, state = good["param_groups"][0], good["state"]
    masters = [p.detach().clone() for p in params]
    half = [torch.nn.Parameter(p.detach().bfloat16()) for p in params]
    plain, keeping = make("AdamW", half), make("AdamW", half, master_weights=True)
    wrong = [
        (ours, {"model": 1}, None, "expected 'state' and 'param_groups'"),
        (ours, {**good, "param_groups": [{**group, "params": [0]}]}, None, r"groups of \[1\] parameters"),
        (ours, {**good, "param_groups": [{**group, "bias_correction": False}]}, None, "bias_correction=False"),
        (ours, {**good, "param_groups": [{**group, "grad_averaging": True}]}, None, "FusedLAMB's"),
        (ours, {**good, "param_groups": [{k: v for k, v in group.items() if k != "step"}]}, None, "has 'step'"),
        (ours, {**good, "state": {0: {"exp_avg": state[0]["exp_avg"]}}}, None, r"has \['exp_avg'\]"),
        (ours, {**good, "state": {0: state[1]}}, None, r"exp_avg is \(5,\)"),
        (make("SGD", params), good, None, "expected .'momentum_buffer'"),
        (make("Lion", params), good, None, "optimizer is Lion"),
        (ours, good, masters[:2], "2 masters for 3 parameters"),
        (plain, good, masters, "master_weights=True"),
        (keeping, good, [m.half() for m in masters], "expected torch.float32"),
    ]
    for optimizer, checkpoint, given, message in wrong:
        with pytest.raises(ValueError, match=message):
            from_apex(optimizer, checkpoint, given)


def quantised(x, book, block):
    """Nearest codes by blocks in memory order: (codes, largest magnitudes)."""
    flat = x.flatten()
    scale = torch.stack([part.abs().max() for part in flat.split(block)])
    relative = flat / scale.repeat_interleave(block)[: len(flat)]
    return (relative[:, None] - book).abs().argmin(1).to(torch.uint8).view(x.shape), scale


def books():
    """Any sorted code books do: bitsandbytes keeps the ones it has used beside the codes."""
    signed = torch.cat([-torch.logspace(0, -5, 127), torch.zeros(1), torch.logspace(-5, 0, 128)])
    return signed, torch.cat([torch.zeros(1), torch.logspace(-7, 0, 255)])


def as_bnb(states, block, *, wrapped=False, step=3):
    """One entry of a bitsandbytes checkpoint, and the states that it stands for."""
    entry, expected = {}, []
    for i, (x, book) in enumerate(zip(states, books()), start=1):
        codes, scale = quantised(x, book, block or x.numel())
        entry |= {f"state{i}": codes, f"qmap{i}": book, f"absmax{i}" if block else f"max{i}": scale}
        expected.append((book[codes.long()].flatten() * scale.repeat_interleave(block or x.numel())[: x.numel()]).view(x.shape))  # fmt: skip # noqa: E501
    return {"step": step, "__bnb_optimizer_quant_state__": entry} if wrapped else {"step": step, **entry}, expected


GROUP = dict(lr=0.01, betas=(0.8, 0.99), eps=1e-8, weight_decay=0.1)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("block", [256, 2048, None])
def test_bitsandbytes_codes_are_decoded_exactly(block, wrapped):
    params = parameters()[:1]
    states = torch.randn(80, 70), torch.rand(80, 70) ** 4
    entry, expected = as_bnb(states, block, wrapped=wrapped)
    ours = steepest.optim.AdamW(params)
    ours.load_state_dict(from_bitsandbytes(ours, {"state": {0: entry}, "param_groups": [{**GROUP, "params": [0]}]}))
    held = ours.state[params[0]]
    assert torch.equal(held["exp_avg"], expected[0]) and torch.equal(held["exp_avg_sq"], expected[1])
    assert held["step"] == 3 and ours.param_groups[0]["betas"] == (0.8, 0.99)
    assert (expected[0] - states[0]).abs().max() < 0.3  # the code books are good ones
    run(ours, params, range(1))
    assert held["step"] == 4


def test_bitsandbytes_states_may_become_8bit_states_of_this_library():
    params = parameters()[:1]
    entry, expected = as_bnb((torch.randn(80, 70), torch.rand(80, 70)), 256)
    ours = steepest.optim.AdamW(params, state_dtype="block8")
    ours.load_state_dict(from_bitsandbytes(ours, {"state": {0: entry}, "param_groups": [{**GROUP, "params": [0]}]}))
    params[0].grad = torch.zeros(80, 70)
    ours.step()
    kept = ours.torch_state_dict()["state"][0]["exp_avg"]
    # 3 bits of significand: encoded to nearest, relative 1/16, decayed by beta1 = 0.8, then rounded at random, 1/8.
    bound = 0.8 / 16 + 0.8 * (1 + 1 / 16) / 8
    assert (kept - 0.8 * expected[0]).abs().max() <= bound * expected[0].abs().max()


def test_bitsandbytes_refusals_name_what_is_wrong():
    params = parameters()[:1]
    ours = steepest.optim.AdamW(params)
    entry, _ = as_bnb((torch.randn(80, 70), torch.rand(80, 70)), 256)

    def without(*names, **more):
        return {**{k: v for k, v in entry.items() if k not in names}, **more}

    wrong = [
        (ours, without(gnorm_vec=torch.zeros(100)), "percentile clipping"),
        (ours, without(unorm_vec=torch.zeros(1)), "LAMB or LARS"),
        (ours, without("state2"), "expected state1, state2 and step"),
        (ours, without("step"), "expected state1, state2 and step"),
        (steepest.optim.Lion(params), entry, "expected state1 and step"),
        (ours, without("qmap1"), "expected a code book qmap1"),
        (ours, without("absmax2"), r"expected absmax2 \(by blocks\) or max2"),
        (ours, without(absmax1=torch.ones(7)), "absmax1 has 7 numbers for 5600 elements"),
        (ours, without(state1=torch.zeros(2, 80, 70)), r"state1 is \(2, 80, 70\)"),  # AdEMAMix
        (steepest.optim.Adam(params), entry, "decouples from the gradient"),
        (steepest.optim.Muon(params), entry, "optimizer is Muon"),
    ]
    for optimizer, given, message in wrong:
        with pytest.raises(ValueError, match=message):
            from_bitsandbytes(optimizer, {"state": {0: given}, "param_groups": [{**GROUP, "params": [0]}]})


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("name", ["AdamW", "Lion", "SGD", "RMSprop", "Adagrad"])
def test_runs_of_bitsandbytes_go_on(name, bits):
    """The package itself: three steps there, three more there and here from its checkpoint."""
    import bitsandbytes

    options = {"lr": 0.01, **OPTIMIZERS[name]}
    kind = getattr(bitsandbytes.optim, "Adagrad8bit" if (name, bits) == ("Adagrad", 8) else name)
    params = parameters()
    theirs = kind(params, **options, **({} if name == "Adagrad" else {"optim_bits": bits}))
    run(theirs, params, range(3))
    mine = copied(params)
    ours = getattr(steepest.optim, name)(mine, lr=1.0, **({"momentum": 0.1} if name == "SGD" else {}))
    ours.load_state_dict(from_bitsandbytes(ours, theirs.state_dict()))
    for p, q in zip(params, mine):
        held, entry = list(ours.state[q].items()), theirs.state[p]
        for i in range(1, 3):
            if f"state{i}" not in entry:
                continue
            value = entry[f"state{i}"]
            if value.dtype == torch.uint8:
                value = bitsandbytes.functional.dequantize_blockwise(
                    value, absmax=entry[f"absmax{i}"], code=entry[f"qmap{i}"], blocksize=256
                )
            assert torch.equal(held[i][1], value), held[i][0]
    assert (mine[0].detach() - parameters()[0]).abs().max() > 1e-3
    if bits == 32:  # with 8 bits they round their states anew in every step
        run(theirs, params, range(3, 6))
        run(ours, mine, range(3, 6))
        for p, q in zip(params, mine):
            # lr times a direction of at most 10 (1 for Adam and Lion; SGD's 1 / (1 - momentum)), float32 throughout:
            # each of some ten roundings per step is relative 2^-24; a sign of Lion's does not flip for these gradients.
            assert (p - q).abs().max() <= 3 * (10 * 2.0**-24 * p.abs().max() + 0.01 * 10 * 10 * 2.0**-24)
