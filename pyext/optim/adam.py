"""Adam with L2 decay as one fused call per step."""

from __future__ import annotations

from steepest import rules
from steepest.optim.base import FusedOptimizer, GroupRule
from steepest.optim.options import SHARED, TORCH, of_rule, precision_defaults, shared_defaults


class AdamKind(GroupRule):
    """m, v and, with AMSGrad, the running maximum of v.  Adam or AdamW by the group's decay."""

    options = ("lr", "betas", "eps", "weight_decay", "amsgrad", *SHARED)

    def __init__(self, name: str):
        self.name = name

    def rule(self, group: dict) -> rules.Rule:
        return rules.adam(self.name, amsgrad=group["amsgrad"], **of_rule(group))

    def keys(self, rule: rules.Rule) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: len(rule.states)]

    def numbers(self, where: str, group: dict) -> dict[str, float]:
        return rules.numbers(where, **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "l1")})


class Adam(FusedOptimizer):
    """Drop-in for torch.optim.Adam: same arguments, param groups, LR schedulers and checkpoints, both ways.

    The rule, its rounding order, cost and source are those of `steepest.adam_`; state per parameter: `step` (0-dim
    float32), `exp_avg`, `exp_avg_sq` and, with AMSGrad, `max_exp_avg_sq`, each in the parameter's dtype and layout.
    All parameters of all groups on one device and of one dtype are stepped in one kernel call.

    Args:
        params: parameters, (name, parameter) pairs, or param groups.
        lr, betas, eps, weight_decay: as in torch.optim.Adam; lr may be a 0-dim CPU tensor.
        amsgrad: keep the running maximum of exp_avg_sq (Reddi et al. 2018).
        cautious, l1, clip_value, max_grad_norm, maximize, decoupled_weight_decay, foreach, fused, capturable,
        differentiable: see steepest.optim.options.

    Raises:
        ValueError, TypeError: wrong numbers, non-leaf parameters, sparse gradients, wrong shapes; before any change.
    """

    kind = AdamKind("Adam")

    def __init__(
        self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, amsgrad: bool = False, *, foreach: bool | None = None, maximize: bool = False,
        capturable: bool = False, differentiable: bool = False, fused: bool | None = None,
        decoupled_weight_decay: bool = False, cautious: bool = False, l1: float = 0.0,
        clip_value: float | None = None, max_grad_norm: float | None = None, **precision,
    ):  # fmt: skip
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad) | TORCH
        defaults |= dict(foreach=foreach, fused=fused, capturable=capturable, differentiable=differentiable)
        defaults |= shared_defaults(maximize, cautious, l1, clip_value, decoupled_weight_decay)
        defaults |= precision_defaults(type(self).__name__, precision)
        super().__init__(params, defaults, max_grad_norm=max_grad_norm)
