"""Stochastic gradient descent as one fused call per step."""

from __future__ import annotations

from steepest import rules
from steepest.optim.base import FusedOptimizer, GroupRule
from steepest.optim.options import SHARED, of_rule, precision_defaults, shared_defaults


class SgdKind(GroupRule):
    """With momentum, its buffer."""

    name = "SGD"
    options = ("lr", "momentum", "dampening", "weight_decay", "nesterov", *SHARED)

    def rule(self, group: dict) -> rules.Rule:
        return rules.sgd(self.name, momentum=group["momentum"] != 0, nesterov=group["nesterov"], **of_rule(group))

    def keys(self, rule: rules.Rule) -> tuple[str, ...]:
        return ("momentum_buffer",)[: len(rule.states)]

    def numbers(self, where: str, group: dict) -> dict[str, float]:
        names = ("lr", "momentum", "dampening", "weight_decay", "l1")
        found = rules.numbers(where, **{name: group[name] for name in names})
        if group["nesterov"] and (found["momentum"] <= 0 or found["dampening"] != 0):
            raise ValueError(
                f"{where}: nesterov=True with momentum {found['momentum']} and dampening {found['dampening']}; "
                "Nesterov momentum requires a momentum and zero dampening"
            )
        return found

    def started(self, entry: dict) -> int:
        # torch.optim.SGD keeps no counter: a buffer says that the first step has been taken.
        return 0 if entry.get("momentum_buffer") is None else 1


class SGD(FusedOptimizer):
    """Drop-in for torch.optim.SGD: same arguments, param groups, LR schedulers and checkpoints, both ways.

    The rule, its rounding order, cost and source are those of `steepest.sgd_`; state per parameter: `step` (0-dim
    float32) and, with momentum, `momentum_buffer` in the parameter's dtype and layout.

    Args:
        params: parameters, (name, parameter) pairs, or param groups.
        lr, momentum, dampening, weight_decay, nesterov: as in torch.optim.SGD; lr may be a 0-dim CPU tensor.
        maximize, decoupled_weight_decay, cautious, l1, clip_value, max_grad_norm, foreach, fused, capturable,
        differentiable: see steepest.optim.options.

    Raises:
        ValueError, TypeError: wrong numbers, non-leaf parameters, sparse gradients, wrong shapes; before any change.
    """

    kind = SgdKind()

    def __init__(
        self, params, lr: float = 1e-3, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0,
        nesterov: bool = False, *, maximize: bool = False, foreach: bool | None = None, differentiable: bool = False,
        fused: bool | None = None, decoupled_weight_decay: bool = False, cautious: bool = False, l1: float = 0.0,
        clip_value: float | None = None, max_grad_norm: float | None = None, **precision,
    ):  # fmt: skip
        defaults = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov)
        defaults |= dict(foreach=foreach, fused=fused, differentiable=differentiable)
        defaults |= shared_defaults(maximize, cautious, l1, clip_value, decoupled_weight_decay)
        defaults |= precision_defaults(type(self).__name__, precision)
        super().__init__(params, defaults, max_grad_norm=max_grad_norm)
