"""Two laws of training and their fits: logistic growth of an eigenvalue, and what drives an effective dimension.

All in float64; arguments are numbers or tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class LogisticFit(NamedTuple):
    """Parameters of `logistic`, and the share of the variance of ln λ that it explains."""

    a: float
    b: float
    start: float
    r2: float


class DimensionFit(NamedTuple):
    """Parameters of `dimension_path`, the path itself, and the share of the variance of d that it explains."""

    alpha: float
    beta: float
    d_data: float
    start: float
    path: Tensor
    r2: float


def logistic(t, a, b, start) -> Tensor:
    """λ(t) = a λ₀ / (b λ₀ + (a - b λ₀) e^(-a t)), the solution of dλ/dt = λ (a - b λ), λ(0) = λ₀ = start.

    For a > 0 it tends to a / b.  Arguments broadcast.  a = 0 is refused (the formula is 0/0 there; its limit is
    λ₀ / (1 + b λ₀ t)).  Source: the eigenvalues of a linear network's product (Saxe et al. 2014).
    """
    t, a, b, start = (torch.as_tensor(x, dtype=torch.float64) for x in (t, a, b, start))
    if (a == 0).any():
        raise ValueError("logistic: a is 0, expected another number")
    return a * start / (b * start + (a - b * start) * torch.exp(-a * t))


def fit_logistic(times, values) -> LogisticFit:
    """a, b and start > 0 that fit ln λ best in the mean square; from four starting points, the best result.

    times, values: (n,), n >= 4, values > 0.  Raises ValueError for anything else.
    """
    t, y = _series("fit_logistic", 4, times=times, values=values)
    if not (y > 0).all():
        raise ValueError(f"fit_logistic: the smallest of values is {y.min().item():g}, expected positive numbers")
    span, log_y = (t[-1] - t[0]).item(), y.log()

    def residual(theta: Tensor) -> Tensor:
        a, b, start = theta.exp()
        # In logarithms nothing overflows: ln λ = ln a + ln λ₀ - ln(b λ₀ + (a - b λ₀) e^(-a t)).
        decay = torch.exp(-a * (t - t[0]))
        return theta[0] + theta[2] - torch.log(b * start * (1 - decay) + a * decay) - log_y

    fits = []
    for rate in (1.0, 4.0, 16.0, 64.0):
        a = rate / span
        start = torch.tensor([math.log(a), math.log(a / y[-1].item()), log_y[0].item()], dtype=torch.float64)
        fits.append(_least_squares(residual, start))
    theta, error = min(fits, key=lambda fit: fit[1])
    a, b, start = theta.exp().tolist()
    # `start` is the value at times[0]; the law's own time begins at 0.
    if t[0] != 0:
        start = logistic(-t[0], a, b, start).item()
    return LogisticFit(a, b, start, _explained(log_y, error))


def dimension_fixed_point(loss, penalty, *, alpha, beta, d_data) -> Tensor:
    """d* = α L d_data / (α L + β R), where dd/dt = α L (d_data - d) - β d R vanishes; NaN where α L + β R = 0."""
    loss, penalty, alpha, beta = (torch.as_tensor(x, dtype=torch.float64) for x in (loss, penalty, alpha, beta))
    return alpha * loss * d_data / (alpha * loss + beta * penalty)


def dimension_path(times, loss, penalty, *, alpha: float, beta: float, d_data: float, start: float) -> Tensor:
    """d at every time, from dd/dt = α L(t) (d_data - d) - β d R(t), d(times[0]) = start.

    L and R are given at `times` and taken as constant from each time to the next, at the mean of the two values: then
    the equation is linear, and each step is its exact solution d* + (d - d*) e^(-(α L + β R) Δt), stable for any Δt.
    Of second order in Δt for smooth L and R.  times, loss, penalty: (n,); returns (n,).  Cost: n steps on the host.
    """
    t, lost, r = _series("dimension_path", 1, times=times, loss=loss, penalty=penalty)
    pull = alpha * (lost[1:] + lost[:-1]) / 2
    rate = pull + beta * (r[1:] + r[:-1]) / 2
    step = t.diff()
    decay = torch.exp(-rate * step)
    # (1 - e^(-c Δt)) α L / c, which is α L Δt for c = 0.
    gain = torch.where(rate == 0, step, -torch.expm1(-rate * step) / rate.where(rate != 0, 1)) * pull * d_data
    d, path = float(start), [float(start)]
    for factor, added in zip(decay.tolist(), gain.tolist()):
        d = d * factor + added
        path.append(d)
    return torch.tensor(path, dtype=torch.float64)


def fit_dimension(times, loss, penalty, dimension) -> DimensionFit:
    """α, β, d_data and start > 0 whose `dimension_path` fits `dimension` best in the mean square.

    All (n,), n >= 5, dimension > 0.  Starts from several rates; returns the best.  Raises ValueError for anything else.
    """
    t, lost, r, d = _series("fit_dimension", 5, times=times, loss=loss, penalty=penalty, dimension=dimension)
    if not (d > 0).all():
        raise ValueError(f"fit_dimension: the smallest dimension is {d.min().item():g}, expected positive numbers")
    span = (t[-1] - t[0]).item()

    def path(theta: Tensor) -> Tensor:
        alpha, beta, d_data, start = theta.exp().tolist()
        return dimension_path(t, lost, r, alpha=alpha, beta=beta, d_data=d_data, start=start)

    # Rates relative to the means of L and R: a path is determined by them whatever their units are.
    scale_l, scale_r = (max(x.abs().mean().item(), 1e-300) for x in (lost, r))
    fits = []
    for pull in (1.0, 10.0, 100.0):
        for push in (0.1, 1.0, 10.0):
            guess = [pull / (span * scale_l), push / (span * scale_r), 1.5 * d.max().item(), d[0].item()]
            fits.append(_least_squares(lambda theta: path(theta) - d, torch.tensor(guess, dtype=torch.float64).log()))
    theta, error = min(fits, key=lambda fit: fit[1])
    return DimensionFit(*theta.exp().tolist(), path(theta), _explained(d, error))


def _explained(y: Tensor, error: float) -> float:
    total = (y - y.mean()).square().sum().item()
    return 1 - error / total if total else math.nan


def _series(op: str, least: int, **named) -> list[Tensor]:
    """Finite float64 vectors of one length, the first of them increasing."""
    found = {name: torch.as_tensor(x, dtype=torch.float64).detach() for name, x in named.items()}
    times = next(iter(found.values()))
    for name, x in found.items():
        if x.dim() != 1 or x.shape != times.shape or len(x) < least:
            raise ValueError(
                f"{op}: {name} has shape {tuple(x.shape)}, times {tuple(times.shape)}; expected (n,), n >= {least}"
            )
        if not x.isfinite().all():
            raise ValueError(f"{op}: {name} has elements that are not finite")
    if not (times.diff() > 0).all():
        raise ValueError(f"{op}: times do not increase")
    return list(found.values())


def _least_squares(residual: Callable[[Tensor], Tensor], theta: Tensor, steps: int = 200) -> tuple[Tensor, float]:
    """(theta, sum of squares) by Levenberg and Marquardt, with central differences."""
    r = residual(theta)
    error, damping = _sum_of_squares(r), 1e-3
    for _ in range(steps):
        h = 1e-6
        columns = [
            (residual(theta + h * e) - residual(theta - h * e)) / (2 * h) for e in torch.eye(len(theta)).double()
        ]
        jacobian = torch.stack(columns, 1)
        normal, slope = jacobian.T @ jacobian, jacobian.T @ r
        if not (normal.isfinite().all() and slope.isfinite().all()):
            break
        improved = False
        for _ in range(12):
            lifted = normal + damping * torch.diag(
                normal.diagonal().clamp(min=1e-12 * normal.diagonal().max() + 1e-300)
            )
            tried = theta - torch.linalg.lstsq(lifted, slope[:, None]).solution[:, 0]
            found = residual(tried)
            if _sum_of_squares(found) < error:
                improved = True
                break
            damping *= 4
        if not improved:
            break
        gained = error - _sum_of_squares(found)
        theta, r, error, damping = tried, found, error - gained, max(damping / 8, 1e-12)
        if gained <= 1e-12 * error:
            break
    return theta, error


def _sum_of_squares(r: Tensor) -> float:
    value = r.square().sum().item()
    return value if math.isfinite(value) else math.inf
