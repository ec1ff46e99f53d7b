"""pytorch-optimizer: its own AdamW (FlashAdamW; the name AdamW there is torch's), and the iterations of its Muon."""

from __future__ import annotations

import math

import torch
from pytorch_optimizer import FlashAdamW, Muon
from torch import Tensor

from steepest.conformance.subjects import adamw_judge
from steepest.conformance.subjects.base import AdamWAdapter, PolarAdapter, Subject
from steepest.conformance.subjects.polar_judge import Arithmetic, gram_newton_schulz, newton_schulz
from steepest.schedules import named


class PortableFlashAdamW(AdamWAdapter):
    maximize = True

    def build(self, parameters, **hyper):
        return FlashAdamW(parameters, quantize=False, **hyper)

    def give(self, parameter, done, m, v, vmax):
        self.optimizer.state[parameter] = {"exp_avg": m, "exp_avg_sq": v}
        self.optimizer.param_groups[0]["step"] = done

    def take(self, parameter):
        state = self.optimizer.state[parameter]
        return state["exp_avg"], state["exp_avg_sq"]


class OptimizerMuon(PolarAdapter):
    """As torch's: one step from p = 0 with momentum 0, no decay, and lr that undoes the factor sqrt(max(1, m/n))."""

    two_dimensional = True

    def __init__(self, method: str):
        super().__init__(named("keller", 5))
        self.method = method

    def polar(self, x: Tensor) -> Tensor:
        p = torch.nn.Parameter(torch.zeros_like(x))
        lr = 1 / math.sqrt(max(1, x.shape[0] / x.shape[1])) if x.shape[1] else 1.0
        group = dict(params=[p], lr=lr, momentum=0.0, weight_decay=0.0, use_muon=True, ns_method=self.method)
        optimizer = Muon([group])
        p.grad = x
        optimizer.step()
        return -p.detach()


def implementations() -> list[Subject]:
    standard = Arithmetic(torch.bfloat16, newton_schulz, norm_dtype=torch.bfloat16, floor=1e-7)
    gram = Arithmetic(torch.float16, gram_newton_schulz, norm_dtype=torch.float32, floor=1e-7)
    return [
        Subject(
            "pytorch-optimizer AdamW",
            PortableFlashAdamW(),
            op="adamw",
            arithmetic=adamw_judge.Arithmetic(rule=adamw_judge.corrected_moments(adamw_judge.lerp)),
            note="pytorch_optimizer.FlashAdamW(quantize=False)",
        ),
        Subject(
            "pytorch-optimizer Muon",
            OptimizerMuon("newton_schulz"),
            op="polar",
            arithmetic=standard,
            note="pytorch_optimizer.Muon: its Newton–Schulz, in bfloat16",
        ),
        Subject(
            "pytorch-optimizer Muon, Gram",
            OptimizerMuon("gram_newton_schulz"),
            op="polar",
            arithmetic=gram,
            note="pytorch_optimizer.Muon(ns_method='gram_newton_schulz'), in float16",
        ),
    ]
