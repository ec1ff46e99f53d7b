"""bitsandbytes on the CPU: AdamW with its default 32-bit states."""

from __future__ import annotations

import bitsandbytes
import torch

from steepest.conformance.subjects import adamw_judge
from steepest.conformance.subjects.base import AdamWAdapter, Subject


class BitsAndBytesAdamW(AdamWAdapter):
    amsgrad = True
    state_dtype = torch.float32

    def build(self, parameters, **hyper):
        return bitsandbytes.optim.AdamW(parameters, **hyper)

    def give(self, parameter, done, m, v, vmax):
        self.optimizer.state[parameter] = {"step": done, "state1": m, "state2": v}

    def take(self, parameter):
        state = self.optimizer.state[parameter]
        return state["state1"], state["state2"]


def implementations() -> list[Subject]:
    note = "bitsandbytes.optim.AdamW(optim_bits=32)"
    how = adamw_judge.Arithmetic(rule=adamw_judge.late_correction)
    return [Subject("bitsandbytes AdamW", BitsAndBytesAdamW(), op="adamw", arithmetic=how, note=note)]
