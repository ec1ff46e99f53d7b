"""AdamW as one fused call per step."""

from __future__ import annotations

from steepest.optim.adam import AdamKind
from steepest.optim.base import FusedOptimizer
from steepest.optim.options import precision_defaults, shared_defaults


class AdamW(FusedOptimizer):
    """Drop-in for torch.optim.AdamW: same arguments, param groups, LR schedulers and checkpoints, both ways.

    The rule, its rounding order, cost and source are those of `steepest.adamw_`; state per parameter: `step` (0-dim
    float32), `exp_avg`, `exp_avg_sq` and, with AMSGrad, `max_exp_avg_sq`, each in the parameter's dtype and layout.
    All parameters of all groups on one device and of one dtype are stepped in one kernel call.

    Args:
        params: parameters, (name, parameter) pairs, or param groups.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW; lr may be a 0-dim CPU tensor.
        amsgrad: keep the running maximum of exp_avg_sq (Reddi et al. 2018).
        maximize, cautious, l1, clip_value, max_grad_norm, foreach, fused, capturable, differentiable: see
            steepest.optim.options.

    Raises:
        ValueError, TypeError: wrong numbers, non-leaf parameters, sparse gradients, wrong shapes; before any change.
    """

    kind = AdamKind("AdamW")
    fixed = FusedOptimizer.fixed | {"decoupled_weight_decay": True}  # False would be Adam

    def __init__(
        self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, amsgrad: bool = False, *, maximize: bool = False, foreach: bool | None = None,
        capturable: bool = False, differentiable: bool = False, fused: bool | None = None, cautious: bool = False,
        l1: float = 0.0, clip_value: float | None = None, max_grad_norm: float | None = None, **precision,
    ):  # fmt: skip
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)
        defaults |= dict(foreach=foreach, fused=fused, capturable=capturable, differentiable=differentiable)
        defaults |= shared_defaults(maximize, cautious, l1, clip_value, True)
        defaults |= precision_defaults(type(self).__name__, precision)
        super().__init__(params, defaults, max_grad_norm=max_grad_norm)
