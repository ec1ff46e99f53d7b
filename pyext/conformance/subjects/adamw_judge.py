"""A foreign AdamW against the exact result, with the rounding of its own order of operations.

Rules below are AdamW, algebraically, in the order in which some library computes it.  On tracked numbers a rule gives
the exact states, the bound for that order (steepest.conformance.bounds), and NaN and infinity where that order has
them: for infinite m, m + w (g - m) is NaN and (1 - w) m + w g is not, and neither is wrong.  Derived scalars are
rounded once, from float64; an implementation that computes 1 - beta2^t in float32 has no excuse in its bound.

Where the exact result is infinite, NaN is accepted if, and only if, the rule gives NaN when each operation is rounded
to the format in which the implementation works.  torch's for-loop in float16: v = 0 and eps = 1e-8 is 0, so that the
step is m / 0, and an infinite parameter becomes inf - inf.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
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


def for_loop(p, g, m, v, vmax, constant, *, lr, betas, eps, weight_decay, step):
    """torch's for-loop and fused kernels: the second moment's root is divided by its bias correction."""
    beta1, beta2 = betas
    m = lerp(m, g, constant, beta1)
    v = v * constant(beta2) + (constant(1 - beta2) * g) * g
    vmax = None if vmax is None else vmax.maximum(v)
    p = p * constant(1 - lr * weight_decay)
    denominator = square_root(v if vmax is None else vmax) / constant(math.sqrt(1 - beta2**step)) + constant(eps)
    return p + (constant(-(lr / (1 - beta1**step))) * m) / denominator, m, v, vmax


@dataclass(frozen=True)
class Arithmetic:
    """How an implementation works.

    work(dtype of the parameters): to what each operation is rounded; rule: its order of operations; judged: the roles
    whose values mean the same as ours.
    """

    work: Callable[[torch.dtype], torch.dtype] = float32
    rule: Callable = for_loop
    judged: tuple[str, ...] = adamw.WRITTEN


def judge(problem: Problem, outputs: dict[str, torch.Tensor], backend: Subject) -> list[Figure]:
    case, how = problem.case, backend.arithmetic
    work = how.work(problem.dtype)
    exact, rounded = adamw.tracked_run(problem, work, how.rule), rounded_run(problem, work, how.rule)
    figures = backend.function.figures()
    for role in case.roles:
        if role in adamw.WRITTEN and role in how.judged:
            x = adamw.flat(outputs[f"{role}[{i}]"] for i in range(len(case.shapes)))
            excused = x.isnan() & rounded[role].isnan() & exact[role].value.isinf()
            x = torch.where(excused, exact[role].value.to(x.dtype), x)
            figures += tracked_figures(role, x, exact[role], adamw.ULP_SCALE[role])
    return figures


def rounded_run(problem: Problem, work: torch.dtype, rule: Callable) -> dict[str, torch.Tensor]:
    """All elements after all steps of `rule` in `work`'s own arithmetic; derived scalars are float32 as in
    `adamw.tracked_run`, and results are rounded to their tensors' dtypes after each step."""
    case, constant = problem.case, partial(torch.tensor, dtype=torch.float32)
    start = {role: adamw.flat(tensors) for role, tensors in problem.expected["start"].items()}
    p, m, v, vmax = (start[role].to(work) if role in start else None for role in adamw.WRITTEN)
    for k in range(0 if case.found_inf else case.steps):
        g = (adamw.flat(problem.expected["later_grads"][k - 1]) if k else start["grads"]).to(work)
        g = g if case.grad_scale is None else g / constant(case.grad_scale)
        g = -g if case.maximize else g
        new = rule(p, g, m, v, vmax, constant, **case.hyper(), step=case.first_step + k)
        p, m, v, vmax = (x if x is None else x.to(start[role].dtype).to(work) for role, x in zip(adamw.WRITTEN, new))
    return {role: x for role, x in zip(adamw.WRITTEN, (p, m, v, vmax)) if x is not None}


def late_correction(p, g, m, v, vmax, constant, *, lr, betas, eps, weight_decay, step):
    """bitsandbytes: m and v as weighted sums; step size and eps carry the bias correction of v."""
    beta1, beta2 = betas
    bias1, bias2_sqrt = 1 - beta1**step, math.sqrt(1 - beta2**step)
    m = m * constant(beta1) + constant(1 - beta1) * g
    v = v * constant(beta2) + constant(1 - beta2) * g * g
    vmax = None if vmax is None else vmax.maximum(v)
    p = p * constant(1 - lr * weight_decay)
    update = m / (square_root(v if vmax is None else vmax) + constant(eps * bias2_sqrt))
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
