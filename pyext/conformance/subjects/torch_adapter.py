"""torch.optim: AdamW in its three implementations, and Muon's Newton–Schulz iteration."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steepest.conformance.compare import bits_figure
from steepest.conformance.registry import Figure
from steepest.conformance.subjects import adamw_judge, polar_judge
from steepest.conformance.subjects.adamw_judge import float32, own_dtype
from steepest.conformance.subjects.base import AdamWAdapter, PolarAdapter, Subject
from steepest.schedules import named


class TorchAdamW(AdamWAdapter):
    amsgrad = maximize = True

    def __init__(self, **implementation):
        super().__init__()
        self.implementation = implementation
        self.scaling = implementation.get("fused", False)

    def build(self, parameters, **hyper):
        return torch.optim.AdamW(parameters, **hyper, **self.implementation)

    def give(self, parameter, done, m, v, vmax):
        device = parameter.device if self.scaling else "cpu"  # where torch.optim keeps the step count
        state = {"step": torch.tensor(float(done), dtype=torch.float32, device=device), "exp_avg": m, "exp_avg_sq": v}
        self.optimizer.state[parameter] = state if vmax is None else {**state, "max_exp_avg_sq": vmax}

    def take(self, parameter):
        state = self.optimizer.state[parameter]
        return tuple(state[name] for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if name in state)

    def scale(self, grad_scale, found_inf):
        # GradScaler.step sets these two attributes, to tensors without dimensions.
        self.optimizer.grad_scale = None if grad_scale is None else grad_scale.reshape(())
        self.optimizer.found_inf = None if found_inf is None else found_inf.reshape(())


class TorchMuon(PolarAdapter):
    """One step from p = 0 with momentum 0 and no decay: p becomes minus the polar factor of the gradient.

    lr undoes the factor sqrt(max(1, m/n)) that `step` multiplies it by, to float64 rounding: in float32 the two make 1.
    """

    two_dimensional = True

    def __init__(self, nesterov: bool):
        super().__init__(named("keller", 5))
        self.nesterov = nesterov

    def polar(self, x: Tensor) -> Tensor:
        p = torch.nn.Parameter(torch.zeros_like(x))
        lr = 1 / math.sqrt(max(1, x.shape[0] / x.shape[1])) if x.shape[1] else 1.0
        optimizer = torch.optim.Muon([p], lr=lr, weight_decay=0.0, momentum=0.0, nesterov=self.nesterov)
        p.grad = x
        optimizer.step()
        self.momentum = (optimizer.state[p]["momentum_buffer"], x)
        return -p.detach()

    def figures(self) -> list[Figure]:
        return [bits_figure("momentum kept", [self.momentum], "with momentum 0 the buffer is the gradient")]


def implementations() -> list[Subject]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    newton_schulz = polar_judge.newton_schulz
    muon = polar_judge.Arithmetic(torch.bfloat16, newton_schulz, norm_dtype=torch.bfloat16, floor=1e-7)
    subjects = []
    for device in devices:
        at = "" if device == "cpu" else f" ({device})"
        for name, options, work in (
            ("fused", dict(fused=True), float32),
            ("foreach", dict(foreach=True), own_dtype),
            ("for-loop", dict(foreach=False, fused=False), own_dtype),
        ):
            call = f"torch.optim.AdamW({', '.join(f'{k}={v}' for k, v in options.items())})"
            function, arithmetic = TorchAdamW(**options), adamw_judge.Arithmetic(work)
            subjects.append(
                Subject(f"torch {name}{at}", function, device, op="adamw", arithmetic=arithmetic, note=call)
            )
        for nesterov in (True, False):
            name = "torch Muon" if nesterov else "torch Muon, nesterov=False"
            call = f"torch.optim.Muon(nesterov={nesterov}): its Newton–Schulz, in bfloat16"
            subjects.append(Subject(f"{name}{at}", TorchMuon(nesterov), device, op="polar", arithmetic=muon, note=call))
    return subjects
