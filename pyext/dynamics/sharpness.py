"""Sharpness of a loss at the current parameters: largest Hessian eigenvalue, trace, rise inside an lp ball.

All take `loss`, a function without arguments that returns the loss of the current parameters and can be differentiated
twice (no backward call in it), and the parameters.  Evaluate it without dropout, on fixed data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

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


def hessian_trace(
    loss: Loss, params: Iterable[Tensor], *, probes: int = 16, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """(estimate, its standard error) of the Hessian's trace: the mean of z·Hz over random signs z (Hutchinson 1990).

    Unbiased, with variance 2 (‖H‖_F² - Σ Hᵢᵢ²) / probes; the standard error is NaN with one probe.
    Cost: `probes` Hessian-vector products.
    """
    if probes < 1:
        raise ValueError(f"hessian_trace: probes is {probes}, expected at least 1")
    hessian = _Hessian("hessian_trace", loss, params)
    found = []
    for _ in range(probes):
        z = [
            torch.randint(0, 2, p.shape, dtype=p.dtype, device=p.device, generator=generator) * 2 - 1
            for p in hessian.params
        ]
        found.append(_dot(z, hessian(z)))
    values = torch.tensor(found, dtype=torch.float64)
    return values.mean().item(), values.std().item() / math.sqrt(probes) if probes > 1 else math.nan


def sam_sharpness(loss: Loss, params: Iterable[Tensor], *, rho: float = 0.05, p: float = 2.0) -> float:
    """L(w + ε) - L(w), with ε the step of SAM: the maximiser of ε·g over ‖ε‖_p <= rho, one norm over all parameters.

    ε = rho sign(g) |g|^(q-1) / (‖g‖_q^q)^(1/p) with 1/p + 1/q = 1; p = inf: rho sign(g).  p = 1 moves the one element
    with the largest |g| (the first of them).  A zero gradient gives 0.  The parameters are put back bit for bit.

    Raises ValueError for rho < 0 or p < 1.  Cost: two forward passes and a backward.
    Source: Foret et al., "Sharpness-Aware Minimization", 2021, equation 2.
    """
    if not 0 <= rho < math.inf:
        raise ValueError(f"sam_sharpness: rho is {rho!r}, expected a finite number >= 0")
    if not p >= 1:
        raise ValueError(f"sam_sharpness: p is {p!r}, expected a number >= 1 or inf")
    chosen = [x for x in params if x.requires_grad]
    with torch.enable_grad():
        before = loss()
        grads = torch.autograd.grad(before, chosen, allow_unused=True, materialize_grads=True)
    kept = [x.detach().clone() for x in chosen]
    with torch.no_grad():
        try:
            torch._foreach_add_(chosen, _ascent(grads, rho, p))
            after = loss()
        finally:
            torch._foreach_copy_(chosen, kept)
    return after.double().item() - before.double().item()


def _ascent(grads: tuple[Tensor, ...], rho: float, p: float) -> list[Tensor]:
    """ε of sam_sharpness; with t = |g| / max |g| it is rho sign(g) t^(q-1) / (Σ t^q)^(1/p), which does not overflow."""
    largest = max((g.abs().max().item() for g in grads if g.numel()), default=0.0)
    if largest == 0:
        return [torch.zeros_like(g) for g in grads]
    if math.isinf(p):
        return [rho * g.sign() for g in grads]
    if p == 1:
        steps = [torch.zeros_like(g) for g in grads]
        place = next(i for i, g in enumerate(grads) if g.numel() and g.abs().max().item() == largest)
        index = grads[place].abs().argmax()
        steps[place].view(-1)[index] = rho * grads[place].sign().view(-1)[index]
        return steps
    q = p / (p - 1)
    ratios = [g.abs() / largest for g in grads]
    size = math.fsum((t.double() ** q).sum().item() for t in ratios) ** (1 / p)
    return [g.sign() * t ** (q - 1) * (rho / size) for g, t in zip(grads, ratios)]
