"""The optimizer's part of a SAM step around AdamW: ours, and the usual Python implementation around torch's AdamW."""

from __future__ import annotations

import math

import pytest
import torch
from problems import parameters, step_runners

import steepest
from steepest.traffic import counted_traffic

LR, RHO = 1e-3, 0.05


class UsualSAM:
    """As Python packages write SAM: a norm, a clone, a scaled copy and an addition per tensor, weights swapped back."""

    def __init__(self, params, base, adaptive: bool = False):
        self.params, self.base, self.adaptive, self.old = params, base, adaptive, {}

    @torch.no_grad()
    def first_step(self) -> None:
        norms = [((p.abs() if self.adaptive else 1.0) * p.grad).norm(p=2) for p in self.params]
        scale = RHO / (torch.stack(norms).norm(p=2) + 1e-12)
        for p in self.params:
            self.old[p] = p.data.clone()
            p.add_((p.pow(2) if self.adaptive else 1.0) * p.grad * scale)

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.params:
            p.data = self.old[p]
        self.base.step()

    def step(self) -> None:
        self.first_step()
        self.second_step()


def peer(adaptive: bool, **options):
    return lambda p: UsualSAM(p, torch.optim.AdamW(p, lr=LR, **options), adaptive).step


def ours(adaptive: bool, p_norm: float):
    def make(params):
        base = steepest.optim.AdamW(params, lr=LR)
        optimizer = steepest.optim.SAM(base, rho=RHO, p=p_norm, adaptive=adaptive, eta=0.0)

        def step():
            optimizer.first_step()
            optimizer.second_step()

        return step

    return make


QUICK = {"1x4M": (1, 4 << 20), "500x64x64": (500, 4096)}
FULL = {"1x16M": (1, 16 << 20), "2000x64x64": (2000, 4096), "10000x16": (10000, 16)}


@pytest.mark.cases(
    quick={f"{name}{form}": (*size, form) for name, size in QUICK.items() for form in ("",)},
    full={f"{name}{form}": (*size, form) for name, size in FULL.items() for form in ("", ", adaptive", ", p = inf")},
)
def bench_sam(race, device, case):
    """Both passes' optimizer work; the gradients stay as they are, so that no model is timed.

    Bytes are those of our work plan: 48 per element, 52 adaptive, 44 for p = inf (which has no peer).
    """
    count, size, form = case
    params = parameters([(size,)] * count, torch.float32, device)
    adaptive = form == ", adaptive"
    kinds = {} if form == ", p = inf" else {"fused": dict(fused=True), "foreach": dict(foreach=True)}
    peers = {f"usual SAM + torch {kind}": peer(adaptive, **options) for kind, options in kinds.items()}
    mine, theirs = step_runners(params, ours(adaptive, math.inf if form == ", p = inf" else 2.0), peers)
    with counted_traffic() as traffic:
        mine()
    elements = sum(p.numel() for p in params)
    plan = {"": 48, ", adaptive": 52, ", p = inf": 44}[form] * elements
    if device == "cpu":
        assert traffic.bytes == plan
    race(
        mine, theirs, op="sam + adamw", case=f"{count} x {size} float32{form}", nbytes=plan, flops=25 * elements,
        tensors=count, elements=elements,
    )  # fmt: skip
