"""Inverse p-th roots in plain PyTorch: the oracle for `steepest.inverse_root`, and its peer, coupled Newton."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.schedules import Schedule


def inverse_root(
    a: Tensor, p: int = 4, *, ridge: float = 1e-6, absolute: bool = False, scale: Tensor | None = None
) -> Tensor:
    """(A + ridge·λ·I)^(-1/p) through eigenvalues, (..., n, n), in a's dtype: give float64 for an oracle.

    The symmetric part of a is taken.  λ is `scale`, one number per matrix, by default the largest eigenvalue, or 1
    for a zero matrix; with absolute=True ridge itself is added.  NaN where an eigenvalue plus ridge is not positive.
    """
    w, q = torch.linalg.eigh((a + a.mT) / 2)
    if scale is None:
        largest = w.abs().amax(-1)
        scale = largest.where(largest != 0, 1)
    shift = torch.full_like(w[..., 0], ridge) if absolute else ridge * scale.to(w.dtype)
    shifted = w + shift[..., None]
    root = torch.where(shifted > 0, shifted, torch.nan) ** (-1 / p)
    return (q * root[..., None, :]) @ q.mT


def effective_dimension(a: Tensor) -> Tensor:
    """(Σ λᵢ)² / Σ λᵢ² over the eigenvalues of the symmetric matrices a (..., n, n), 0 for zero; in a's dtype."""
    w = torch.linalg.eigvalsh((a + a.mT) / 2)
    largest = w.abs().amax(-1, keepdim=True)
    w = w / largest.where(largest != 0, 1)
    squares = w.square().sum(-1)
    return w.sum(-1).square() / squares.where(squares != 0, 1)


def composite(m: Tensor, schedule: Schedule) -> Tensor:
    """X hₖ(M) … h₁(M) for M with spectrum in [lower, 1], each polynomial by Horner's rule: about M^(-1/p)."""
    identity = torch.eye(m.shape[-1], dtype=m.dtype)
    x = identity.expand(m.shape)
    for coefficients in schedule.coefficients:
        h = torch.zeros_like(m)
        for c in reversed(coefficients):
            h = h @ m + c * identity
        x = x @ h
        for _ in range(schedule.p):
            m = m @ h
    return x


def coupled_newton(
    a: Tensor, p: int = 4, *, ridge: float = 1e-6, tolerance: float = 1e-6, iterations: int = 100
) -> tuple[Tensor, int]:
    """One matrix's (A + ridge·λmax·I)^(-1/p) as Distributed Shampoo computes it, and its products of n × n matrices.

    z = (p + 1) / (2 ‖A‖_F), X = z^(1/p) I, M = z A; then N = (1 + 1/p) I - M / p, X ← X N, M ← Nᵖ M until
    max |M - I| <= tolerance or the iterations are spent; should that error grow 1.2 times, the X before is returned.
    The power by squaring: p = 4 takes 4 products per iteration.  Higham, Functions of Matrices, 2008, (7.18); Anil et
    al., arXiv 2002.09018.
    """
    identity = torch.eye(a.shape[-1], dtype=a.dtype)
    a = (a + a.mT) / 2
    a = a + ridge * torch.linalg.matrix_norm(a, 2) * identity
    z = (1 + p) / (2 * torch.linalg.matrix_norm(a))
    x, m = z ** (1 / p) * identity, z * a
    error, products = (m - identity).abs().max(), 0
    for _ in range(iterations):
        if not error > tolerance:
            break
        n = (1 + 1 / p) * identity - m / p
        power, used = _power(n, p)
        before, x, m = x, x @ n, power @ m
        products += used + 2
        error, previous = (m - identity).abs().max(), error
        if error > 1.2 * previous:
            return before, products
    return x, products


def _power(n: Tensor, p: int) -> tuple[Tensor, int]:
    """(nᵖ, products taken) by squaring."""
    result, square, products = None, n, 0
    while True:
        if p & 1:
            products += result is not None
            result = square if result is None else result @ square
        p >>= 1
        if not p:
            return result, products
        square = square @ square
        products += 1
