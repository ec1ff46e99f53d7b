"""Bounds for an inverse root X of A + ridge lambda I, and how they follow.

With S = A / lambda + ridge I, kappa the ratio of its largest to its smallest eigenvalue, u the unit roundoff, f the
polynomial of the plan and e its certificate:

rounding      ||X - X*||_F / ||X*||_F, X* the same polynomial in float64: at most 3 times the estimate of
              steepest.conformance.noise for the products that the backend executes on this very matrix, and the
              roundings of the result.  3 deviations, and at least 0.3 of them for chance where few numbers decide.
root error    ||X - S^(-1/p)||_F / ||S^(-1/p)||_F <= e + 3 kappa u / p.  Rounding S, or M in the first step, is a
              perturbation D of size c u ||S||_2.  In the eigenbasis of S it changes element (i, j) of the root by
              (t_i^(-1/p) - t_j^(-1/p)) / (t_i - t_j) D_ij.  Where both are near the smallest eigenvalue t the factor is
              t^(-1/p) / (p t), so that k such eigenvalues give t^(-1/p) / (p t) sqrt(k) ||D||_2, and the root has a
              norm of at least t^(-1/p) sqrt(k): together kappa / p ||D||_2 / ||S||_2.  Other pairs count less: their
              factor is at most t_i^(-1/p) / t_j for t_i < t_j.  Later steps see kappa divided by c0^p, 37 for p = 4.
              c counts roundings of S and M (scaling, symmetric part, ridge: 3, of deviation 0.3 u each, hence about
              2 x 0.3 u ||S||_2 in the 2-norm of a random matrix) and those of two products, 0.6 again each: 3.  (Seen:
              0.6 for rank n / 4 in float32 alone, 0.17 with the wide products, n = 128 and 512.)
              eigh: max(3, sqrt(n)) for 3, since LAPACK's backward errors grow like that (1.6 at n = 512).  The
              oracle is float64 eigh itself and may be off by its own share.
asymmetry     ||X - X^T||_F / ||X||_F <= twice the bound on rounding, of which it is made.
scale         lambda in [1, 2] times the largest |eigenvalue|, up to 2^-10.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from steepest.conformance.bounds import number_format
from steepest.conformance.noise import NoisyVerbs
from steepest.conformance.registry import Figure
from steepest.matrix.root_plan import RANGE_MARGIN, UNIT, RootPlan
from steepest.matrix.roots import iterate

DEVIATIONS = 3
DRAWS = 8
CONSTANT = 3.0  # of kappa u / p


def shifted_spectrum(a: torch.Tensor, scale: float, ridge: float, absolute: bool):
    """(t, q): eigenvalues of A / scale + ridge and eigenvectors, float64, one matrix."""
    w, q = torch.linalg.eigh((a.double() + a.double().mT) / 2)
    return w / scale + (ridge / scale if absolute else ridge), q


def rounding_bound(m: torch.Tensor, todo: RootPlan) -> float:
    """Bound on ||X - X*||_F for M (n, n) in float64, from `iterate` with noise as large as rounding may be."""
    exact_plan = dataclasses.replace(todo, dtype=torch.float64)
    working = torch.float64 if todo.precision == "float64" else torch.float32
    # Two roundings of M's elements: scaling, and the sum that makes them symmetric.
    unit = 2 * number_format(working).unit
    generator = torch.Generator().manual_seed(0)
    exact = iterate(m[None], exact_plan, NoisyVerbs(working, None))
    noisy, wide = NoisyVerbs(working, generator), NoisyVerbs(torch.float64, generator)
    draws = DRAWS if m.shape[-1] <= 128 else 3
    squares = []
    for _ in range(draws):
        noise = unit * m.abs() * torch.randn(m.shape, generator=generator, dtype=torch.float64)
        start = m + (noise.tril() + noise.tril(-1).mT)
        squares.append((iterate(start[None], exact_plan, noisy, wide) - exact).square().sum().item())
    return DEVIATIONS * math.sqrt(sum(squares) / draws)


def figures(
    a: torch.Tensor, x: torch.Tensor, scale: float, ridge: float, absolute: bool, todo: RootPlan
) -> list[Figure]:
    """a: one positive definite matrix as the op received it; x: its root, scale: its lambda, todo: what was run."""
    p, stored = todo.p, number_format(x.dtype)
    t, q = shifted_spectrum(a, scale, ridge, absolute)
    x = x.double() * scale ** (1 / p)  # the root of S
    exact = (q * t ** (-1 / p)) @ q.mT
    size = exact.norm().item()
    final = stored.unit + stored.tiny * math.sqrt(x.numel()) * scale ** (1 / p) / size
    kappa, unit = (t.max() / t.min()).item(), UNIT[todo.precision]
    certificate = todo.schedule.error if todo.schedule else 0.0
    by_eigh = max(CONSTANT, math.sqrt(len(a)))
    slack = (CONSTANT if todo.schedule else by_eigh) * unit + by_eigh * UNIT["float64"]
    error = (x - exact).norm().item() / size
    found = [Figure("root error", error, certificate + slack * (kappa / p + 4) + final, "relative")]
    if todo.schedule is not None:
        nu = (1 + (ridge / scale if absolute else ridge)) / (1 - RANGE_MARGIN)
        polynomial = (q * (todo.schedule.apply(t / nu) * t ** (-1 / p))) @ q.mT
        bound = rounding_bound((q * (t / nu)) @ q.mT, todo) * nu ** (-1 / p) / size + final + 8 * unit
        away = (x - polynomial).norm().item() / size
        found.append(Figure("rounding", away, bound, "relative", "against the polynomial in float64"))
        found.append(Figure("asymmetry", (x - x.mT).norm().item() / size, 2 * bound, "relative"))
    return found


def scale_figures(a: torch.Tensor, scale: float) -> list[Figure]:
    largest = torch.linalg.eigvalsh((a.double() + a.double().mT) / 2).abs().max().item()
    return [
        Figure("scale too small", largest / scale, 1.0, "of lambda"),
        Figure("scale too large", scale / largest, 2 * (1 + 2**-10), "of the largest eigenvalue"),
    ]
