"""Sharpness-aware minimisation and its variants, in plain PyTorch, float64-capable.

One vector is meant by a list of tensors: norms and inner products run over all of them.
"""

from __future__ import annotations

import math

import torch


def dual(p: float) -> float:
    """q with 1/p + 1/q = 1."""
    return math.inf if p == 1 else 1.0 if p == math.inf else p / (p - 1)


def norm(tensors, q: float) -> torch.Tensor:
    """(sum |x|^q)^(1/q) in float64, relative to the largest |x| so that no power overflows."""
    x = torch.cat([t.double().abs().flatten() for t in tensors] or [torch.zeros(0).double()])
    largest = x.max() if x.numel() else torch.zeros((), dtype=torch.float64)
    if math.isinf(q) or not 0 < largest < math.inf:
        return largest
    return largest * (x / largest).pow(q).sum().pow(1 / q)


def inner(a, b) -> torch.Tensor:
    return sum(((x.double() * y.double()).sum() for x, y in zip(a, b)), torch.zeros((), dtype=torch.float64))


def ascent(params, grads, *, rho=0.05, p=2.0, adaptive=False, eta=0.01) -> list[torch.Tensor]:
    """The e that maximises <g, e> over ‖e / T‖_p <= rho, T = |w| + eta if adaptive and else 1 (Foret et al. 2021).

        x = T g,    e = rho T sign(x) (|x| / ‖x‖_q)^(q-1)

    p = 1: the largest |x| share rho.  Zero where a norm is not finite, is zero, or (p = inf) an element is NaN.
    """
    q = dual(p)
    work = [torch.promote_types(w.dtype, torch.float32) for w in params]
    weights = [w.to(t).abs() + eta if adaptive else torch.ones_like(w, dtype=t) for w, t in zip(params, work)]
    x = [g.to(t) * weight for g, t, weight in zip(grads, work, weights)]
    if q == 1:
        return [rho * (t * a.sign()) for t, a in zip(weights, x)]
    largest, size = norm(x, math.inf), norm(x, q)
    if not 0 < size < math.inf:
        return [torch.zeros_like(a) for a in x]
    share = 1 / sum((a.double().abs() == largest).sum() for a in x)

    def direction(a):
        relative = a.abs() / largest.to(a.dtype)
        if math.isinf(q):
            return torch.where(relative == 1, share.to(a.dtype), 0.0)
        scaled = relative * (largest / size).to(a.dtype)
        return scaled if q == 2 else scaled.double().pow(q - 1).to(a.dtype)

    return [a.sign() * (rho * (t * direction(a))) for t, a in zip(weights, x)]


@torch.no_grad()
def perturb_(params, grads, backups, *, rho=0.05, p=2.0, adaptive=False, eta=0.01) -> None:
    """backups <- params, params <- params + ascent."""
    steps = ascent(params, grads, rho=rho, p=p, adaptive=adaptive, eta=eta)
    for w, backup, e in zip(params, backups, steps):
        backup.copy_(w)
        w.copy_(w.to(e.dtype) + e)


@torch.no_grad()
def restore_(params, backups) -> None:
    for w, backup in zip(params, backups):
        w.copy_(backup)


def sam_gradient(gradient, params, **options):
    """Foret et al. 2021, algorithm 1: the gradient at w + e.  gradient(params) -> list of gradients."""
    first = gradient(params)
    return gradient([w + e for w, e in zip(params, ascent(params, first, **options))])


def gsam_gradient(clean, ascended, alpha):
    """Zhuang et al. 2022, algorithm 1: ascended - alpha (the part of `clean` orthogonal to `ascended`)."""
    along = inner(clean, ascended) / inner(ascended, ascended)
    return [s - alpha * (g - along * s) for g, s in zip(clean, ascended)]


def looksam_component(clean, ascended):
    """Liu et al. 2022, algorithm 1: g_v, the part of `ascended` orthogonal to `clean`."""
    along = inner(clean, ascended) / inner(clean, clean)
    return [s - along * g for g, s in zip(clean, ascended)]


def looksam_gradient(clean, component, alpha):
    """The steps between: g + alpha (‖g‖ / ‖g_v‖) g_v."""
    size = norm(clean, 2) / norm(component, 2)
    return [g + alpha * size * v for g, v in zip(clean, component)]


def friendly_direction(gradient, average, sigma, lmbda):
    """Li et al. 2024, algorithm 1: m = lmbda m + (1 - lmbda) g and the direction g - sigma m; returns both."""
    average = [lmbda * m + (1 - lmbda) * g for m, g in zip(average, gradient)]
    return [g - sigma * m for g, m in zip(gradient, average)], average


def momentum_ascent(params, momenta, **options):
    """Becker et al. 2024: e = -rho m / ‖m‖, from the momentum that the last step left."""
    return [-e for e in ascent(params, momenta, **options)]


def penalty_gradient(gradient, params, *, weight, q=2.0, squared=False, radius=0.05):
    """Of L + weight ‖∇L‖_q (Zhao et al. 2022), or weight ‖∇L‖_q², with the Hessian-vector product by a difference:

        g + (weight / r) (∇L(w + r d) - g),    d = the unit ascent in the dual norm, d‖g‖_q/dg = d

    squared: weight times 2 ‖g‖_q.
    """
    first = gradient(params)
    moved = [w + e for w, e in zip(params, ascent(params, first, rho=radius, p=dual(q)))]
    factor = weight / radius * (2 * norm(first, q) if squared else 1)
    return [g + factor * (h - g) for g, h in zip(first, gradient(moved))]


def hessian_trace_and_diagonal(gradient, params, signs, *, radius=1e-3):
    """Hutchinson 1990; Bekas et al. 2007: averages over z of <z, H z> and z * H z, H z by a central difference."""
    trace, diagonal = 0.0, [torch.zeros_like(w) for w in params]
    for z in signs:
        above = gradient([w + radius * s for w, s in zip(params, z)])
        below = gradient([w - radius * s for w, s in zip(params, z)])
        product = [s * (a - b) / (2 * radius) for s, a, b in zip(z, above, below)]
        trace += sum(x.sum() for x in product) / len(signs)
        diagonal = [d + x / len(signs) for d, x in zip(diagonal, product)]
    return trace, diagonal
