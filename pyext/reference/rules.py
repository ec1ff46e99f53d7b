"""The elementwise rules besides AdamW in plain PyTorch: SGD, Adagrad, RMSprop, Adam, Lion; and the stages around them.

A rule is two functions: `scalars`, the numbers that a step derives from its hyper-parameters in float64, and
`element`, the rule itself.  `element` is written with operators only, so that it runs on float32 tensors (then it
equals the C++ and CUDA kernels bit for bit), on float64 tensors (the exact answer, for practical purposes) and on the
running-error numbers of steepest.conformance.bounds (the error bound).  Operation orders are those of torch.optim's
for-loops.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Callable

import torch

from . import adamw
from .adamw import square_root

Numbers = SimpleNamespace


def lerp(start, end, weight):
    """torch's lerp: the form that is exact at its own end of [0, 1]."""
    toward = end - start
    return start + weight * toward if weight < 0.5 else end - toward * (1 - weight)


def sign(x):
    """-1, 0 or 1; NaN stays (torch.sign would make it 0)."""
    if not isinstance(x, torch.Tensor):
        return x.sign()
    return torch.where(x > 0, 1.0, torch.where(x < 0, -1.0, x)).to(x.dtype)


def sgd_scalars(*, lr, momentum=0.0, dampening=0.0, nesterov=False, step, **_) -> dict[str, Any]:
    first = step == 1
    return {
        "carry": 0.0 if first else momentum, "take": 1.0 if first else 1 - dampening, "momentum": momentum,
        "nesterov": nesterov, "negative_lr": -lr,
    }  # fmt: skip


def sgd_element(p, g, states, s: Numbers):
    if states:
        (buffer,) = states
        buffer = buffer * s.carry + s.take * g
        g = g + s.momentum * buffer if s.nesterov else buffer
        states = [buffer]
    return p + s.negative_lr * g, states


def adagrad_scalars(*, lr, lr_decay=0.0, eps=1e-10, step, **_) -> dict[str, Any]:
    return {"negative_lr": -(lr / (1 + (step - 1) * lr_decay)), "eps": eps}


def adagrad_element(p, g, states, s: Numbers):
    total = states[0] + g * g
    return p + (s.negative_lr * g) / (square_root(total) + s.eps), [total]


def rmsprop_scalars(*, lr, alpha=0.99, eps=1e-8, momentum=0.0, centered=False, **_) -> dict[str, Any]:
    return {
        "alpha": alpha, "rest": 1 - alpha, "eps": eps, "momentum": momentum, "negative_lr": -lr, "centered": centered,
    }  # fmt: skip


def rmsprop_element(p, g, states, s: Numbers):
    square, *others = states
    second = square = square * s.alpha + (s.rest * g) * g
    new = [square]
    if s.centered:
        mean, *others = others
        mean = lerp(mean, g, s.rest)
        new.append(mean)
        second = square - mean * mean
    denominator = square_root(second) + s.eps
    if not others:
        return p + (s.negative_lr * g) / denominator, new
    buffer = others[0] * s.momentum + g / denominator
    return p + s.negative_lr * buffer, [*new, buffer]


def adam_scalars(*, lr, betas=(0.9, 0.999), eps=1e-8, step, **_) -> dict[str, Any]:
    return vars(adamw.scalars(lr=lr, betas=betas, eps=eps, weight_decay=0.0, step=step))


def adam_element(p, g, states, s: Numbers):
    m, v, *rest = states
    p, m, v, vmax = adamw.element(p, g, m, v, rest[0] if rest else None, s)
    return p, [m, v, *([vmax] if rest else [])]


def lion_scalars(*, lr, betas=(0.9, 0.99), **_) -> dict[str, Any]:
    beta1, beta2 = betas
    return {"beta1": beta1, "rest1": 1 - beta1, "beta2": beta2, "rest2": 1 - beta2, "negative_lr": -lr}


def lion_element(p, g, states, s: Numbers):
    (m,) = states
    p = p + s.negative_lr * sign(m * s.beta1 + s.rest1 * g)
    return p, [m * s.beta2 + s.rest2 * g]


def sign_scalars(*, lr, **_) -> dict[str, Any]:
    return {"negative_lr": -lr}


def sign_element(p, g, states, s: Numbers):
    return p + s.negative_lr * sign(g), states


RULES: dict[str, tuple[Callable, Callable]] = {
    "sgd": (sgd_scalars, sgd_element),
    "adagrad": (adagrad_scalars, adagrad_element),
    "rmsprop": (rmsprop_scalars, rmsprop_element),
    "adam": (adam_scalars, adam_element),
    "lion": (lion_scalars, lion_element),
    "sign": (sign_scalars, sign_element),
}


def prepared_gradient(g, *, grad_scale=None, clip_coefficient=None, clip_value=None, maximize=False):
    """g / grad_scale * clip_coefficient, clamped to +-clip_value, negated to ascend."""
    g = g if grad_scale is None else g / grad_scale
    g = g if clip_coefficient is None else g * clip_coefficient
    g = g if clip_value is None else g.clamp(-clip_value, clip_value)
    return -g if maximize else g


def stepped(rule: str, p, g, states, constant, *, decoupled=False, weight_decay=0.0, **hyper):
    """Decay and rule, for one element or many: the new (p, states).  Derived scalars are constant(number)."""
    scalars, element = RULES[rule]
    found = scalars(**hyper)
    s = Numbers(**{name: x if isinstance(x, bool) else constant(x) for name, x in found.items()})
    if not decoupled and weight_decay:
        g = g + constant(weight_decay) * p
    p = p * constant(1 - hyper["lr"] * weight_decay if decoupled else 1.0)
    return element(p, g, states, s)


def shrunk(p, before, constant, *, lr, weight_decay=0.0, cautious=False, l1=0.0):
    """Cautious decay where the step went towards zero, and the soft threshold of l1 decay; tensors only."""
    if cautious and weight_decay:
        move = p - before
        towards = ((move <= 0) & (before >= 0)) | ((move >= 0) & (before <= 0))
        p = torch.where(towards, p - constant(lr * weight_decay) * before, p)
    if l1:
        threshold = constant(lr * l1)
        p = torch.where(p > threshold, p - threshold, torch.where(p < -threshold, p + threshold, p * 0))
    return p


@torch.no_grad()
def step_lists(
    op: str, rule: str, params, grads, state_lists, *, step, grad_scale=None, clip_coefficient=None, clip_value=None,
    found_inf=None, maximize=False, cautious=False, l1=0.0, weight_decay=0.0, decoupled=False, **hyper,
) -> None:  # fmt: skip
    """One step of `rule` over lists of tensors, in place; any shapes and layouts, equal within a row.

    float64 parameters are stepped in float64, all others in float32; each result is rounded once, to nearest even, to
    its tensor's dtype.  `step` counts from 1: one number, or one per tensor.
    """
    for name, tensors in {"grads": grads, **{f"state list {i}": x for i, x in enumerate(state_lists)}}.items():
        if len(tensors) != len(params):
            raise ValueError(f"{op}: {name} has {len(tensors)} tensors, params has {len(params)}")
    if found_inf is not None and bool(found_inf != 0):
        return
    steps = step if isinstance(step, (list, tuple)) else [step] * len(params)
    for i, p in enumerate(params):
        work = torch.promote_types(p.dtype, torch.float32)

        # Zero-dimensional tensors, not Python numbers: CUDA divides by a Python number through its reciprocal.
        def constant(value, work=work, device=p.device):
            return torch.tensor(value, dtype=work, device=device)

        scale, coefficient = (None if x is None else x.to(work).reshape(()) for x in (grad_scale, clip_coefficient))
        limit = None if clip_value is None else float(constant(clip_value))
        g = prepared_gradient(
            grads[i].to(work), grad_scale=scale, clip_coefficient=coefficient, clip_value=limit, maximize=maximize
        )
        decay = dict(weight_decay=weight_decay, lr=hyper["lr"])
        before = p.to(work)
        states = [x[i].to(work) for x in state_lists]
        early = decoupled and not cautious
        new, new_states = stepped(
            rule, before, g, states, constant, step=steps[i], decoupled=decoupled,
            **{**hyper, **decay, "weight_decay": 0.0 if decoupled and not early else weight_decay},
        )  # fmt: skip
        p.copy_(shrunk(new, before, constant, cautious=cautious, l1=l1, **decay))
        for old, value in zip((x[i] for x in state_lists), new_states):
            old.copy_(value)


def sgd_(params, grads, momentum_buffers=None, **options) -> None:
    """See steepest.sgd_: the same arguments, in plain PyTorch."""
    step_lists("sgd_", "sgd", params, grads, [momentum_buffers] if momentum_buffers is not None else [], **options)


def adagrad_(params, grads, state_sums, **options) -> None:
    """See steepest.adagrad_: the same arguments, in plain PyTorch."""
    step_lists("adagrad_", "adagrad", params, grads, [state_sums], **options)


def rmsprop_(params, grads, square_avgs, *, grad_avgs=None, momentum_buffers=None, step=1, **options) -> None:
    """See steepest.rmsprop_: the same arguments, in plain PyTorch."""
    states = [role for role in (square_avgs, grad_avgs, momentum_buffers) if role is not None]
    centered = grad_avgs is not None
    step_lists("rmsprop_", "rmsprop", params, grads, states, step=step, centered=centered, **options)


def adam_(params, grads, exp_avgs, exp_avg_sqs, *, max_exp_avg_sqs=None, **options) -> None:
    """See steepest.adam_: the same arguments, in plain PyTorch."""
    states = [exp_avgs, exp_avg_sqs] + ([] if max_exp_avg_sqs is None else [max_exp_avg_sqs])
    step_lists("adam_", "adam", params, grads, states, **options)


def lion_(params, grads, exp_avgs, *, step=1, decoupled=True, **options) -> None:
    """See steepest.lion_: the same arguments, in plain PyTorch."""
    step_lists("lion_", "lion", params, grads, [exp_avgs], step=step, decoupled=decoupled, **options)


def sign_(params, grads, *, step=1, decoupled=True, **options) -> None:
    """See steepest.sign_: the same arguments, in plain PyTorch."""
    step_lists("sign_", "sign", params, grads, [], step=step, decoupled=decoupled, **options)
