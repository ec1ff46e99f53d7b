"""A foreign polar factor against the polynomial it evaluates, with its own normalisation and precision.

The figures and their derivations are those of steepest.conformance.polar_bounds.  What differs is what an
implementation may choose: the divisor nu = max(||X||_F, floor) + added, its precision, and the order of products.  An
`Arithmetic` says these.  Y* is the schedule's polynomial of X / nu in float64, and the bound on ||Y - Y*||_F has

    3 times the estimate of steepest.conformance.noise for this order of products,
    ||f(S / nu') - f(S / nu)|| for a computed nu' within 2 u of nu, u of the precision of the norm: one rounding of the
        result, and one for the sum, whose terms' errors average out,
    the rounding of the result to X's dtype.

`method` compares with U V^T, so a floor that swallows a small matrix shows there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

from steepest.conformance.bounds import number_format
from steepest.conformance.compare import bits_figure
from steepest.conformance.noise import NoisyVerbs, rounding_estimate
from steepest.conformance.polar_bounds import DEVIATIONS, Measured, figures_of
from steepest.conformance.registry import Figure, Problem
from steepest.conformance.subjects.base import Subject
from steepest.schedules import Schedule

DRAWS = 16


@dataclass(frozen=True)
class Arithmetic:
    """How an implementation works: `algorithm(x, verbs, schedule)` repeats its order of products over NoisyVerbs."""

    dtype: torch.dtype
    algorithm: Callable[[Tensor, NoisyVerbs, Schedule], Tensor]
    norm_dtype: torch.dtype | None = None  # None: that of the input
    floor: float = 0.0
    added: float = 0.0


def judge(problem: Problem, outputs: dict[str, Tensor], backend: Subject) -> list[Figure]:
    x, y = problem.expected["x"], outputs["y"].cpu()
    figures = [
        Figure("shape and dtype", float(y.shape != x.shape or y.dtype != x.dtype), 0, "wrong"),
        bits_figure("input unchanged", [(outputs["x"], x)]),
        *backend.function.figures(),
    ]
    if figures[0].value or not x.numel():
        return figures
    xs, ys = x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *x.shape[-2:])
    finite = [bool(one.isfinite().all()) for one in xs]
    wrong = sum(int((~one.isfinite() if good else ~one.isnan()).sum()) for one, good in zip(ys, finite))
    figures.append(Figure("non-finite", wrong, 0, "elements", "a matrix with NaN or inf gives NaN, the others do not"))
    if not wrong:
        schedule, how = backend.function.schedule, backend.arithmetic
        figures += Measured.worst([measure(a, b, schedule, how) for a, b, good in zip(xs, ys, finite) if good])
    return figures


def measure(x: Tensor, y: Tensor, schedule: Schedule, how: Arithmetic) -> Measured:
    """x: one finite matrix as the implementation received it; y: what it made of it."""
    stored, norm_unit = number_format(y.dtype), number_format(how.norm_dtype or x.dtype).unit
    x, y = x.double(), y.double()
    if not x.any():
        return Measured((Figure("zero", int((y != 0).sum()), 0, "elements", "a zero matrix gives zeros"),))
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    nu = max(s.norm().item(), how.floor) + how.added

    def f(s):
        return schedule.apply(s.square())

    exact = (u * f(s / nu)) @ vt
    shift = max((f(s / nu / (1 + r)) - f(s / nu)).norm().item() for r in (2 * norm_unit, -2 * norm_unit))
    final = shift + stored.unit * exact.norm().item() + stored.tiny / 2 * math.sqrt(x.numel())

    def algorithm(start, verbs):
        wide = start if start.shape[0] <= start.shape[1] else start.mT
        result = how.algorithm(wide, verbs, schedule)
        return result if wide is start else result.mT

    estimate = DEVIATIONS * rounding_estimate(algorithm, x / nu, how.dtype, draws=DRAWS, seed=0)
    slope = 2 * (schedule.steps + 1) * math.sqrt(max(x.shape)) * number_format(how.dtype).unit * schedule.slope
    bounds = (estimate + final, slope * exact.norm().item() + final)
    return Measured(figures_of(x, y, (u, s, vt), s.norm(), exact, schedule, bounds))


def _plus_identity(y: Tensor, shift: float, verbs: NoisyVerbs) -> Tensor:
    """y + shift I, with the diagonal rounded."""
    y = y.clone()
    diagonal = y.diagonal()
    diagonal.copy_(verbs.stored(diagonal + shift))
    return y


def newton_schulz(x: Tensor, verbs: NoisyVerbs, schedule: Schedule) -> Tensor:
    """A = X X^T; B = b A + c A A; X = a X + B X: three products, each rounded once (torch.addmm)."""
    for a, b, c in schedule.coefficients:
        m = verbs.gram(x)
        x = verbs.product(verbs.product(m, m, c, b * m), x, 1.0, a * x)
    return x


def horner(x: Tensor, verbs: NoisyVerbs, schedule: Schedule) -> Tensor:
    """S = X X^T; X = (a I + (b I + c S) S) X, with the identities inside what is rounded."""
    for a, b, c in schedule.coefficients:
        s = verbs.gram(x)
        y = verbs.product(_plus_identity(verbs.stored(c * s), b, verbs), s)
        x = verbs.product(_plus_identity(y, a, verbs), x)
    return x


def gram_newton_schulz(x: Tensor, verbs: NoisyVerbs, schedule: Schedule, restarts: tuple[int, ...] = (2,)) -> Tensor:
    """R = X X^T; Z = b R + c R R; Q = a Q + Q Z; R = a (a R + R Z) + Z (a R + R Z); X = Q X; anew after `restarts`."""
    r, q = verbs.gram(x), None
    for k, (a, b, c) in enumerate(schedule.coefficients):
        if k in restarts and q is not None:
            x = verbs.product(q, x)
            r, q = verbs.gram(x), None
        z = verbs.product(r, r, c, b * r)
        if k + 1 < schedule.steps and k + 1 not in restarts:
            rz = verbs.product(r, z, 1.0, a * r)
            r = verbs.product(z, rz, 1.0, a * rz)
        q = _plus_identity(z, a, verbs) if q is None else verbs.product(q, z, 1.0, a * q)
    return verbs.product(q, x)
