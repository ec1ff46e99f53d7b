"""Penalties on the size of the gradient and on curvature, by the two passes of SAM."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from steepest import check
from steepest.optim.two_pass import TwoPass


class CurvaturePenalty(TwoPass):
    """Minimises L + weight tr H, H the Hessian of L, without second derivatives: by gradients at three points.

    tr H is the average over z = ±1 of <z, H z>, and that is (L(w + r z) + L(w - r z) - 2 L(w)) / r² up to O(r²)::

        gradient = g + (weight / r²) (∇L(w + r z) + ∇L(w - r z) - 2 g)

    with one random z per step, drawn on the CPU from `seed` and the number of the step.  `step(closure)` calls the
    closure three times; there is no other form.

    Args:
        base_optimizer: as SAM, and so is what follows `radius`.
        weight: of the penalty, >= 0.
        radius: r, > 0: how far each weight is moved either way.

    Source: Hutchinson 1990; Wei, Kakade & Ma 2020 (tr H as what noise in the weights regularises).
    """

    def __init__(self, base_optimizer, weight: float, *, radius: float = 1e-2, **options):
        name = "CurvaturePenalty"
        self.weight = check.number(name, "weight", weight, 0)
        if check.number(name, "radius", radius, 0) == 0:
            raise ValueError(f"{name}: radius is 0, expected a number > 0")
        self.radius = radius
        super().__init__(base_optimizer, radius, math.inf, **options)

    def vectors(self, scale: float) -> list[tuple[int, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed + self._drawn)
        rows = []
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                z = torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
                rows.append((i, p, z.to(device=p.device, dtype=p.dtype)))
        return rows

    def step(self, closure: Callable | None = None, *, scaler=None):
        if closure is None:
            return self.second_step()
        self._require_home("step")
        self._drawn = self.passes  # both ways go along one z
        with self.first_pass(), torch.enable_grad():
            loss = closure()
        self._keep_first()
        clean, self._first = self._first, {}
        try:
            self._there_and_back(closure)
            self._keep_first()
            self.down = True
            self.first_step()
            with self.second_pass(), torch.enable_grad():
                closure()
            self._clean = clean
            self.second_step() if scaler is None else scaler.step(self)
        finally:
            self.restore()
            self.down, self._clean = False, {}
        return loss

    def _there_and_back(self, closure: Callable) -> None:
        self.first_step()
        with self.second_pass(), torch.enable_grad():
            closure()
        self._away.come_home()
        self._between = False

    def combine(self, scale: Tensor | None) -> None:
        """self._first has the gradients at w + r z, the parameters those at w - r z, self._clean those at w."""
        factor = self.weight / self.radius**2
        self._blend(factor, factor)
        self._first = self._clean
        self._blend(1 - 2 * factor, 1.0)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._clean: dict[Tensor, Tensor] = {}
        self._drawn = 0


class GradientNormPenalty(TwoPass):
    """Minimises L + weight ‖∇L‖_q, or L + weight ‖∇L‖_q², without second derivatives: SAM's two passes, combined.

    The gradient of ‖∇L‖_q is H d, d the unit vector of steepest ascent in the dual norm, and H d is a difference of
    gradients::

        gradient = g + (weight / r) (∇L(w + r d) - g)           (squared: weight times 2 ‖g‖_q)

    over all parameters together.  q = inf penalises the largest element of the gradient.  weight = r is SAM with p the
    dual of q.  A parameter whose gradient appears in one pass only has gradient 0 in the other.

    Args:
        base_optimizer: as SAM, and so is what follows `radius`.
        weight: of the penalty, >= 0.
        q: order of the norm, >= 1 or inf.
        squared: penalise the square.
        radius: r, > 0: small for an accurate derivative, large against rounding errors.

    Source: Zhao, Zhang & Hu 2022, "Penalizing Gradient Norm for Efficiently Improving Generalization in Deep
    Learning"; Barrett & Dherin 2021 (the square).  Cost: beside SAM's, 16 bytes per float32 element to combine.
    """

    keeps_first = True

    def __init__(
        self, base_optimizer, weight: float, q: float = 2.0, *, squared: bool = False, radius: float = 0.05, **options
    ):  # fmt: skip
        name = "GradientNormPenalty"
        self.weight, self.squared = check.number(name, "weight", weight, 0), squared
        q = q if q == math.inf else check.number(name, "q", q, 1)
        if check.number(name, "radius", radius, 0) == 0:
            raise ValueError(f"{name}: radius is 0, expected a number > 0")
        if squared and q == 1:
            raise ValueError(f"{name}: squared=True with q=1: the direction of q=1 is found without a norm; use q=2")
        self.radius = radius
        p = 1.0 if q == math.inf else math.inf if q == 1 else q / (q - 1)
        super().__init__(base_optimizer, radius, p, **options)

    def combine(self, scale: Tensor | None) -> None:
        factor = self.weight / self.radius
        if self.squared:
            norm = self.steepness.norm if scale is None else self.steepness.norm / scale
            factor = (2 * factor * norm).to(torch.float32)
        self._blend(1 - factor, factor)
