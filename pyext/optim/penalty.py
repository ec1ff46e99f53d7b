"""Penalties on the size of the gradient and on curvature, by the two passes of SAM."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steepest import check
from steepest.optim.two_pass import TwoPass


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
