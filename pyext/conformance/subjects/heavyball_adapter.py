"""HeavyBall, run eagerly: compiling every shape of every case would take hours and changes no formula.

Its AdamW keeps moments that are already bias-corrected, m / (1 - beta1^t) and v / (1 - beta2^t), in float32.  So states
can be given only where they are zero, and only parameters mean the same as ours.  Its denominator is max(sqrt(v), eps)
where AdamW's is sqrt(v) + eps, which shows where v is small.  It rounds to bfloat16 stochastically, by design: then two
runs differ, and no bound of rounding to nearest applies.
"""

from __future__ import annotations

import heavyball
import heavyball.utils
import torch
from torch import Tensor

from steepest.conformance.subjects import adamw_judge
from steepest.conformance.subjects.base import AdamWAdapter, PolarAdapter, Subject
from steepest.conformance.subjects.polar_judge import Arithmetic, horner
from steepest.schedules import named

heavyball.utils.compile_mode = None


class HeavyBallAdamW(AdamWAdapter):
    state_dtype = torch.float32

    def build(self, parameters, **hyper):
        if parameters[0].dtype == torch.bfloat16:
            raise NotImplementedError("rounds bfloat16 parameters stochastically, by design")
        return heavyball.AdamW(parameters, **hyper, storage_dtype="float32")

    def give(self, parameter, done, m, v, vmax):
        if done or m.any() or v.any():
            raise NotImplementedError("keeps bias-corrected moments, so only a start from zero can be given")

    def take(self, parameter):
        return ()  # not comparable


class HeavyBallMuon(PolarAdapter):
    def polar(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)  # the input is rounded to bfloat16 stochastically
        return heavyball.utils.inplace_orthogonal_(x, mode="newtonschulz", scale_mode="none")


def implementations() -> list[Subject]:
    how = Arithmetic(torch.bfloat16, horner, floor=1e-7)
    return [
        Subject(
            "heavyball AdamW",
            HeavyBallAdamW(),
            op="adamw",
            arithmetic=adamw_judge.Arithmetic(rule=adamw_judge.corrected_states, judged=("params",)),
            note="heavyball.AdamW(storage_dtype='float32'), not compiled",
        ),
        Subject(
            "heavyball Muon",
            HeavyBallMuon(named("you", 5)),
            op="polar",
            arithmetic=how,
            note="heavyball.utils.inplace_orthogonal_(mode='newtonschulz', scale_mode='none'), not compiled, bfloat16",
        ),
    ]
