"""AdamW as one fused call per step."""

from __future__ import annotations

import torch

from steepest._native import lib, num_threads, reader
from steepest.multi_tensor import adamw_numbers, check_rows, step_checked
from steepest.optim.base import FusedOptimizer, Rule, run_closure


class AdamWRule(Rule):
    """m, v and, with AMSGrad, the running maximum of v."""

    name = "adamw"

    def states(self, group: dict) -> tuple[str, ...]:
        names = ("exp_avg", "exp_avg_sq")
        return (*names, "max_exp_avg_sq") if group["amsgrad"] else names

    def flags(self, group: dict) -> tuple:
        return group["amsgrad"], group["maximize"]

    def hyper(self, group: dict) -> tuple:
        return adamw_numbers("AdamW", group["lr"], group["betas"], group["eps"], group["weight_decay"])

    def gather(self, rows, guard, open_rows) -> str | None:
        found = lib.adamw_gather(reader, guard, rows, open_rows)
        return None if found is None else found[0]

    def run(self, rows, hyper, index, flags) -> None:
        lib.adamw_states(reader, rows, hyper, index, flags[1], num_threads())

    def check(self, roles) -> None:
        check_rows("AdamW.step", roles, "auto")

    def step(self, roles, hyper, index, flags) -> None:
        step_checked("AdamW.step", roles, hyper, index, maximize=flags[1])


class AdamW(FusedOptimizer):
    """Drop-in for torch.optim.AdamW: same arguments, param groups, LR schedulers and checkpoints, both ways.

    The rule, its rounding order, cost and source are those of `steepest.adamw_`; state per parameter: `step` (0-dim
    float32), `exp_avg`, `exp_avg_sq` and, with AMSGrad, `max_exp_avg_sq`, each in the parameter's dtype and layout.
    All parameters of all groups on one device and of one dtype are stepped in one kernel call.

    Args:
        params: parameters, (name, parameter) pairs, or param groups.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW; lr may be a 0-dim CPU tensor.
        amsgrad: keep the running maximum of exp_avg_sq (Reddi et al. 2018).
        maximize: ascend.
        foreach, fused: accepted for compatibility and without effect; the step is always fused.
        capturable, differentiable: must be False.

    Raises:
        ValueError, TypeError: wrong numbers, non-leaf parameters, sparse gradients, wrong shapes; before any change.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ):
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize, foreach=foreach,
            capturable=capturable, differentiable=differentiable, fused=fused, decoupled_weight_decay=True,
        )  # fmt: skip
        super().__init__(params, defaults)

    def _check_group(self, number: int, group: dict) -> None:
        where = f"AdamW: param group {number}"
        adamw_numbers(where, group["lr"], group["betas"], group["eps"], group["weight_decay"])
        for option in ("capturable", "differentiable"):
            if group[option]:
                raise ValueError(f"{where}: {option}=True is not supported, expected False")
        if not group["decoupled_weight_decay"]:
            raise ValueError(f"{where}: decoupled_weight_decay=False is Adam's L2 decay, expected True")

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns the closure's loss, if there is a closure."""
        loss = run_closure(closure)
        self.step_rule(AdamWRule(), list(enumerate(self.param_groups)))
        return loss
