"""AdamW in plain PyTorch: the oracle that every kernel is held against.

Loshchilov & Hutter, "Decoupled weight decay regularization" (2019), AMSGrad from Reddi et al. (2018), in the rounding
order of torch.optim.AdamW's for-loop.  `element` is the whole rule; it is written with operators only, so that it runs
on float32 tensors (then it equals the C++, CUDA and Triton kernels bit for bit), on float64 tensors (the exact answer,
for practical purposes) and on the running-error numbers of steepest.conformance.bounds (the error bound).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable

import torch


@dataclass(frozen=True)
class AdamWScalars:
    """The numbers that a step derives from its hyper-parameters, in float64 until `map` rounds them."""

    decay: Any  # 1 - lr * weight_decay
    lerp: Any  # 1 - beta1
    beta2: Any
    beta2_rest: Any  # 1 - beta2
    bias2_sqrt: Any  # sqrt(1 - beta2^t)
    negative_step_size: Any  # -lr / (1 - beta1^t)
    eps: Any

    def map(self, constant: Callable[[float], Any]) -> AdamWScalars:
        return AdamWScalars(**{name: constant(value) for name, value in vars(self).items()})


def scalars(*, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int) -> AdamWScalars:
    beta1, beta2 = betas
    return AdamWScalars(
        decay=1 - lr * weight_decay,
        lerp=1 - beta1,
        beta2=beta2,
        beta2_rest=1 - beta2,
        bias2_sqrt=math.sqrt(1 - beta2**step),
        negative_step_size=-(lr / (1 - beta1**step)),
        eps=eps,
    )


def square_root(x):
    """Correctly rounded square root.

    torch.sqrt is not: on a CPU it goes through MKL's vector library, which misrounds 17 % of random float32 numbers by
    one unit (20 million tried, torch 2.13).  Going through float64 rounds right, because the root of a 24-bit number
    is never closer than 2^-51, relatively, to the midpoint of two 24-bit numbers.
    """
    return x.double().sqrt().to(x.dtype) if isinstance(x, torch.Tensor) else x.sqrt()


def element(p, g, m, v, vmax, s: AdamWScalars):
    """One step of one element, or of many: returns the new (p, m, v, vmax).  `vmax` is None without AMSGrad."""
    p = p * s.decay
    toward = g - m
    # torch's lerp: the form that is exact at its own end of [0, 1].
    m = m + s.lerp * toward if s.lerp < 0.5 else g - toward * (1 - s.lerp)
    v = v * s.beta2 + (s.beta2_rest * g) * g
    if vmax is not None:
        vmax = vmax.maximum(v)  # NaN in either is kept
    denominator = square_root(v if vmax is None else vmax) / s.bias2_sqrt + s.eps
    p = p + (s.negative_step_size * m) / denominator
    return p, m, v, vmax


@torch.no_grad()
def adamw_(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    *,
    lr,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=1e-2,
    step,
    max_exp_avg_sqs=None,
    maximize=False,
    grad_scale=None,
    found_inf=None,
):
    """One AdamW step over lists of tensors, in place; any shapes and layouts, equal within a row.

        g = grad / grad_scale                                (negated if maximize)
        p = p * (1 - lr*weight_decay)
        m = m + (1 - beta1) * (g - m)
        v = v * beta2 + ((1 - beta2) * g) * g                (AMSGrad: vmax = max(vmax, v) replaces v below)
        p = p + (-lr / (1 - beta1^step) * m) / (sqrt(v) / sqrt(1 - beta2^step) + eps)

    float64 parameters are stepped in float64, all others in float32; each result is rounded once, to nearest even, to
    its tensor's dtype.  `step` counts from 1: one number, or one per tensor.  `grad_scale` and `found_inf` are
    one-element tensors as in torch.amp; nothing changes when `found_inf` is not zero.
    """
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if max_exp_avg_sqs is not None:
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"adamw_: {name} has {len(tensors)} tensors, params has {len(params)}")
    if found_inf is not None and bool(found_inf != 0):
        return
    steps = step if isinstance(step, (list, tuple)) else [step] * len(params)
    for i, p in enumerate(params):
        exact = scalars(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=steps[i])
        work = torch.promote_types(p.dtype, torch.float32)

        # Zero-dimensional tensors, not Python numbers: CUDA divides by a Python number through its reciprocal.
        def constant(value, work=work, device=p.device):
            return torch.tensor(value, dtype=work, device=device)

        g = grads[i].to(work)
        if grad_scale is not None:
            g = g / grad_scale.to(work).reshape(())
        if maximize:
            g = -g
        state = [exp_avgs[i], exp_avg_sqs[i], None if max_exp_avg_sqs is None else max_exp_avg_sqs[i]]
        m, v, vmax = (None if x is None else x.to(work) for x in state)
        new = element(p.to(work), g, m, v, vmax, exact.map(constant))
        for old, value in zip([p, *state], new):
            if old is not None:
                old.copy_(value)
