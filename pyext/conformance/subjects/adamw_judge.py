"""A foreign AdamW against the exact result, with the rounding of its own order of operations.

Rules below are AdamW, algebraically, in the order in which some library computes it.  On tracked numbers a rule gives
the exact states, the bound for that order (steepest.conformance.bounds), and NaN and infinity where that order has
them: for infinite m, m + w (g - m) is NaN and (1 - w) m + w g is not, and neither is wrong.  Derived scalars are
rounded once, from float64; an implementation that computes 1 - beta2^t in float32 has no excuse in its bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable

import torch

from steepest.conformance.cases import adamw
from steepest.conformance.compare import tracked_figures
from steepest.conformance.registry import Figure, Problem
from steepest.conformance.subjects.base import Subject
from steepest.reference.adamw import square_root


def float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32


def own_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype


@dataclass(frozen=True)
class Arithmetic:
    """How an implementation works.

    work(dtype of the parameters): to what each operation is rounded; rule: its order of operations; judged: the roles
    whose values mean the same as ours.
    """

    work: Callable[[torch.dtype], torch.dtype] = float32
    rule: Callable = adamw.rule
    judged: tuple[str, ...] = adamw.WRITTEN


def judge(problem: Problem, outputs: dict[str, torch.Tensor], backend: Subject) -> list[Figure]:
    case, how = problem.case, backend.arithmetic
    work = how.work(problem.dtype)
    exact = adamw.tracked_run(problem, work, how.rule)
    figures = backend.function.figures()
    for role in case.roles:
        if role in adamw.WRITTEN and role in how.judged:
            x = adamw.flat(outputs[f"{role}[{i}]"] for i in range(len(case.shapes)))
            # What is finite in the exact result may overflow on the way, and inf - inf and inf / inf are NaN: no claim.
            x = torch.where(x.isnan() & exact[role].value.isinf(), exact[role].value.to(x.dtype), x)
            figures += tracked_figures(role, x, exact[role], adamw.ULP_SCALE[role])
    return figures


def late_correction(p, g, m, v, vmax, constant, *, lr, betas, eps, weight_decay, step):
    """bitsandbytes: m and v as weighted sums; step size and eps carry the bias correction of v."""
    beta1, beta2 = betas
    bias1, bias2_sqrt = 1 - beta1**step, math.sqrt(1 - beta2**step)
    m = m * constant(beta1) + constant(1 - beta1) * g
    v = v * constant(beta2) + constant(1 - beta2) * g * g
    vmax = vmax and vmax.maximum(v)
    p = p * constant(1 - lr * weight_decay)
    update = m / (square_root(vmax or v) + constant(eps * bias2_sqrt))
    return p + constant(-lr * bias2_sqrt / bias1) * update, m, v, vmax


def corrected_moments(average: Callable) -> Callable:
    """The paper's form: m and v divided by their bias corrections.  average(m, g, constant, beta1) -> new m."""

    def rule(p, g, m, v, vmax, constant, *, lr, betas, eps, weight_decay, step):
        beta1, beta2 = betas
        m = average(m, g, constant, beta1)
        v = v * constant(beta2) + constant(1 - beta2) * g * g
        p = p * constant(1 - lr * weight_decay)
        denominator = square_root(v / constant(1 - beta2**step)) + constant(eps)
        return p + constant(-lr) * (m / constant(1 - beta1**step)) / denominator, m, v, vmax

    return rule


def lerp(m, g, constant, beta1):
    """torch.lerp: the form that is exact at its own end of [0, 1]."""
    weight = 1 - beta1
    return m + constant(weight) * (g - m) if weight < 0.5 else g - (g - m) * constant(1 - weight)


def weighted_sum(m, g, constant, beta1):
    return m * constant(beta1) + constant(1 - beta1) * g


def corrected_states(p, g, m, v, vmax, constant, *, lr, betas, eps, weight_decay, step):
    """HeavyBall: m / (1 - beta1^t) and v / (1 - beta2^t) are kept, by averages of weight (1 - beta) / (1 - beta^t)."""
    w1, w2 = ((1 - beta) / (1 - beta**step) for beta in betas)
    m = lerp(m, g, constant, 1 - w1)
    v = lerp(v, g * g, constant, 1 - w2)
    update = m / (square_root(v) + constant(eps))
    return p * constant(1 - lr * weight_decay) + update * constant(-lr), m, v, vmax
