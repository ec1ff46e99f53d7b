"""Adagrad as one fused call per step."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest import check, rules
from steepest.optim.base import FusedOptimizer, GroupRule
from steepest.optim.options import SHARED, of_rule, precision_defaults, shared_defaults


class AdagradKind(GroupRule):
    """The sum of squared gradients."""

    name = "Adagrad"
    options = ("lr", "lr_decay", "eps", "weight_decay", "initial_accumulator_value", *SHARED)

    def rule(self, group: dict) -> rules.Rule:
        return rules.adagrad(self.name, **of_rule(group))

    def keys(self, rule: rules.Rule) -> tuple[str, ...]:
        return ("sum",)

    def numbers(self, where: str, group: dict) -> dict[str, float]:
        check.number(where, "initial_accumulator_value", group["initial_accumulator_value"], 0)
        return rules.numbers(where, **{name: group[name] for name in ("lr", "lr_decay", "eps", "weight_decay", "l1")})

    def initial(self, key: str, p: Tensor, group: dict) -> Tensor:
        value = group["initial_accumulator_value"]
        return torch.full_like(p, value, memory_format=torch.preserve_format, requires_grad=False)


class Adagrad(FusedOptimizer):
    """Drop-in for torch.optim.Adagrad: same arguments, param groups, LR schedulers and checkpoints, both ways.

    The rule, its rounding order, cost and source are those of `steepest.adagrad_`; state per parameter: `step` (0-dim
    float32) and `sum` in the parameter's dtype and layout, made in the first step (torch makes them at construction).
    Sparse gradients are refused.

    Args:
        params: parameters, (name, parameter) pairs, or param groups.
        lr, lr_decay, weight_decay, initial_accumulator_value, eps: as in torch.optim.Adagrad.
        maximize, decoupled_weight_decay, cautious, l1, clip_value, max_grad_norm, foreach, fused, capturable,
        differentiable: see steepest.optim.options.

    Raises:
        ValueError, TypeError: wrong numbers, non-leaf parameters, sparse gradients, wrong shapes; before any change.
    """

    kind = AdagradKind()

    def __init__(
        self, params, lr: float = 1e-2, lr_decay: float = 0.0, weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0, eps: float = 1e-10, foreach: bool | None = None, *,
        maximize: bool = False, differentiable: bool = False, fused: bool | None = None,
        decoupled_weight_decay: bool = False, cautious: bool = False, l1: float = 0.0,
        clip_value: float | None = None, max_grad_norm: float | None = None, **precision,
    ):  # fmt: skip
        defaults = dict(
            lr=lr, lr_decay=lr_decay, eps=eps, weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
        )  # fmt: skip
        defaults |= dict(foreach=foreach, fused=fused, differentiable=differentiable)
        defaults |= shared_defaults(maximize, cautious, l1, clip_value, decoupled_weight_decay)
        defaults |= precision_defaults(type(self).__name__, precision)
        super().__init__(params, defaults, max_grad_norm=max_grad_norm)
