"""Coefficient schedules for composite polynomial iterations: a minimax generator, published tables, and certificates.

Let M be a symmetric matrix whose spectrum lies in [lower, upper], 0 < lower. A step with polynomial h of degree d does

    Y ← Y·h(M),    M ← M·h(M)^p,

so with s = t^(1/p) for an eigenvalue t of M it maps s to q(s) = s·h(s^p), and after all steps Y·h₁(M)·…·h_K(M) is as
good an approximation of Y·M^(-1/p) as f(t) = s·h₁·…·h_K is of 1. With p = 2 and M = X Xᵀ this is the iteration for the
polar factor of X (s is a singular value of X); with p = 4 it gives Shampoo's inverse fourth roots.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import isfinite

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

__all__ = ["Schedule", "minimax", "named", "names"]

Coefficients = tuple[float, ...]

# Schedules for p = 2 expect singular values up to 1, and the steepest diverge at 1.00001: an input is divided by its
# Frobenius norm times 1 + NORM_MARGIN.
NORM_MARGIN = 2.0**-10


def _step(coefficients, p, s):
    """q(s) = s·h(s^p), by Horner's rule."""
    t, h = s**p, 0.0
    for c in reversed(coefficients):
        h = h * t + c
    return s * h


def _stationary(coefficients, p):
    """Real parts of the roots of h(t) + p·t·h'(t), the only t > 0 at which q'(t^(1/p)) = 0, in ascending order.

    Real parts, because rounding turns a double root (a converged step has one at t = 1) into a conjugate pair; a point
    too many is harmless where these are used, since it is a point of the interval whose image is being taken.
    """
    slope = [(1 + k * p) * c for k, c in enumerate(coefficients)]
    return np.sort(np.roots(slope[::-1]).real)


def _image(coefficients, p, low, high):
    """Exact image [min q, max q] of [low, high]: q is continuous and monotone between its stationary points."""
    inside = _stationary(coefficients, p)
    inside = inside[(inside > low**p) & (inside < high**p)] ** (1 / p)
    values = [_step(coefficients, p, s) for s in (low, *inside.tolist(), high)]
    return min(values), max(values)


def _reach(coefficients, p, limit):
    """The largest S for which q maps (0, S) into (0, limit)."""

    def inside(s):
        return 0 < _step(coefficients, p, s) < limit

    turns = _stationary(coefficients, p)
    low = 0.0
    for high in (turns[turns > 0] ** (1 / p)).tolist():
        if not inside(high):
            break
        low = high
    else:  # monotone from here on, so q leaves (0, limit) once and for all
        high = 2 * low + 1
        while inside(high):
            low, high = high, 2 * high
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return low
        low, high = (middle, high) if inside(middle) else (low, middle)


@dataclass(frozen=True)
class Schedule:
    """K polynomials h_k, applied one after another to a matrix M with spectrum in [lower, upper].

    coefficients: one row (c₀, …, c_d) per step, h(t) = c₀ + c₁·t + … + c_d·t^d; for p = 2, d = 2 these are (a, b, c) of
    X ← aX + b(XXᵀ)X + c(XXᵀ)²X. Raises ValueError where rows differ in length, are shorter than two, are not finite or
    do not start with c₀ > 0, for p that is not a positive integer, and unless 0 < lower ≤ upper.
    """

    coefficients: tuple[Coefficients, ...]
    p: int
    lower: float
    upper: float = 1.0
    name: str = "custom"

    def __post_init__(self):
        rows = tuple(tuple(float(c) for c in row) for row in self.coefficients)
        if not rows or len({len(row) for row in rows}) != 1 or len(rows[0]) < 2:
            raise ValueError(
                "Schedule: coefficients must be steps × (degree + 1) numbers with at least 1 step and degree 1"
            )
        if not all(isfinite(c) for row in rows for c in row) or any(row[0] <= 0 for row in rows):
            raise ValueError("Schedule: coefficients must be finite and the first of each step positive")
        _check_order("Schedule", self.p)
        if not 0 < self.lower <= self.upper < float("inf"):
            raise ValueError(f"Schedule: need 0 < lower ≤ upper, got lower={self.lower}, upper={self.upper}")
        object.__setattr__(self, "coefficients", rows)

    @property
    def steps(self) -> int:
        return len(self.coefficients)

    @property
    def degree(self) -> int:
        return len(self.coefficients[0]) - 1

    @cached_property
    def intervals(self) -> tuple[tuple[float, float], ...]:
        """The exact range of s before the first step and after each step, steps + 1 pairs, for t in [lower, upper]."""
        ranges = [(self.lower ** (1 / self.p), self.upper ** (1 / self.p))]
        for row in self.coefficients:
            ranges.append(_image(row, self.p, *ranges[-1]))
        return tuple(ranges)

    @property
    def error(self) -> float:
        """The certificate: sup |1 - f(t)| over lower ≤ t ≤ upper, from exact interval images, to float64 rounding."""
        low, high = self.intervals[-1]
        return max(1 - low, high - 1)

    @property
    def slope(self) -> float:
        """df/ds at s = 0, the product of the c₀: by how much the smallest singular values, and noise in them, grow."""
        return float(np.prod([row[0] for row in self.coefficients]))

    @cached_property
    def largest_safe(self) -> float:
        """The largest s such that 0 < f < 2 everywhere on (0, s): right sign, and no farther from 1 than 0 is.

        Beyond it a singular value comes out negated or blown up, so the norm used to scale the input must not
        underestimate the largest singular value by more than this factor. Computed backwards from the last step, as
        exact preimages of an interval [0, S).
        """
        limit = 2.0
        for row in reversed(self.coefficients):
            limit = _reach(row, self.p, limit)
        return limit

    def apply(self, t):
        """f(t) = t^(1/p)·h₁·…·h_K for t ≥ 0, elementwise: float, numpy array or torch tensor, in its own precision."""
        s = t ** (1 / self.p)
        for row in self.coefficients:
            s = _step(row, self.p, s)
        return s

    def truncate(self, steps: int) -> Schedule:
        """The first `steps` steps, with the certificate of what remains. ValueError if there are fewer."""
        _check_count(f"schedule {self.name!r}", "steps", steps)
        if steps > self.steps:
            raise ValueError(f"schedule {self.name!r}: asked for {steps} steps, it defines {self.steps}")
        return Schedule(self.coefficients[:steps], self.p, self.lower, self.upper, self.name)


def minimax(p, lower, *, upper=1.0, degree=2, steps=None, tol=None, cushion=0.0, safety=1.0) -> Schedule:
    """The schedule whose every step minimises sup |1 - q(s)| over the range that the steps before it leave.

    p: order of the root; lower, upper: of the spectrum of M, so s ∈ [lower^(1/p), upper^(1/p)]; for the polar factor
    p = 2 and lower = σ_min². Give `steps`, or `tol` for as many steps as bring the certified error down to tol. Each
    step is a linear Chebyshev problem, solved by Remez exchange; for p = 2, degree = 2 the greedy choice is the best
    composite (Amsel et al., arXiv 2505.16932) and gives CANS (arXiv 2506.10935).

    cushion: fit a step on [max(lo, cushion·hi), hi] instead of [lo, hi], then rescale it so that the image of [lo, hi]
    is centred on 1. Early steps are then less steep. 0.02407 gives the Polar Express table.
    safety ≥ 1: every step except the last is q(s / safety), c_k ← c_k / safety^(1 + k·p), so an input up to `safety`
    times the range it was fitted for is still inside it, and later steps are fitted to the range that results. Not the
    last step, which has no later step to protect; a one-step schedule is therefore not changed by safety.

    Raises ValueError for p, degree or steps that are not positive integers, lower outside (0, upper], cushion outside
    [0, 1), safety < 1, both or neither of steps and tol, tol outside (0, 1), and a tol below what float64 reaches.
    """
    _check_order("minimax", p)
    _check_count("minimax", "degree", degree)
    if not 0 < upper < float("inf"):
        raise ValueError(f"minimax: upper must be positive and finite, got {upper}")
    if not 0 < lower <= upper:
        raise ValueError(f"minimax: lower must be in (0, {upper:g}], got {lower}")
    if not 0 <= cushion < 1:
        raise ValueError(f"minimax: cushion must be in [0, 1), got {cushion}")
    if not 1 <= safety < float("inf"):
        raise ValueError(f"minimax: safety must be finite and at least 1, got {safety}")
    if (steps is None) == (tol is None):
        raise ValueError(f"minimax: give exactly one of steps and tol, got steps={steps}, tol={tol}")
    if steps is not None:
        _check_count("minimax", "steps", steps)
    elif not 0 < tol < 1:
        raise ValueError(f"minimax: tol must be in (0, 1), got {tol}")
    lower, upper = float(lower), float(upper)
    found = _minimax(int(p), lower / upper, int(degree), steps, tol, float(cushion), float(safety))
    if upper == 1:
        return found
    # The first step sees t / upper, and so s / upper^(1/p).
    first = tuple(c / upper ** (1 / p + k) for k, c in enumerate(found.coefficients[0]))
    name = f"minimax(p={p}, lower={lower:g}, upper={upper:g}, degree={degree})"
    return Schedule((first, *found.coefficients[1:]), int(p), lower, upper, name)


@lru_cache(maxsize=256)
def _minimax(p, lower, degree, steps, tol, cushion, safety):
    low, high = lower ** (1 / p), 1.0
    rows = []
    while True:
        last = _centred_step(p, degree, low, high, cushion)
        schedule = Schedule((*rows, last), p, lower, 1.0, f"minimax(p={p}, lower={lower:g}, degree={degree})")
        if schedule.steps == steps or (tol is not None and schedule.error <= tol):
            return schedule
        rows.append(tuple(c / safety ** (1 + k * p) for k, c in enumerate(last)))
        before = high / low
        low, high = _image(rows[-1], p, low, high)
        # A converged range is a few roundings wide and no longer shrinks: more steps cannot help.
        if tol is not None and high / low >= before * (1 - 1e-15):
            reached = f"after {len(rows)} steps the error is {schedule.error:.1e}"
            raise ValueError(f"minimax: tol={tol:g} cannot be reached in float64; {reached}")


def _centred_step(p, degree, low, high, cushion):
    fit_low = max(low, cushion * high)
    row = _best_step(p, degree, fit_low, high)
    if fit_low == low:
        return row
    image_low, image_high = _image(row, p, low, high)
    return tuple(2 / (image_low + image_high) * c for c in row)


def _best_step(p, degree, low, high):
    """Coefficients of the h of this degree with the smallest sup |1 - s·h(s^p)| over [low, high], by Remez exchange.

    The error 1 - q is stationary exactly at the roots of h + p·t·h', of which the interval holds `degree`, so an
    exchange replaces the reference by the interval's ends and all these roots, and converges quadratically. h is held
    in the Chebyshev basis of [low^p, high^p], which keeps the system well conditioned down to ranges of width 1e-5.
    """
    taylor = _taylor(p, degree)
    noise = 4 * np.finfo(float).eps * sum(abs(c) for c in taylor)  # of evaluating q from its coefficients
    if max(abs(1 - _step(taylor, p, s)) for s in (low, high)) <= noise:
        return taylor  # the limit of the minimax step as the range shrinks to 1, and exact there
    domain = [low**p, high**p]
    centre, radius = (domain[1] + domain[0]) / 2, (domain[1] - domain[0]) / 2
    alternating = (-1.0) ** np.arange(degree + 2)
    reference = centre - radius * np.cos(np.pi * np.arange(degree + 2) / (degree + 1))
    reference[0], reference[-1] = domain
    moved = np.inf
    while True:
        basis = np.polynomial.chebyshev.chebvander((reference - centre) / radius, degree)
        system = np.column_stack([reference[:, None] ** (1 / p) * basis, alternating])
        *solution, error = np.linalg.solve(system, np.ones(degree + 2))
        h = Chebyshev(solution, domain)
        roots = np.sort((h + p * Chebyshev.identity(domain) * h.deriv()).roots().real)
        exchanged = np.array([domain[0], *np.clip(roots, *domain), domain[1]])
        before, moved = moved, float(np.abs(exchanged - reference).max()) / radius
        reference = exchanged
        # The error is stationary in the reference, so 1e-8 here is machine precision there. Stop also where rounding
        # keeps the reference from settling, or is all that is left of the error.
        if moved < 1e-8 or (moved < 1e-2 and moved >= before) or abs(error) < noise:
            return tuple(h.convert(kind=Polynomial).coef.tolist()) + (0.0,) * (degree + 1 - len(h.coef))


def _taylor(p, degree):
    """Monomial coefficients of the Taylor polynomial of t^(-1/p) at 1; (1.875, -1.25, 0.375) for p = 2, degree = 2."""
    series, c = Polynomial([0.0]), 1.0
    for k in range(degree + 1):
        series = series + c * Polynomial([-1.0, 1.0]) ** k
        c *= (-1 / p - k) / (k + 1)
    return tuple(series.coef.tolist())


@dataclass(frozen=True)
class _Table:
    source: str
    rows: tuple[Coefficients, ...]
    constant: int | None = None  # for a set that repeats one row for ever: its customary number of steps


_KELLER = (3.4445, -4.7750, 2.0315)

# Every table is for p = 2 on singular values [1e-3, 1] of an input divided by an upper bound of its norm.
_TABLES = {
    "keller": _Table("K. Jordan et al., Muon, 2024, kellerjordan.github.io/posts/muon", (_KELLER,), constant=5),
    "you": _Table(
        "Jiacheng You, in modded-nanogpt, 2025, github.com/KellerJordan/modded-nanogpt",
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
    ),
    "polar-express": _Table(
        "Amsel, Persson, Musco, Gower, arXiv 2505.16932, raw (no safety factor)",
        (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
            (1.875, -1.25, 0.375),
        ),
    ),
    "polar-express-safe": _Table(
        "arXiv 2505.16932 with safety factor 1.01 on all listed steps but the last, as in NVIDIA Emerging-Optimizers",
        (
            (8.2051, -22.9019, 16.4607),
            (4.0664, -2.8612, 0.5184),
            (3.9096, -2.8234, 0.5250),
            (3.2856, -2.4153, 0.4853),
            (2.2779, -1.6198, 0.3985),
            (1.8726, -1.2307, 0.3585),
            (1.8564, -1.2132, 0.3568),
            (1.875, -1.25, 0.375),
        ),
    ),
    "cans": _Table(
        "Grishina, Smirnov, Rakhuba, arXiv 2506.10935",
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
    ),
    "cubic": _Table(
        "arXiv 2606.00371; of degree 1 in M, so no products of n × n matrices in the plain form",
        (
            (3.3656576, -3.3420992),
            (2.5744352, -1.4957376),
            (2.5368962, -1.4312570),
            (2.4418906, -1.2764040),
            (2.2230472, -0.9630650),
        ),
    ),
    "deepseek-v4": _Table("DeepSeek-V4 technical report, 2026", (_KELLER,) * 8 + ((2.0, -1.5, 0.5),) * 2),
}


def names() -> tuple[str, ...]:
    """The names that `named` knows."""
    return tuple(_TABLES)


def named(name: str, steps: int | None = None) -> Schedule:
    """A published set of coefficients for the polar factor (p = 2), certified on singular values in [1e-3, 1].

    steps: the first so many steps of the set; by default all of them ("keller", one row repeated: 5). ValueError for an
    unknown name, and for more steps than the set defines: repeating or cycling a set is another, unpublished,
    iteration.
    """
    if name not in _TABLES:
        raise ValueError(f"named: unknown schedule {name!r}; known: {', '.join(_TABLES)}")
    table = _TABLES[name]
    rows = table.rows
    if table.constant is not None:
        if steps is not None:
            _check_count(f"schedule {name!r}", "steps", steps)
        rows = rows * (steps or table.constant)
    schedule = Schedule(rows, 2, 1e-6, 1.0, name)
    return schedule if steps is None else schedule.truncate(steps)


def source(name: str) -> str:
    """Where the coefficients of a named set were published."""
    if name not in _TABLES:
        raise ValueError(f"source: unknown schedule {name!r}; known: {', '.join(_TABLES)}")
    return _TABLES[name].source


def _check_count(where, what, value):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{where}: {what} must be a positive integer, got {value!r}")


def _check_order(where, p):
    _check_count(where, "p", p)
