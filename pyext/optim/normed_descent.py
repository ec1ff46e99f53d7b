"""Steepest descent under a norm: l2, max norm (sign descent) or spectral norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steepest import check, multi_tensor, rules
from steepest.matrix.polar import polar
from steepest.ops_steps import traced_step
from steepest.optim.base import FusedOptimizer, GroupRule, run_closure

NORMS = ("l2", "linf", "spectral")


class SignKind(GroupRule):
    """Sign descent keeps nothing."""

    name = "NormedDescent"
    options = ("lr", "weight_decay", "maximize")

    def rule(self, group: dict) -> rules.Rule:
        return rules.sign(self.name, decoupled=True, maximize=group["maximize"])

    def keys(self, rule: rules.Rule) -> tuple[str, ...]:
        return ()

    def numbers(self, where: str, group: dict) -> dict[str, float]:
        return rules.numbers(where, lr=group["lr"], weight_decay=group["weight_decay"])


class NormedDescent(FusedOptimizer):
    """Steepest descent under a norm, W <- W + lr LMO(G), with LMO(G) = -argmax of <G, D> over ‖D‖ = 1.

    norm="l2": D = G / ‖G‖₂.  "linf": D = sign(G), one fused call for all.  "spectral": D = U Vᵀ of G = U S Vᵀ,
    through `steepest.polar`; a tensor of more than two dimensions is taken as the matrix of its first by all others, a
    vector as one row.  With normalized=False the step is also multiplied by the dual norm of G (‖G‖₂, ‖G‖₁, <G, U Vᵀ>),
    which makes it the minimiser of <G, D> + ‖D‖² / (2 lr).  Norms are taken tensor by tensor.  A zero gradient gives no
    step.  No momentum: see SGD, Lion and Muon.

    Args:
        params: parameters, (name, parameter) pairs, or param groups.
        lr: >= 0; a number or a one-element CPU tensor.
        norm: "l2", "linf" or "spectral".
        normalized: every step has norm lr; False multiplies by the dual norm of the gradient.
        weight_decay: decoupled, >= 0.
        maximize: ascend.
        capturable: steps can be captured in a CUDA graph; lr and weight_decay may be tensors of one element, which each
            replay reads anew.

    Raises:
        ValueError, TypeError: wrong numbers or norm, sparse gradients, gradients of another dtype; before any change.

    Source: Bernstein & Newhouse 2024, "Old Optimizer, New Norm"; Pethick et al. 2025 (Scion), for the form with LMO.
    Cost: "linf" 12 bytes per float32 element; the others read the gradient twice; "spectral" a polar factor per tensor.
    """

    kind = SignKind()
    _step_supports_amp_scaling = False
    _step_takes_sources = False

    def __init__(
        self, params, lr: float = 1e-2, norm: str = "l2", normalized: bool = True, weight_decay: float = 0.0, *,
        maximize: bool = False, capturable: bool = False,
    ):  # fmt: skip
        defaults = dict(
            lr=lr, norm=norm, normalized=normalized, weight_decay=weight_decay, maximize=maximize, capturable=capturable
        )  # fmt: skip
        super().__init__(params, defaults)

    def _check_group(self, number: int, group: dict) -> None:
        super()._check_group(number, group)
        if group["norm"] not in NORMS:
            raise ValueError(
                f"NormedDescent: param group {number}: norm is {group['norm']!r}, expected one of {', '.join(NORMS)}"
            )

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns the closure's loss, if there is a closure."""
        if torch.compiler.is_compiling():
            return traced_step(self, closure)
        loss = run_closure(closure)
        numbered = list(enumerate(self.param_groups))
        fused = [(number, group) for number, group in numbered if group["norm"] == "linf" and group["normalized"]]
        others = []
        for number, group in numbered:
            self._check_group(number, group)
            if (number, group) not in fused:
                params = [p for p in group["params"] if p.grad is not None]
                _check_rows("NormedDescent.step", params, [p.grad for p in params])
                others.append((group, params))
        self.step_rule(self.kind, fused)
        for group, params in others:
            _step(params, [p.grad for p in params], group)
        return loss


@torch.no_grad()
def normed_descent_(
    params: Sequence[Tensor], grads: Sequence[Tensor], *, lr: float, norm: str = "l2", normalized: bool = True,
    weight_decay: float = 0.0, maximize: bool = False,
) -> None:  # fmt: skip
    """One step of steepest descent under a norm, in place: params; grads are only read.  See optim.NormedDescent."""
    op = "normed_descent_"
    values = rules.numbers(op, lr=lr, weight_decay=weight_decay)
    if norm not in NORMS:
        raise ValueError(f"{op}: norm is {norm!r}, expected one of {', '.join(NORMS)}")
    check.tensor_lists(op, ("params", "grads"), [params, grads])
    check.leaves(op, [p for p in params if isinstance(p, Tensor)])
    _check_rows(op, params, grads)
    if norm == "linf" and normalized:
        multi_tensor.sign_(params, grads, lr=lr, weight_decay=weight_decay, maximize=maximize)
    else:
        _step(list(params), list(grads), values | dict(norm=norm, normalized=normalized, maximize=maximize))


def _check_rows(op: str, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    check.rows(op, ("params", "grads"), [params, grads], ("params",))
    check.no_overlap(op, ("params", "grads"), [params, grads], ("params",))


def _step(params: list[Tensor], grads: list[Tensor], group: dict) -> None:
    lr, decay = (rules.live_number(group[name], group.get("capturable", False)) for name in ("lr", "weight_decay"))
    for p, g in zip(params, grads):
        if not p.numel():
            continue
        g = g.to(torch.promote_types(p.dtype, torch.float32))
        step, size = _direction(g, group["norm"])
        step = step if group["normalized"] else step * size
        new = p.to(g.dtype) * (1 - lr * decay)
        if isinstance(lr, Tensor):
            p.copy_(new.add_(step * lr) if group["maximize"] else new.sub_(step * lr))
        else:
            p.copy_(new.sub_(step, alpha=-lr if group["maximize"] else lr))


def _direction(g: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """D and the dual norm <g, D>, as a 0-dim tensor: nothing waits for a device."""
    if norm == "l2":
        size = torch.linalg.vector_norm(g, dtype=torch.float64)
        return (g * torch.where(size > 0, 1 / size, 0.0)).to(g.dtype), size.to(g.dtype)
    if norm == "linf":
        return g.sign(), torch.linalg.vector_norm(g, 1)
    matrix = g.reshape(1, -1) if g.dim() < 2 else g.reshape(g.shape[0], -1)
    factor = polar(matrix).reshape(g.shape)
    return factor, (g * factor).sum()
