"""Variants of sharpness-aware minimisation: another direction to climb, or another gradient to step with."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from steepest import check, norms, sam_ops
from steepest.optim.two_pass import TwoPass


class GSAM(TwoPass):
    """Surrogate-gap guided SAM: steps with g_s - alpha (the part of g orthogonal to g_s).

    g and g_s are the gradients at w and at w + e; over all parameters, <g, g_s> and ‖g_s‖² from one read each::

        gradient = (1 + alpha <g, g_s> / ‖g_s‖²) g_s - alpha g

    Args: as SAM, and
        alpha: weight of the surrogate gap.
        rho_min, lr_min, lr_max: with rho_min, rho follows the learning rate as in the paper:
            rho_min + (rho - rho_min) (lr - lr_min) / (lr_max - lr_min), per param group.

    Source: Zhuang et al. 2022, "Surrogate Gap Minimization Improves Sharpness-Aware Training", algorithm 1.
    Cost: beside SAM's, 8 bytes per float32 element for each of two inner products, 16 for the combination.
    """

    keeps_first = True

    def __init__(
        self, base_optimizer, rho: float = 0.05, p: float = 2.0, adaptive: bool = False, *, alpha: float = 0.4,
        rho_min: float | None = None, lr_min: float = 0.0, lr_max: float | None = None, **options,
    ):  # fmt: skip
        self.alpha = check.number("GSAM", "alpha", alpha, 0)
        if (rho_min is None) != (lr_max is None):
            raise ValueError(f"GSAM: rho_min is {rho_min} and lr_max is {lr_max}: expected both, or neither")
        self.rho_max, self.rho_min, self.lr_min, self.lr_max = rho, rho_min, lr_min, lr_max
        super().__init__(base_optimizer, rho, p, adaptive, **options)

    def vectors(self, scale: float) -> list[tuple[int, Tensor, Tensor]]:
        if self.rho_min is not None:
            for group in self.param_groups:
                part = (float(group["lr"]) - self.lr_min) / (self.lr_max - self.lr_min)
                group["rho"] = self.rho_min + (self.rho_max - self.rho_min) * part
        return super().vectors(scale)

    def combine(self, scale: Tensor | None) -> None:
        clean, ascended = self._pairs()
        alone = self._gradients()
        square = sam_ops.inner(alone, alone)
        along = torch.where(square > 0, sam_ops.inner(clean, ascended) / square, 0.0)
        self._blend(-self.alpha, 1 + self.alpha * along)


class LookSAM(TwoPass):
    """SAM whose second pass is taken in every k-th step only, and its effect reused in between.

    In steps 0, k, 2k, ...: both passes, a step with g_s, and g_v = g_s - (<g, g_s> / ‖g‖²) g is kept.
    In the others: one pass, and a step with g + alpha (‖g‖ / ‖g_v‖) g_v.  `step(closure)` calls the closure once in
    these; in the other forms `optimizer.perturbed` after the first pass says whether a second one is wanted.

    Args: as SAM, and
        k: steps from one full step to the next, >= 1.
        alpha: weight of the reused component.

    State: g_v per parameter, in checkpoints under "two_pass".
    Source: Liu et al. 2022, "Towards Efficient and Scalable Sharpness-Aware Minimization", algorithm 1.
    """

    keeps_first = True

    def __init__(
        self, base_optimizer, rho: float = 0.05, p: float = 2.0, adaptive: bool = False, *, k: int = 5,
        alpha: float = 0.7, **options,
    ):  # fmt: skip
        self.k, self.alpha = int(check.number("LookSAM", "k", k, 1)), check.number("LookSAM", "alpha", alpha, 0)
        self.steps, self.components = 0, {}
        super().__init__(base_optimizer, rho, p, adaptive, **options)

    @property
    def full(self) -> bool:
        """Whether the coming step takes both passes."""
        return self.steps % self.k == 0 or not self.components

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, *, scale: float = 1.0) -> None:
        if self.full:
            return super().first_step(zero_grad, scale=scale)
        self._require_home("first_step")
        self._single = True  # the gradients stay for step()

    def step(self, closure: Callable | None = None, *, scaler=None):
        if closure is None or self.full:
            return super().step(closure, scaler=scaler)
        self._require_home("step")
        with self.first_pass(), torch.enable_grad():
            loss = closure()
        self.first_step()
        self.second_step() if scaler is None else scaler.step(self)
        return loss

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        single, self._single = self._single, False
        if not single:
            return super().second_step(zero_grad)
        self._finish(self._reuse)
        if zero_grad:
            self.zero_grad()

    def _reuse(self, scale: Tensor | None) -> None:
        grads, components = self._gradients(), list(self.components.values())
        pairs = [(p.grad, v) for p, v in self.components.items() if p.grad is not None]
        square = sam_ops.inner(components, components)
        size = torch.where(square > 0, (sam_ops.inner(grads, grads) / square).sqrt(), 0.0)
        scaled = torch._foreach_mul([v for _, v in pairs], self.alpha * size)
        torch._foreach_add_([g for g, _ in pairs], scaled)
        self.steps += 1

    def combine(self, scale: Tensor | None) -> None:
        first = list(self._first.values())
        clean, ascended = self._pairs()
        square = sam_ops.inner(first, first)
        along = torch.where(square > 0, sam_ops.inner(clean, ascended) / square, 0.0)
        component = {p: p.grad.clone() for p in self._parameters() if p.grad is not None}
        for p, grad in self._first.items():
            part = grad * along.to(grad.dtype)
            component[p] = component[p].sub_(part) if p in component else part.neg_()
        self.components = component
        self.steps += 1

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._single = False

    def kept_state(self) -> dict:
        return {"steps": self.steps, "components": self._by_index(self.components)}

    def load_kept_state(self, kept: dict) -> None:
        self.steps, self.components = kept.get("steps", 0), self._by_parameter(kept.get("components", {}))


class MomentumSAM(TwoPass):
    """SAM without a second pass: climbs against the base optimizer's momentum, e = -rho m / ‖m‖.

    `step(closure)` moves the weights, calls the closure once there, moves them back and steps; between steps they are
    at home, so that evaluation needs nothing special.  The momentum is `momentum_buffer` or `exp_avg` of the base
    optimizer's state; without one (in the first step) nothing moves.  In other forms: `first_step()` before the
    backward pass, `second_step()` after it.

    Args: as SAM (rho is larger than SAM's, 0.3 and more in the paper).
    Source: Becker, Altrock & Risse 2024, "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead".
    Cost: SAM's, with half of its passes.
    """

    down = True

    def __init__(self, base_optimizer, rho: float = 0.3, p: float = 2.0, adaptive: bool = False, **options):
        super().__init__(base_optimizer, rho, p, adaptive, **options)

    def vectors(self, scale: float) -> list[tuple[int, Tensor, Tensor]]:
        rows = []
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                state = self.state.get(p) or {}
                momentum = state.get("momentum_buffer", state.get("exp_avg"))
                if momentum is not None:
                    rows.append((i, p, momentum))
        return rows

    def step(self, closure: Callable | None = None, *, scaler=None):
        if closure is None:
            return self.second_step()
        self.first_step()
        with self.descent(scaler=scaler), torch.enable_grad():
            loss = closure()
        return loss


class FriendlySAM(TwoPass):
    """SAM that climbs along the batch's own part of the gradient: d = g - sigma m, m = lmbda m + (1 - lmbda) g.

    Args: as SAM, and
        sigma: how much of the average gradient is taken out.
        lmbda: decay of the average, in [0, 1).

    State: m per parameter in float32, in checkpoints under "two_pass".  With a GradScaler and without a closure, pass
    its scale: `optimizer.ascent(scale=scaler.get_scale())`.
    Source: Li et al. 2024, "Friendly Sharpness-Aware Minimization", algorithm 1 (m starts at 0).
    """

    needs_scale = True

    def __init__(
        self, base_optimizer, rho: float = 0.05, p: float = 2.0, adaptive: bool = False, *, sigma: float = 1.0,
        lmbda: float = 0.9, **options,
    ):  # fmt: skip
        self.sigma = check.number("FriendlySAM", "sigma", sigma, 0)
        self.lmbda = check.number("FriendlySAM", "lmbda", lmbda, 0, 1)
        self.averages = {}
        super().__init__(base_optimizer, rho, p, adaptive, **options)

    def vectors(self, scale: float) -> list[tuple[int, Tensor, Tensor]]:
        rows = super().vectors(scale)
        bad = norms.survey([grad for _, _, grad in rows], q=math.inf).nonfinite
        out = []
        for i, p, grad in rows:
            grad = grad.float() / scale if scale != 1.0 else grad.float()
            average = self.averages.get(p)
            if average is None:
                average = self.averages[p] = torch.zeros_like(grad)
            # An inf or NaN would stay in the average for ever.
            average.copy_(torch.where(bad, average, self.lmbda * average + (1 - self.lmbda) * grad))
            out.append((i, p, grad - self.sigma * average))
        return out

    def kept_state(self) -> dict:
        return {"averages": self._by_index(self.averages)}

    def load_kept_state(self, kept: dict) -> None:
        self.averages = self._by_parameter(kept.get("averages", {}))
