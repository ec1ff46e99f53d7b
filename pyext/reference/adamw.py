"""AdamW's rule in plain PyTorch: the oracle that every kernel is held against.

Loshchilov & Hutter, "Decoupled weight decay regularization" (2019), AMSGrad from Reddi et al. (2018), in the rounding
order of torch.optim.AdamW's for-loop but for the second moment's bias correction b, which the step size and eps carry:
m / (√v / b + eps) = b m / (√v + b eps).  `element` is the whole rule; it is written with operators only, so that it
runs on float32 tensors (then it equals the C++, CUDA and Triton kernels bit for bit), on float64 tensors (the exact
answer, for practical purposes) and on the running-error numbers of steepest.conformance.bounds (the error bound).
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
    negative_step_size: Any  # -lr sqrt(1 - beta2^t) / (1 - beta1^t)
    eps: Any  # eps sqrt(1 - beta2^t)

    def map(self, constant: Callable[[float], Any]) -> AdamWScalars:
        return AdamWScalars(**{name: constant(value) for name, value in vars(self).items()})


def scalars(*, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int) -> AdamWScalars:
    beta1, beta2 = betas
    bias2_sqrt = math.sqrt(1 - beta2**step)
    return AdamWScalars(
        decay=1 - lr * weight_decay,
        lerp=1 - beta1,
        beta2=beta2,
        beta2_rest=1 - beta2,
        negative_step_size=-(lr * bias2_sqrt / (1 - beta1**step)),
        eps=eps * bias2_sqrt,
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
    p = p + (s.negative_step_size * m) / (square_root(v if vmax is None else vmax) + s.eps)
    return p, m, v, vmax
