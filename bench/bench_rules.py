"""The other elementwise rules, clipping inside the step, and many param groups."""

from __future__ import annotations

import pytest
import torch
from problems import parameters, step_runners

import steepest
from steepest.conformance.cases.rules import RuleCase, least_bytes
from steepest.conformance.registry import registered_ops

MAX_NORM = 1.0
# rule: (our class, options, its peers' options, number of states).  torch has fused SGD and Adagrad, no fused RMSprop
# and no Lion at all.
RULES = {
    "sgd": (
        "SGD",
        dict(lr=1e-3, momentum=0.9),
        {"torch fused": dict(fused=True), "torch foreach": dict(foreach=True)},
        1,
    ),
    "adagrad": ("Adagrad", dict(lr=1e-3), {"torch fused": dict(fused=True), "torch foreach": dict(foreach=True)}, 1),
    "rmsprop": ("RMSprop", dict(lr=1e-3), {"torch foreach": dict(foreach=True)}, 1),
    "lion": ("Lion", dict(lr=1e-3), {}, 1),
}
SIZES = {"quick": (1, 4 << 20), "full": (1, 32 << 20)}


def costs(rule: str, params, states: int) -> dict:
    case = RuleCase("benchmark", states=("state",) * states, shapes=tuple(tuple(p.shape) for p in params), steps=1)
    return {
        "nbytes": least_bytes(case, params[0].dtype),
        "flops": registered_ops()[rule].flops(case),
        "tensors": len(params),
        "elements": sum(p.numel() for p in params),
    }


@pytest.mark.cases(
    quick={rule: (rule, *SIZES["quick"]) for rule in RULES}, full={rule: (rule, *SIZES["full"]) for rule in RULES}
)
def bench_rule(race, device, case):
    rule, count, size = case
    name, options, peers, states = RULES[rule]
    params = parameters([(size,)] * count, torch.float32, device)

    def ours(p):
        return getattr(steepest.optim, name)(p, **options).step

    def peer(extra):
        return lambda p: getattr(torch.optim, name)(p, **options, **extra).step

    mine, theirs = step_runners(params, ours, {key: peer(extra) for key, extra in peers.items()})
    race(mine, theirs, op=rule, case=f"{count} x {size} float32", **costs(rule, params, states))


@pytest.mark.cases(quick={"4M": SIZES["quick"]}, full={"32M": SIZES["full"]})
def bench_rules_beside_adamw(race, device, case):
    """Every rule's bytes per second in the same rounds as AdamW's: machines drift by more than the rules differ.

    `bench_rule` and `bench_adamw.py` compare what these steps compute with the peers'.
    """
    count, size = case

    def runner(name: str, options: dict, op: str, states: int):
        params = parameters([(size,)] * count, torch.float32, device)
        return getattr(steepest.optim, name)(params, **options).step, costs(op, params, states)

    adamw, least = runner("AdamW", dict(lr=1e-3), "adam", 2)
    others = {name: runner(name, options, rule, states) for rule, (name, options, _, states) in RULES.items()}
    steps = {name: step for name, (step, _) in others.items()}
    found = race(adamw, steps, op="rules beside adamw", case=f"{count} x {size} float32", **least)
    for name, peer in found.get("peers", {}).items():
        bytes_of_ours = others[name][1]["nbytes"] / least["nbytes"]
        peer["rate_of_ours"] = bytes_of_ours / peer["ratio"]
        if "loop_ratio" in peer:
            peer["loop_rate_of_ours"] = bytes_of_ours / peer["loop_ratio"]


@pytest.mark.cases(
    quick={"1x4M": (1, 4 << 20), "500x64x64": (500, 4096), "2000x16": (2000, 16)},
    full={"1x32M": (1, 32 << 20), "2000x64x64": (2000, 4096), "10000x16": (10000, 16)},
)
def bench_clip_and_adamw(race, device, case):
    """Clipping by norm and AdamW: ours in one step, torch's clip_grad_norm_ and fused step.

    The gradients are far larger than the limit, so that torch's are scaled down again in every round: a second call
    finds them at the limit, and multiplies by almost 1.
    """
    count, size = case
    params = parameters([(size,)] * count, torch.float32, device)

    def ours(p):
        return steepest.optim.AdamW(p, lr=1e-3, max_grad_norm=MAX_NORM).step

    def peer(p):
        optimizer = torch.optim.AdamW(p, lr=1e-3, fused=True)

        def step():
            torch.nn.utils.clip_grad_norm_(p, MAX_NORM)
            optimizer.step()

        return step

    mine, theirs = step_runners(params, ours, {"torch clip + fused": peer})
    found = costs("adam", params, 2)
    found["nbytes"] += 4 * found["elements"]  # one more read of the gradients
    race(mine, theirs, op="clip + adamw", case=f"{count} x {size} float32", **found)


@pytest.mark.cases(quick={"465": 465}, full={"465": 465})
def bench_param_groups(race, device, case):
    """As many param groups as tensors, against one group of all: the cost of groups."""
    params = parameters([(16384,)] * case, torch.float32, device)

    def grouped(p):
        return steepest.optim.AdamW([{"params": [x], "lr": 1e-3 * (1 + i / case)} for i, x in enumerate(p)]).step

    def peer(p):
        groups = [{"params": [x], "lr": 1e-3 * (1 + i / case)} for i, x in enumerate(p)]
        return torch.optim.AdamW(groups, fused=True).step

    mine, theirs = step_runners(params, grouped, {"torch fused": peer})
    one = steepest.optim.AdamW([p.detach().clone().requires_grad_() for p in params])
    for p, q in zip(one.param_groups[0]["params"], params):
        p.grad = q.grad
    race(
        mine,
        theirs | {"steepest, one group": one.step},
        op="param groups",
        case=f"{case} groups of 1 x 16384",
        **costs("adam", params, 2),
    )
