"""Lion as one fused call per step."""

from __future__ import annotations

from steepest import rules
from steepest.optim.base import FusedOptimizer, GroupRule
from steepest.optim.options import SHARED, of_rule, precision_defaults, shared_defaults


class LionKind(GroupRule):
    """The mean gradient."""

    name = "Lion"
    options = ("lr", "betas", "weight_decay", *SHARED)

    def rule(self, group: dict) -> rules.Rule:
        return rules.lion(self.name, **of_rule(group))

    def keys(self, rule: rules.Rule) -> tuple[str, ...]:
        return ("exp_avg",)

    def numbers(self, where: str, group: dict) -> dict[str, float]:
        return rules.numbers(where, **{name: group[name] for name in ("lr", "betas", "weight_decay", "l1")})


class Lion(FusedOptimizer):
    """Lion (Chen et al. 2023): every weight moves by lr, in the direction of the sign of a mixed mean gradient.

    The rule, its rounding order, cost and source are those of `steepest.lion_`; state per parameter: `step` (0-dim
    float32) and `exp_avg` in the parameter's dtype and layout.

    Args:
        params: parameters, (name, parameter) pairs, or param groups.
        lr, betas, weight_decay: as in the paper; decay is decoupled unless decoupled_weight_decay=False.
        maximize, decoupled_weight_decay, cautious, l1, clip_value, max_grad_norm, foreach, capturable: see
            steepest.optim.options.

    Raises:
        ValueError, TypeError: wrong numbers, non-leaf parameters, sparse gradients, wrong shapes; before any change.
    """

    kind = LionKind()

    def __init__(
        self, params, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0, *,
        maximize: bool = False, foreach: bool | None = None, decoupled_weight_decay: bool = True,
        cautious: bool = False, l1: float = 0.0, clip_value: float | None = None, max_grad_norm: float | None = None,
        **precision,
    ):  # fmt: skip
        defaults = dict(lr=lr, betas=betas, weight_decay=weight_decay, foreach=foreach)
        defaults |= shared_defaults(maximize, cautious, l1, clip_value, decoupled_weight_decay)
        defaults |= precision_defaults(type(self).__name__, precision)
        super().__init__(params, defaults, max_grad_norm=max_grad_norm)
