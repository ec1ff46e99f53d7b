"""Curvature of a loss by differences of gradients: Hutchinson's estimates of the Hessian's trace and diagonal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steepest import check


def hessian_trace(
    closure: Callable, params: Sequence[Tensor], *, samples: int = 8, radius: float = 1e-3, seed: int = 0
) -> Tensor:
    """Estimates tr H of the loss at `params`: the average over `samples` vectors z of ±1 of <z, H z>; 0-dim float64.

    H z = (∇L(w + r z) - ∇L(w - r z)) / 2r costs two calls of the closure.  The estimate's variance is
    2 (‖H‖_F² - Σ H_ii²) / samples, the difference's error O(r²) plus rounding of the gradients divided by r.

    Args:
        closure: as torch.optim has it: clears the gradients of `params`, computes the loss, calls backward.
        params: leaves of float32 or float64.
        samples: >= 1.
        radius: r > 0, the same for all elements.
        seed: of the vectors, which are drawn on the CPU: the same on every device.

    Weights come back bit for bit and gradients as they were, also after an exception in the closure.
    Source: Hutchinson 1990.
    """
    total = 0.0
    for z, product in _products("hessian_trace", closure, params, samples, radius, seed):
        total = total + torch.stack([(s * h).sum(dtype=torch.float64) for s, h in zip(z, product)]).sum()
    return total / samples


def hessian_diagonal(
    closure: Callable, params: Sequence[Tensor], *, samples: int = 8, radius: float = 1e-3, seed: int = 0
) -> list[Tensor]:
    """Estimates the diagonal of the Hessian: the average of z * H z (Bekas et al. 2007); otherwise as hessian_trace."""
    params = list(params)
    diagonal = [torch.zeros_like(p, requires_grad=False) for p in params]
    for z, product in _products("hessian_diagonal", closure, params, samples, radius, seed):
        for d, s, h in zip(diagonal, z, product):
            d.add_(s * h, alpha=1 / samples)
    return diagonal


def _products(op: str, closure, params, samples, radius, seed):
    """(z, H z) for each of the random vectors z."""
    params = list(params)
    count, radius = int(check.number(op, "samples", samples, 1)), check.number(op, "radius", radius, 0)
    if radius == 0:
        raise ValueError(f"{op}: radius is 0, expected a number > 0")
    for i, p in enumerate(params):
        if p.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: params[{i}] is {p.dtype}; a difference of gradients needs float32 or float64")
    check.leaves(op, params)
    generator = torch.Generator().manual_seed(seed)
    homes, grads = [p.detach().clone() for p in params], [p.grad for p in params]
    for p in params:
        p.grad = None  # the closure clears gradients; the caller's tensors are not to be written
    try:
        for _ in range(count):
            z = [(torch.randint(0, 2, p.shape, generator=generator) * 2 - 1).to(p) for p in params]
            above = _gradient_at(closure, params, homes, z, radius)
            below = _gradient_at(closure, params, homes, z, -radius)
            yield z, [(a - b) / (2 * radius) for a, b in zip(above, below)]
    finally:
        with torch.no_grad():
            for p, home, grad in zip(params, homes, grads):
                p.copy_(home)
                p.grad = grad


def _gradient_at(closure, params, homes, z, radius) -> list[Tensor]:
    with torch.no_grad():
        for p, home, s in zip(params, homes, z):
            p.copy_(home + radius * s)
    with torch.enable_grad():
        closure()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]
