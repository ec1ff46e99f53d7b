"""Elementwise optimizer steps over lists of tensors, in place, one call for any number of tensors.

All of them share what follows; the docstring of each gives its rule.

Lists have equal length; row i (params[i], grads[i], states...) has one shape and one device. Any shape, 0-dim and
empty too. dtypes float32, bfloat16, float16, freely mixed (all states of a row alike). Arithmetic is float32; each
result is rounded once to its tensor's dtype; derived scalars are computed in float64 and rounded once. Rows in one
dense layout (contiguous, transposed, channels_last, ...) are worked on in place; other rows are copied in and out,
which costs extra but is right. Before the rule, in this order::

    g = grad / grad_scale * clip_coefficient        (then -g if maximize)
    g = clamp(g, -clip_value, clip_value)
    g = g + weight_decay p                          (L2 decay)  or  p = p (1 - lr weight_decay)  (decoupled decay)

and after it, with p_old the parameter before the step::

    p = p - lr weight_decay p_old                   (cautious: instead of the above, where the step went towards 0)
    p = sign(p) max(|p| - lr l1, 0)                 (decoupled l1 decay, which gives exact zeros)

Arguments that all share:
    step: number t of this step, the first being 1; or one number per tensor.
    grad_scale, clip_coefficient: one-element float32 tensors on the parameters' device.
    found_inf: one-element float32 tensor; nothing changes when it is not 0.
    backend: "auto" (by device), "cpu", "cuda" or "triton" (AdamW without clipping or cautious decay).
    **kept: masters, correction bits, 8-bit states, averages, noise, rounding at random: see steepest.storage.

All raise ValueError or TypeError for wrong lengths, shapes, devices, dtypes, numbers, for sparse, aliased or non-leaf
tensors, and NotImplementedError where a build or backend has no kernel; before anything is changed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from steepest import rules
from steepest.engine import Call, step_lists

List = Sequence[Tensor]


def adamw_(
    params: List, grads: List, exp_avgs: List, exp_avg_sqs: List, *, lr: float,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2,
    step: int | Sequence[int], max_exp_avg_sqs: List | None = None, maximize: bool = False, cautious: bool = False,
    l1: float = 0.0, clip_value: float | None = None, grad_scale: Tensor | None = None,
    clip_coefficient: Tensor | None = None, found_inf: Tensor | None = None, backend: str = "auto", **kept,
) -> None:  # fmt: skip
    """One AdamW step, in place: params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs; grads are only read.

    In float32 and in this order, with c = sqrt(1 - beta2^t)::

        p = p (1 - lr weight_decay)
        m = m + (1 - beta1) (g - m)
        v = v beta2 + ((1 - beta2) g) g             (AMSGrad: vmax = max(vmax, v) stands for v below)
        p = p + (-lr c / (1 - beta1^t) m) / (sqrt(v) + c eps)

    torch.optim.AdamW's for-loop has sqrt(v) / c + eps instead: a quotient and a rounding more per element.

    Other arguments and errors: see the module.  Cost: 28 bytes per float32 element (4 reads, 3 writes); 36 with
    AMSGrad; 14 with 16-bit tensors throughout.  Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization",
    2019; Reddi et al. 2018 for AMSGrad.
    """
    op = "adamw_"
    rule = rules.adam(
        op, amsgrad=max_exp_avg_sqs is not None, decoupled=True, maximize=maximize, cautious=cautious,
        clip_value=clip_value,
    )  # fmt: skip
    values = rules.numbers(op, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, l1=l1)
    lists = [params, grads, exp_avgs, exp_avg_sqs] + ([] if max_exp_avg_sqs is None else [max_exp_avg_sqs])
    step_lists(op, Call(rule, grad_scale, clip_coefficient, found_inf), lists, values, step, backend, kept)


def adam_(
    params: List, grads: List, exp_avgs: List, exp_avg_sqs: List, *, lr: float,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
    step: int | Sequence[int], max_exp_avg_sqs: List | None = None, maximize: bool = False, l1: float = 0.0,
    clip_value: float | None = None, grad_scale: Tensor | None = None, clip_coefficient: Tensor | None = None,
    found_inf: Tensor | None = None, backend: str = "auto", **kept,
) -> None:  # fmt: skip
    """One Adam step with L2 decay, in place: adamw_ with g = g + weight_decay p in the place of its decay.

    Other arguments and errors: see the module.  Cost as adamw_.
    Source: Kingma & Ba, "Adam: A Method for Stochastic Optimization", 2015.
    """
    op = "adam_"
    rule = rules.adam(op, amsgrad=max_exp_avg_sqs is not None, maximize=maximize, clip_value=clip_value)
    values = rules.numbers(op, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, l1=l1)
    lists = [params, grads, exp_avgs, exp_avg_sqs] + ([] if max_exp_avg_sqs is None else [max_exp_avg_sqs])
    step_lists(op, Call(rule, grad_scale, clip_coefficient, found_inf), lists, values, step, backend, kept)


def sgd_(
    params: List, grads: List, momentum_buffers: List | None = None, *, lr: float, momentum: float = 0.0,
    dampening: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False, step: int | Sequence[int],
    maximize: bool = False, decoupled: bool = False, cautious: bool = False, l1: float = 0.0,
    clip_value: float | None = None, grad_scale: Tensor | None = None, clip_coefficient: Tensor | None = None,
    found_inf: Tensor | None = None, backend: str = "auto", **kept,
) -> None:  # fmt: skip
    """One step of stochastic gradient descent, in place: params and momentum_buffers; grads are only read.

    In float32 and in this order, which is that of torch.optim.SGD's for-loop::

        b = b momentum + (1 - dampening) g          (b = g in step 1; without momentum_buffers b stands for g)
        g = g + momentum b  if nesterov else  b
        p = p + (-lr) g

    Other arguments and errors: see the module.  Cost: 20 bytes per float32 element with momentum (3 reads, 2 writes),
    12 without.  Source: Polyak 1964; Nesterov's form as in Sutskever et al. 2013.
    """
    op = "sgd_"
    if momentum_buffers is None and (momentum or nesterov):
        raise ValueError(f"{op}: momentum is {momentum}, nesterov {nesterov}; expected momentum_buffers with them")
    rule = rules.sgd(
        op, momentum=momentum_buffers is not None, nesterov=nesterov, decoupled=decoupled, maximize=maximize,
        cautious=cautious, clip_value=clip_value,
    )  # fmt: skip
    values = rules.numbers(op, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, l1=l1)
    lists = [params, grads] + ([] if momentum_buffers is None else [momentum_buffers])
    step_lists(op, Call(rule, grad_scale, clip_coefficient, found_inf), lists, values, step, backend, kept)


def adagrad_(
    params: List, grads: List, state_sums: List, *, lr: float, lr_decay: float = 0.0, eps: float = 1e-10,
    weight_decay: float = 0.0, step: int | Sequence[int], maximize: bool = False, decoupled: bool = False,
    cautious: bool = False, l1: float = 0.0, clip_value: float | None = None, grad_scale: Tensor | None = None,
    clip_coefficient: Tensor | None = None, found_inf: Tensor | None = None, backend: str = "auto", **kept,
) -> None:  # fmt: skip
    """One Adagrad step, in place: params and state_sums; grads are only read.

    In float32 and in this order, which is that of torch.optim.Adagrad's for-loop::

        s = s + g g
        p = p + (-lr / (1 + (t - 1) lr_decay) g) / (sqrt(s) + eps)

    Other arguments and errors: see the module.  Cost: 20 bytes per float32 element (3 reads, 2 writes).
    Source: Duchi, Hazan & Singer, "Adaptive Subgradient Methods", 2011.
    """
    op = "adagrad_"
    rule = rules.adagrad(op, decoupled=decoupled, maximize=maximize, cautious=cautious, clip_value=clip_value)
    values = rules.numbers(op, lr=lr, lr_decay=lr_decay, eps=eps, weight_decay=weight_decay, l1=l1)
    call = Call(rule, grad_scale, clip_coefficient, found_inf)
    step_lists(op, call, [params, grads, state_sums], values, step, backend, kept)


def rmsprop_(
    params: List, grads: List, square_avgs: List, *, lr: float, alpha: float = 0.99, eps: float = 1e-8,
    weight_decay: float = 0.0, momentum: float = 0.0, step: int | Sequence[int] = 1, grad_avgs: List | None = None,
    momentum_buffers: List | None = None, maximize: bool = False, decoupled: bool = False, cautious: bool = False,
    l1: float = 0.0, clip_value: float | None = None, grad_scale: Tensor | None = None,
    clip_coefficient: Tensor | None = None, found_inf: Tensor | None = None, backend: str = "auto", **kept,
) -> None:  # fmt: skip
    """One RMSprop step, in place: params, square_avgs, grad_avgs (centered), momentum_buffers; grads are only read.

    In float32 and in this order, which is that of torch.optim.RMSprop's for-loop::

        v = v alpha + ((1 - alpha) g) g
        a = a + (1 - alpha) (g - a)                 (centered: v - a a stands for v below)
        d = sqrt(v) + eps
        b = b momentum + g / d;  p = p + (-lr) b    (with momentum_buffers)
        p = p + (-lr g) / d                         (without)

    Other arguments and errors: see the module; the rule does not use `step`.  Cost: 20 bytes per float32 element, 8
    more with each further state.  Source: Tieleman & Hinton 2012; centered: Graves 2013.
    """
    op = "rmsprop_"
    if momentum_buffers is None and momentum:
        raise ValueError(f"{op}: momentum is {momentum}, expected momentum_buffers with it")
    rule = rules.rmsprop(
        op, centered=grad_avgs is not None, momentum=momentum_buffers is not None, decoupled=decoupled,
        maximize=maximize, cautious=cautious, clip_value=clip_value,
    )  # fmt: skip
    values = rules.numbers(op, lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum, l1=l1)
    lists = [params, grads, *(role for role in (square_avgs, grad_avgs, momentum_buffers) if role is not None)]
    step_lists(op, Call(rule, grad_scale, clip_coefficient, found_inf), lists, values, step, backend, kept)


def lion_(
    params: List, grads: List, exp_avgs: List, *, lr: float, betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0, step: int | Sequence[int] = 1, maximize: bool = False, decoupled: bool = True,
    cautious: bool = False, l1: float = 0.0, clip_value: float | None = None, grad_scale: Tensor | None = None,
    clip_coefficient: Tensor | None = None, found_inf: Tensor | None = None, backend: str = "auto", **kept,
) -> None:  # fmt: skip
    """One Lion step, in place: params and exp_avgs; grads are only read.

    In float32 and in this order::

        p = p (1 - lr weight_decay)
        p = p + (-lr) sign(m beta1 + (1 - beta1) g)
        m = m beta2 + (1 - beta2) g

    Other arguments and errors: see the module; the rule does not use `step`.  Cost: 20 bytes per float32 element.
    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023.
    """
    op = "lion_"
    rule = rules.lion(op, decoupled=decoupled, maximize=maximize, cautious=cautious, clip_value=clip_value)
    values = rules.numbers(op, lr=lr, betas=betas, weight_decay=weight_decay, l1=l1)
    step_lists(
        op, Call(rule, grad_scale, clip_coefficient, found_inf), [params, grads, exp_avgs], values, step, backend, kept
    )


def sign_(
    params: List, grads: List, *, lr: float, weight_decay: float = 0.0, step: int | Sequence[int] = 1,
    maximize: bool = False, decoupled: bool = True, cautious: bool = False, l1: float = 0.0,
    clip_value: float | None = None, grad_scale: Tensor | None = None, clip_coefficient: Tensor | None = None,
    found_inf: Tensor | None = None, backend: str = "auto", **kept,
) -> None:  # fmt: skip
    """One step of sign descent, in place: params; grads are only read.

    In float32 and in this order::

        p = p (1 - lr weight_decay)
        p = p + (-lr) sign(g)

    Other arguments and errors: see the module; the rule does not use `step`.  Cost: 12 bytes per float32 element.
    Source: steepest descent in the max norm; Bernstein et al. 2018 (signSGD).
    """
    op = "sign_"
    rule = rules.sign(op, decoupled=decoupled, maximize=maximize, cautious=cautious, clip_value=clip_value)
    values = rules.numbers(op, lr=lr, weight_decay=weight_decay, l1=l1)
    step_lists(op, Call(rule, grad_scale, clip_coefficient, found_inf), [params, grads], values, step, backend, kept)
