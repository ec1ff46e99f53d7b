"""FlashOptim without what needs CUDA: no quantization, no error correction bits, the unfused step."""

from __future__ import annotations

import warnings

from flashoptim import FlashAdamW

from steepest.conformance.subjects import adamw_judge
from steepest.conformance.subjects.base import AdamWAdapter, Subject


class UnfusedFlashAdamW(AdamWAdapter):
    def build(self, parameters, **hyper):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that 16-bit parameters without error correction are fragile
            return FlashAdamW(parameters, quantize=False, master_weight_bits=None, fused=False, **hyper)

    def give(self, parameter, done, m, v, vmax):
        # Its own initialization, then the values: its states are wrapped tensors.
        self.optimizer._ensure_state_initialized(parameter, self.optimizer.param_groups[0])
        state = self.optimizer.state[parameter]
        state["step"].fill_(done)
        state["exp_avg"].set_data(m)
        state["exp_avg_sq"].set_data(v)

    def take(self, parameter):
        state = self.optimizer.state[parameter]
        return state["exp_avg"].materialize(), state["exp_avg_sq"].materialize()


def implementations() -> list[Subject]:
    note = "flashoptim.FlashAdamW(quantize=False, master_weight_bits=None, fused=False)"
    how = adamw_judge.Arithmetic(rule=adamw_judge.corrected_moments(adamw_judge.weighted_sum))
    return [Subject("flashoptim AdamW", UnfusedFlashAdamW(), op="adamw", arithmetic=how, note=note)]
