"""RMSprop as one fused call per step."""

from __future__ import annotations

from steepest import rules
from steepest.optim.base import FusedOptimizer, GroupRule
from steepest.optim.options import SHARED, of_rule, precision_defaults, shared_defaults


class RmspropKind(GroupRule):
    """The mean squared gradient; centered, the mean gradient; with momentum, its buffer."""

    name = "RMSprop"
    options = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", *SHARED)

    def rule(self, group: dict) -> rules.Rule:
        return rules.rmsprop(self.name, centered=group["centered"], momentum=group["momentum"] > 0, **of_rule(group))

    def keys(self, rule: rules.Rule) -> tuple[str, ...]:
        names = {"square_avgs": "square_avg", "grad_avgs": "grad_avg", "momentum_buffers": "momentum_buffer"}
        return tuple(names[state] for state in rule.states)

    def numbers(self, where: str, group: dict) -> dict[str, float]:
        names = ("lr", "alpha", "eps", "weight_decay", "momentum", "l1")
        return rules.numbers(where, **{name: group[name] for name in names})


class RMSprop(FusedOptimizer):
    """Drop-in for torch.optim.RMSprop: same arguments, param groups, LR schedulers and checkpoints, both ways.

    The rule, its rounding order, cost and source are those of `steepest.rmsprop_`; state per parameter: `step` (0-dim
    float32), `square_avg`, centered also `grad_avg`, with momentum also `momentum_buffer`.

    Args:
        params: parameters, (name, parameter) pairs, or param groups.
        lr, alpha, eps, weight_decay, momentum, centered: as in torch.optim.RMSprop; lr may be a 0-dim CPU tensor.
        maximize, decoupled_weight_decay, cautious, l1, clip_value, max_grad_norm, foreach, capturable, differentiable:
            see steepest.optim.options.

    Raises:
        ValueError, TypeError: wrong numbers, non-leaf parameters, sparse gradients, wrong shapes; before any change.
    """

    kind = RmspropKind()

    def __init__(
        self, params, lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-8, weight_decay: float = 0.0,
        momentum: float = 0.0, centered: bool = False, capturable: bool = False, foreach: bool | None = None,
        maximize: bool = False, differentiable: bool = False, *, decoupled_weight_decay: bool = False,
        cautious: bool = False, l1: float = 0.0, clip_value: float | None = None, max_grad_norm: float | None = None,
        **precision,
    ):  # fmt: skip
        defaults = dict(lr=lr, momentum=momentum, alpha=alpha, eps=eps, centered=centered, weight_decay=weight_decay)
        defaults |= dict(foreach=foreach, capturable=capturable, differentiable=differentiable)
        defaults |= shared_defaults(maximize, cautious, l1, clip_value, decoupled_weight_decay)
        defaults |= precision_defaults(type(self).__name__, precision)
        super().__init__(params, defaults, max_grad_norm=max_grad_norm)
