"""Sharpness of a loss at the current parameters: largest Hessian eigenvalue, rise inside an lp ball.

The trace is `steepest.hessian_trace`, from gradients alone.  The functions here take `loss`, a function without
arguments that returns the loss of the current parameters and can be differentiated twice (no backward call in it), and
the parameters.  Evaluate it without dropout, on fixed data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from steepest.sam_ops import perturb_

Loss = Callable[[], Tensor]


class Sharpness(NamedTuple):
    """value: the Rayleigh quotient v·Hv, never above the largest eigenvalue.  residual: |Hv - value v|, within which
    some eigenvalue lies.  vector: v, one tensor per parameter, of joint norm 1.  products: Hessian-vector products."""

    value: float
    residual: float
    vector: list[Tensor]
    products: int


class _Hessian:
    """v -> H v through one recorded gradient: a product costs about two backward passes."""

    def __init__(self, op: str, loss: Loss, params: Iterable[Tensor]):
        self.params = [p for p in params if p.requires_grad]
        if not self.params:
            raise ValueError(f"{op}: no parameter requires a gradient")
        with torch.enable_grad():
            value = loss()
            if not isinstance(value, Tensor) or value.dim():
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{op}: loss() returned {found}, expected a 0-dim tensor")
            self.gradient = torch.autograd.grad(
                value, self.params, create_graph=True, allow_unused=True, materialize_grads=True
            )
        self.products = 0

    def __call__(self, v: list[Tensor]) -> list[Tensor]:
        self.products += 1
        # A gradient that does not depend on the parameters (a linear loss) has no graph: its rows of H are zero.
        rows = [(g, x) for g, x in zip(self.gradient, v) if g.requires_grad]
        if not rows:
            return [torch.zeros_like(p) for p in self.params]
        gradients, directions = zip(*rows)
        return list(
            torch.autograd.grad(
                gradients, self.params, directions, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        )


def hessian_vector_product(loss: Loss, params: Iterable[Tensor], v: list[Tensor]) -> list[Tensor]:
    """H v for v of one tensor per parameter, H the Hessian of the loss.  Cost: a forward, about three backward passes.

    Source: Pearlmutter, "Fast Exact Multiplication by the Hessian", 1994.
    """
    return _Hessian("hessian_vector_product", loss, params)(v)


def sharpness(
    loss: Loss, params: Iterable[Tensor], *, tol: float = 1e-2, iterations: int = 100,
    generator: torch.Generator | None = None,
) -> Sharpness:  # fmt: skip
    """The largest (not the largest in magnitude) eigenvalue of the loss's Hessian, by power iteration.

    v <- (H + s I) v / |.| from a random start, until |Hv - θ v| <= tol |θ| or `iterations` products are spent.  First
    s = 0; where that ends at a negative θ or does not settle, once more with s = |Hv|, which makes the largest
    eigenvalue the dominant one.  The larger θ is returned: θ is never above the largest eigenvalue, and by Kato and
    Temple at most residual² / (θ - λ₂) below it.

    Not for every step: θ is read back after each product.  Cost: `products` times about two backward passes, and five
    times the memory of the parameters.
    """
    if iterations < 1 or not tol > 0:
        raise ValueError(f"sharpness: iterations is {iterations}, tol {tol}; expected both positive")
    hessian = _Hessian("sharpness", loss, params)
    first, size = _power_iteration(hessian, 0.0, tol, iterations, generator)
    if first.value >= 0 and first.residual <= tol * first.value:
        return first
    second, _ = _power_iteration(hessian, 1.01 * size, tol, iterations, generator)
    return max(first, second, key=lambda found: found.value)._replace(products=hessian.products)


def _power_iteration(hessian: _Hessian, shift: float, tol: float, iterations: int, generator):
    """The Sharpness that iterating with H + shift I ends at, and the largest |Hv| seen."""
    v = [torch.randn(p.shape, dtype=p.dtype, device=p.device, generator=generator) for p in hessian.params]
    largest = 0.0
    for left in reversed(range(iterations)):
        v = torch._foreach_div(v, _norm(v))
        hv = hessian(v)
        value = _dot(v, hv)
        residual = _norm(torch._foreach_sub(hv, torch._foreach_mul(v, value)))
        largest = max(largest, _norm(hv))
        following = torch._foreach_add(hv, v, alpha=shift)
        if residual <= tol * abs(value) or not left or not 0 < _norm(following) < math.inf:
            return Sharpness(value, residual, v, hessian.products), largest
        v = following
    raise AssertionError("unreachable")


def _norm(x: list[Tensor]) -> float:
    return math.sqrt(_dot(x, x))


def _dot(x: list[Tensor], y: list[Tensor]) -> float:
    """Sum over all elements, in float64 from tensor to tensor."""
    return math.fsum(torch.dot(a.flatten().double(), b.flatten().double()).item() for a, b in zip(x, y))


def sam_sharpness(loss: Loss, params: Iterable[Tensor], *, rho: float = 0.05, p: float = 2.0) -> float:
    """L(w + e) - L(w), with e the ascent of `steepest.perturb_`: the maximiser of <g, e> over ‖e‖_p <= rho.

    One norm over all parameters, which must have a dtype that perturb_ takes.  They are put back bit for bit, also
    after an exception in loss().  A zero gradient gives 0.

    Raises what perturb_ raises.  Cost: two forward passes, a backward, and perturb_.
    Source: Foret et al., "Sharpness-Aware Minimization", 2021, equation 2.
    """
    chosen = [x for x in params if x.requires_grad]
    with torch.enable_grad():
        before = loss()
        grads = torch.autograd.grad(before, chosen, allow_unused=True, materialize_grads=True)
    leaves, kept = [x.detach() for x in chosen], [x.detach().clone() for x in chosen]
    try:
        perturb_(leaves, list(grads), [torch.empty_like(x) for x in kept], rho=rho, p=p)
        with torch.no_grad():
            after = loss()
    finally:
        torch._foreach_copy_(leaves, kept)
    return after.double().item() - before.double().item()
