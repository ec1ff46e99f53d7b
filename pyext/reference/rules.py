"""The elementwise rules in plain PyTorch: SGD, Adagrad, RMSprop, Adam, AdamW, Lion; and the stages around them.

A rule is two functions: `scalars`, the numbers that a step derives from its hyper-parameters in float64, and
`element`, the rule itself.  `element` is written with operators only, so that it runs on float32 tensors (then it
equals the C++ and CUDA kernels bit for bit), on float64 tensors (the exact answer, for practical purposes) and on the
running-error numbers of steepest.conformance.bounds (the error bound).  Operation orders are those of torch.optim's
for-loops.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, Callable

import torch

from . import adamw, storage
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


# Which states are never negative, in their order.
MAGNITUDES: dict[str, tuple[bool, ...]] = {
    "sgd": (False,),
    "adagrad": (True,),
    "rmsprop": (True, False, False),
    "adam": (False, True, True),
    "lion": (False,),
    "sign": (),
}
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


@dataclass
class Row:
    """One tensor's lists and how they are kept: see steepest.storage.  Opens them as numbers and puts numbers back."""

    param: torch.Tensor
    states: list[torch.Tensor]
    master: torch.Tensor | None
    residual: torch.Tensor | None
    source: torch.Tensor | None
    average: torch.Tensor | None
    exponents: list[torch.Tensor] | None
    magnitudes: tuple[bool, ...]  # which states are never negative
    stochastic: bool
    work: torch.dtype

    def __post_init__(self):
        self.index = storage.memory_index(self.param)

    def read(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The parameter and its states in the working precision."""
        p = self.param if self.source is None else self.source
        if self.master is not None:
            p = self.master
        elif self.residual is not None:
            p = storage.join(p, self.residual)
        if self.exponents is None:
            return p.to(self.work), [x.to(self.work) for x in self.states]
        triples = zip(self.states, self.exponents, self.magnitudes)
        return p.to(self.work), [storage.block8_decode(x, e, self.index, magnitude) for x, e, magnitude in triples]

    def write(self, p, states, words) -> None:
        """`words`: the pair of random words of each element; the parameter takes the first 16 bits, states the next."""
        lanes = [word >> shift for word in words for shift in (0, 16)] if words else [None] * 4
        if self.master is not None:
            self.master.copy_(p)
            self.param.copy_(p)
        elif self.residual is not None:
            high, residual = storage.split(p, self.residual.dtype)
            self.param.copy_(high)
            self.residual.copy_(residual)
        else:
            self._store(self.param, p, lanes[0])
        for k, (old, new) in enumerate(zip(self.states, states)):
            if self.exponents is None:
                self._store(old, new, lanes[k + 1])
                continue
            magnitude = self.magnitudes[k]
            self.exponents[k].copy_(storage.block8_exponents(new, self.index, magnitude))
            old.copy_(storage.block8_encode(new, self.exponents[k], self.index, magnitude, lanes[k + 1]))

    def _store(self, to, value, random16) -> None:
        if self.stochastic and to.dtype == torch.bfloat16:
            value = storage.round_stochastic(value, random16)
        to.copy_(value)


@torch.no_grad()
def step_lists(
    op: str, rule: str, params, grads, state_lists, *, step, grad_scale=None, clip_coefficient=None, clip_value=None,
    found_inf=None, maximize=False, cautious=False, l1=0.0, weight_decay=0.0, decoupled=False, masters=None,
    residuals=None, sources=None, averages=None, average_decay=None, state_exponents=None, stochastic_rounding=False,
    gradient_noise=None, seed=0, first_index=None, **hyper,
) -> None:  # fmt: skip
    """One step of `rule` over lists of tensors, in place; any shapes and layouts, equal within a row.

    float64 parameters are stepped in float64, all others in float32; each result is rounded once, to nearest even, to
    its tensor's dtype.  `step` counts from 1: one number, or one per tensor.  From `masters` on: see steepest.storage.
    """
    for name, tensors in {"grads": grads, **state_lists}.items():
        if len(tensors) != len(params):
            raise ValueError(f"{op}: {name} has {len(tensors)} tensors, params has {len(params)}")
    if found_inf is not None and bool(found_inf != 0):
        return
    state_lists = list(state_lists.values())
    steps = step if isinstance(step, (list, tuple)) else [step] * len(params)
    if first_index is None:
        first_index = [0, *accumulate(p.numel() for p in params)][: len(params)]
    for i, p in enumerate(params):
        work = torch.promote_types(p.dtype, torch.float32)

        def at(role, i=i):
            return None if role is None else role[i]

        row = Row(
            p, [x[i] for x in state_lists], at(masters), at(residuals), at(sources), at(averages),
            None if state_exponents is None else [x[i] for x in state_exponents], MAGNITUDES[rule],
            stochastic_rounding, work,
        )  # fmt: skip

        # Zero-dimensional tensors, not Python numbers: CUDA divides by a Python number through its reciprocal.
        def constant(value, work=work, device=p.device):
            return torch.tensor(value, dtype=work, device=device)

        scale, coefficient = (None if x is None else x.to(work).reshape(()) for x in (grad_scale, clip_coefficient))
        limit = None if clip_value is None else float(constant(clip_value))
        g = prepared_gradient(
            grads[i].to(work), grad_scale=scale, clip_coefficient=coefficient, clip_value=limit, maximize=maximize
        )

        def words(purpose, row=row, first=first_index[i], step=steps[i]):
            return storage.random_words(row.index + first, seed=seed, step=step, purpose=purpose)

        if gradient_noise is not None:
            deviation = storage.noise_deviation(*gradient_noise, steps[i])
            g = g + constant(deviation) * storage.normal(words(storage.NOISE)[0]).to(work)
        decay = dict(weight_decay=weight_decay, lr=hyper["lr"])
        before, states = row.read()
        early = decoupled and not cautious
        new, new_states = stepped(
            rule, before, g, states, constant, step=steps[i], decoupled=decoupled,
            **{**hyper, **decay, "weight_decay": 0.0 if decoupled and not early else weight_decay},
        )  # fmt: skip
        new = shrunk(new, before, constant, cautious=cautious, l1=l1, **decay)
        if row.average is not None:
            row.average.copy_(lerp(row.average.to(work), new, constant(1 - average_decay)))
        draws = stochastic_rounding or state_exponents is not None
        row.write(new, new_states, words(storage.ROUNDING) if draws else None)


def _given(**lists) -> dict:
    return {name: tensors for name, tensors in lists.items() if tensors is not None}


def sgd_(params, grads, momentum_buffers=None, **options) -> None:
    """See steepest.sgd_: the same arguments, in plain PyTorch."""
    step_lists("sgd_", "sgd", params, grads, _given(momentum_buffers=momentum_buffers), **options)


def adagrad_(params, grads, state_sums, **options) -> None:
    """See steepest.adagrad_: the same arguments, in plain PyTorch."""
    step_lists("adagrad_", "adagrad", params, grads, _given(state_sums=state_sums), **options)


def rmsprop_(params, grads, square_avgs, *, grad_avgs=None, momentum_buffers=None, step=1, **options) -> None:
    """See steepest.rmsprop_: the same arguments, in plain PyTorch."""
    states = _given(square_avgs=square_avgs, grad_avgs=grad_avgs, momentum_buffers=momentum_buffers)
    centered = grad_avgs is not None
    step_lists("rmsprop_", "rmsprop", params, grads, states, step=step, centered=centered, **options)


def adam_(params, grads, exp_avgs, exp_avg_sqs, *, max_exp_avg_sqs=None, **options) -> None:
    """See steepest.adam_: the same arguments, in plain PyTorch."""
    states = _given(exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, max_exp_avg_sqs=max_exp_avg_sqs)
    step_lists("adam_", "adam", params, grads, states, **options)


def adamw_(params, grads, exp_avgs, exp_avg_sqs, *, max_exp_avg_sqs=None, weight_decay=1e-2, **options) -> None:
    """See steepest.adamw_: the same arguments, in plain PyTorch."""
    states = _given(exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, max_exp_avg_sqs=max_exp_avg_sqs)
    step_lists("adamw_", "adam", params, grads, states, weight_decay=weight_decay, decoupled=True, **options)


def lion_(params, grads, exp_avgs, *, step=1, decoupled=True, **options) -> None:
    """See steepest.lion_: the same arguments, in plain PyTorch."""
    step_lists("lion_", "lion", params, grads, _given(exp_avgs=exp_avgs), step=step, decoupled=decoupled, **options)


def sign_(params, grads, *, step=1, decoupled=True, **options) -> None:
    """See steepest.sign_: the same arguments, in plain PyTorch."""
    step_lists("sign_", "sign", params, grads, {}, step=step, decoupled=decoupled, **options)
