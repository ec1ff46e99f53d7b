"""Bounds for a polar factor Y computed from X = U S V^T, and what follows for measures that need no SVD of Y.

With nu the norm that X is divided by and f the schedule's polynomial, two errors are judged apart.

Rounding: Y - Y*, where Y* = U f(S / nu) V^T is the same polynomial in float64, in the Frobenius norm.  Two bounds:

    estimate  3 times the estimate of steepest.conformance.noise for the plan that the backend executes, on this input.
              Its noise has at least the deviation of real rounding; a Frobenius norm over many entries hardly varies,
              and 3 deviations cover the few that do (1 x n, where one number decides all).
    slope     2 (K + 1) sqrt(L) u slope ||Y*||_F, K steps, L the long side.  Each of the K + 1 stored iterates X_k is
              off by sqrt(L) u ||X_k||_F (random signs); later steps enlarge that by at most the product of their c0,
              and X_k itself grew by that of the earlier ones: together `slope`.  The Gram form restarts before it
              exceeds twice that (steepest.matrix.polar).  Wide, but the same for every plan: one that amplifies
              rounding more than it may cannot excuse itself by its own estimate.

Both add the rounding of the result to x's dtype and, where half precision takes a larger nu than the reference does,
||f(S / nu') - f(S / nu)||.  To the estimate, whose noise is independent from element to element, comes what is rounded
once and shared by all of them: nu, stored in float32 (twice where a tighter norm follows the Frobenius norm), by
max ||f((1 +- u) S / nu) - f(S / nu)||, and the coefficients, exactly, from the polynomial with float32 coefficients.
(Where all singular values are alike, as in a Gaussian 176 x 11, f is equally steep at all of them, and that is most of
the error.)  Let E stand for the first bound, e for the schedule's certified error.  Then

    method          ||(Y - U V^T) V1||_2 <= e + E, V1 the right vectors with S >= lower nu
    asymmetry       of Y^T X, by ||X||_F: <= E ||X||_2 / ||X||_F, since Y*^T X is symmetric
    negative part   of Y^T X, by ||X||_F: the same, since f >= 0 makes that of Y* semidefinite
    overshoot       ||Y||_2 <= 2, whatever rounding may do: beyond, Y is farther from U V^T in some direction than zero
                    is (a schedule's `largest_safe` draws the same line); half precision with a schedule that has no
                    slack above 1 is what crosses it, and there no bound on rounding alone would object
    dual gap        |1 - <Y, X> / sum S| <= e + E ||X||_F / sum S + (the part of sum S below lower nu)
    orthogonality   each s of Y* obeys |s^2 - 1| <= d = 2e + e^2 above lower nu, and <= max(1, d) below; root mean
                    square of these, and 2 (1 + e) E + E^2 for the rounding
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from steepest import reference
from steepest.conformance import zoo
from steepest.conformance.bounds import number_format
from steepest.conformance.noise import rounding_estimate
from steepest.conformance.registry import Figure
from steepest.matrix.polar import Plan, iterate
from steepest.reference.polar import ORDERS
from steepest.schedules import NORM_MARGIN, Schedule

DEVIATIONS = 3
DRAWS = 16  # 4 where the matrix is large: then one draw averages over many entries already


@dataclass(frozen=True)
class Measured:
    """Figures of one matrix."""

    figures: tuple[Figure, ...]

    @staticmethod
    def worst(matrices: list[Measured]) -> list[Figure]:
        """Of each figure the one that uses most of its bound."""

        def use(figure):
            return figure.value / figure.bound if figure.bound else math.inf if figure.value else 0.0

        return [max(same, key=use) for same in zip(*(m.figures for m in matrices))]


def rounding_bounds(start: torch.Tensor, s: torch.Tensor, size: float, todo: Plan, stored: torch.dtype):
    """(estimate, slope): absolute bounds on ||Y - Y*||_F; start = X / nu with singular values s, size = ||Y*||_F."""
    working, last = number_format(todo.dtype), number_format(stored)
    f = todo.schedule.apply
    narrower = (1 + NORM_MARGIN) / (1 + max(NORM_MARGIN, 4 * working.unit))
    shift = (f((s * narrower).square()) - f(s.square())).norm().item()
    final = shift + last.unit * size + last.tiny / 2 * math.sqrt(start.numel())

    def algorithm(y, verbs):
        return iterate(y[None], todo, verbs)[0]

    shared = shared_rounding(s, todo)
    draws = DRAWS if start.numel() < 10**5 else 4
    estimate = rounding_estimate(algorithm, start, todo.dtype, draws=draws, seed=0, mirrored=todo.backend != "torch")
    slope = 2 * (todo.steps + 1) * math.sqrt(max(start.shape)) * working.unit * todo.schedule.slope * size
    return DEVIATIONS * estimate + shared + final, slope + final


def shared_rounding(s: torch.Tensor, todo: Plan) -> float:
    """Bound on what the rounding of nu and of the coefficients does to f(S); s = S / nu."""
    if todo.dtype == torch.float64:
        return 0.0
    unit = number_format(torch.float32).unit * (1 if todo.norm == "frobenius" else 2)
    rows = torch.tensor(todo.schedule.coefficients).double().tolist()  # through float32
    rounded = dataclasses.replace(todo.schedule, coefficients=tuple(map(tuple, rows)))
    exact = todo.schedule.apply(s.square())
    moved = max((todo.schedule.apply((s * (1 + d)).square()) - exact).norm().item() for d in (unit, -unit))
    return moved + (rounded.apply(s.square()) - exact).norm().item()


def measure(x: torch.Tensor, y: torch.Tensor, todo: Plan) -> Measured:
    """x: one finite matrix as the op received it; y: what the op made of it."""
    stored = y.dtype
    x, y = x.double(), y.double()
    if not x.any():
        return Measured((Figure("zero", int((y != 0).sum()), 0, "elements", "zero gives zero"),))
    x = x / x.abs().max()  # squares of 1e-200 and the like are not the question; nothing below depends on scale
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    nu = torch.linalg.vector_norm(s, ORDERS[todo.norm]) * (1 + NORM_MARGIN)
    exact = reference.polar(x, schedule=todo.schedule, norm=todo.norm)
    bounds = rounding_bounds(x / nu, s / nu, exact.norm().item(), todo, stored)
    return Measured(figures_of(x, y, (u, s, vt), nu, exact, todo.schedule, bounds))


def figures_of(x, y, svd, nu, exact, schedule: Schedule, bounds) -> tuple[Figure, ...]:
    """The figures above.  x = u diag(s) vt = svd; exact: the polynomial of x / nu; bounds on ||y - exact||_F."""
    u, s, vt = svd
    bound, slope_bound = bounds
    size, error = exact.norm().item(), (y - exact).norm().item()
    e = schedule.error
    large = s >= math.sqrt(schedule.lower) * nu
    method = torch.linalg.matrix_norm((y - u @ vt) @ vt[large].mT, 2).item() if large.any() else 0.0
    below, norm = (s[~large].sum() / s.sum()).item(), s.norm()
    of_product = bound * (s[0] / norm).item()
    gap = abs(zoo.dual_gap(y, x, s).item())
    d = 2 * e + e * e
    count, k = int(large.sum()), len(s)
    orthogonal = math.sqrt((count * d * d + (k - count) * max(1.0, d) ** 2) / k) + 2 * (1 + e) * bound + bound**2
    return (
        Figure("rounding", error / size, bound / size, "relative", "against the polynomial in float64"),
        Figure("rounding, slope", error / size, slope_bound / size, "relative"),
        Figure("method", method, e + bound, "2-norm", "against U V^T of the SVD"),
        Figure("overshoot", torch.linalg.matrix_norm(y, 2).item(), 2.0, "2-norm"),
        Figure("asymmetry", zoo.asymmetry(y, x).item(), of_product, "of ||X||"),
        Figure("negative part", zoo.negative_part(y, x).item(), of_product, "of ||X||"),
        Figure("dual gap", gap, e + bound * (norm / s.sum()).item() + below, "of ||X||_*"),
        Figure("orthogonality", zoo.orthogonality(y).item(), orthogonal, "root mean square"),
    )
