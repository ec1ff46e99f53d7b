"""The polar factor in plain PyTorch: the oracle for `steepest.polar`."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.schedules import NORM_MARGIN, Schedule, minimax, named

ORDERS = {"frobenius": 2, "schatten4": 4, "schatten8": 8}


def polar(
    x: Tensor,
    *,
    schedule: str | Schedule = "polar-express",
    steps: int = 5,
    lower: float = 1e-3,
    tol: float | None = None,
    norm: str = "frobenius",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """U f(S) Vᵀ for x = U S Vᵀ, (..., m, n), by Newton–Schulz steps on the whole matrix; arguments as `steepest.polar`.

    norm: X is divided by its Schatten norm of order 2 (frobenius), 4 or 8, times 1 + NORM_MARGIN. "tuned" schedules and
    the choice of a norm by "auto" are the planner's: give the Schedule and the norm that it chose.
    Everything is computed and returned in `dtype`, by default x's own: give float64 for an oracle.
    """
    if not isinstance(schedule, Schedule):
        if tol is not None:
            schedule = minimax(2, lower**2, tol=tol)
        elif schedule == "minimax":
            schedule = minimax(2, lower**2, steps=steps)
        else:
            schedule = named(schedule, steps)
    x = x.detach().to(dtype or x.dtype)
    if x.numel() == 0:
        return x.clone()
    if x.shape[-2] > x.shape[-1]:
        return polar(x.mT, schedule=schedule, norm=norm).mT
    x = x / _nonzero(x.abs().amax((-2, -1), keepdim=True))  # squares of 1e30 are out of float32's range
    norm_order = ORDERS[norm]
    norm = torch.linalg.matrix_norm(x.double(), keepdim=True)  # float32 sums of many squares come out too small
    x = x / (_nonzero(norm) * (1 + NORM_MARGIN)).to(x.dtype)
    if norm_order > 2:  # of x as it is now, whose largest element need not be 1e-30
        power = x.double() @ x.double().mT
        power = power if norm_order == 4 else power @ power
        norm = torch.linalg.matrix_norm(power, keepdim=True) ** (2 / norm_order)
        x = x / (_nonzero(norm) * (1 + NORM_MARGIN)).to(x.dtype)
    for coefficients in schedule.coefficients:
        gram = x @ x.mT
        power, total = x, coefficients[0] * x
        for c in coefficients[1:]:
            power = gram @ power
            total = total + c * power
        x = total
    return x


def polar_svd(x: Tensor) -> Tensor:
    """U Vᵀ of x = U S Vᵀ over the nonzero singular values: those above max(m, n)·eps times the largest."""
    u, s, vh = torch.linalg.svd(x.detach(), full_matrices=False)
    cut = s[..., :1] * max(x.shape[-2:]) * torch.finfo(x.dtype).eps
    return (u * (s > cut).unsqueeze(-2)) @ vh


def _nonzero(norm: Tensor) -> Tensor:
    return norm.where(norm != 0, 1)
