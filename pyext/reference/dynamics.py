"""`steepest.dynamics` by its definitions, in float64: eigenvalues, dense Hessians, small time steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gradient_dimension(g: Tensor) -> Tensor:
    """(Σ σᵢ²)² / Σ σᵢ⁴ over the singular values of g (..., m, n); 0 for a zero matrix."""
    squares = torch.linalg.svdvals(g.double()).square()
    fourth = squares.square().sum(-1)
    return squares.sum(-1).square() / fourth.where(fourth != 0, 1)


def stable_rank(g: Tensor) -> Tensor:
    """Σ σᵢ² / σ₁²; 0 for a zero matrix."""
    squares = torch.linalg.svdvals(g.double()).square()
    largest = squares.amax(-1)
    return squares.sum(-1) / largest.where(largest != 0, 1)


def timescales(features: Tensor, *, rate: float = 1.0) -> Tensor:
    """1 / (rate λᵢ) over the eigenvalues of ΦᵀΦ / n, fastest first; inf for zero."""
    x = features.double()
    eigenvalues = torch.linalg.svdvals(x).square() / x.shape[0]
    return torch.where(eigenvalues > 0, 1 / (rate * eigenvalues), math.inf)


def hessian(loss, params: list[Tensor]) -> Tensor:
    """The dense Hessian over all parameters as one vector, (n, n) float64, one row after another."""
    gradient = torch.autograd.grad(loss(), params, create_graph=True, allow_unused=True, materialize_grads=True)
    flat = torch.cat([g.flatten() for g in gradient])
    rows = []
    for element in flat:
        row = torch.autograd.grad(element, params, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([x.flatten() for x in row]))
    return torch.stack(rows).double()


def runge_kutta(slope, start: float, times: Tensor, substeps: int = 200) -> Tensor:
    """dx/dt = slope(t, x) at `times`, by the classical fourth-order rule, `substeps` steps from each to the next."""
    x, path = float(start), [float(start)]
    for begin, end in zip(times[:-1].tolist(), times[1:].tolist()):
        h = (end - begin) / substeps
        for k in range(substeps):
            t = begin + k * h
            k1 = slope(t, x)
            k2 = slope(t + h / 2, x + h / 2 * k1)
            k3 = slope(t + h / 2, x + h / 2 * k2)
            k4 = slope(t + h, x + h * k3)
            x += h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        path.append(x)
    return torch.tensor(path, dtype=torch.float64)


def logistic(times: Tensor, a: float, b: float, start: float) -> Tensor:
    """dλ/dt = λ (a - b λ) from λ(times[0]) = start."""
    return runge_kutta(lambda t, x: x * (a - b * x), start, times)


def dimension_path(times: Tensor, loss, penalty, *, alpha: float, beta: float, d_data: float, start: float) -> Tensor:
    """dd/dt = α L(t) (d_data - d) - β d R(t), for functions L and R of the time."""
    return runge_kutta(lambda t, d: alpha * loss(t) * (d_data - d) - beta * d * penalty(t), start, times)
