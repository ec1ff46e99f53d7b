"""Matrices with known singular values, and measures of a polar factor that need no SVD.

A matrix is U diag(s) V^T with seeded Haar-distributed U, V (QR of a Gaussian, signs fixed), built in float64, batch
dimension by batch dimension, and rounded once.  The names of spectra are fixed; the same (name, shape, seed) gives the
same bits on every machine with the same LAPACK.  Recorded gradients (steepest.conformance.recorded) are listed with the
spectra: rows and columns of those, drawn by the seed.
"""

from __future__ import annotations

import math
from typing import Callable

import torch

from steepest.conformance import recorded


def _marchenko_pastur(k: int, aspect: float, generator) -> torch.Tensor:
    """Quantiles of the limit law of the singular values of a Gaussian matrix, largest scaled to 1.

    Density of s^2 on [(1-r)^2, (1+r)^2], r = sqrt(aspect), is sqrt((b - x)(x - a)) / x up to a factor; its distribution
    function is summed on a grid and inverted.
    """
    r = math.sqrt(aspect)
    low, high = (1 - r) ** 2, (1 + r) ** 2
    x = torch.linspace(low, high, 4097, dtype=torch.float64)[1:-1]
    mass = (((high - x) * (x - low)).sqrt() / x).cumsum(0)
    quantile = (torch.arange(k, dtype=torch.float64) + 0.5) / k
    return x[torch.searchsorted(mass / mass[-1], quantile)].sqrt() / math.sqrt(high)


def _log_uniform(smallest: float) -> Callable:
    def values(k, aspect, generator):
        s = torch.pow(smallest, torch.rand(k, generator=generator, dtype=torch.float64))
        s[:1] = 1.0
        if k > 1:
            s[1] = smallest
        return s

    return values


def _power(exponent: float) -> Callable:
    return lambda k, aspect, generator: torch.arange(1, k + 1, dtype=torch.float64) ** -exponent


def _scaled(scale: float, name: str) -> Callable:
    return lambda k, aspect, generator: scale * SPECTRA[name](k, aspect, generator)


def _clustered(k, aspect, generator):
    """Four tight clusters, a tenth of a percent wide: eigenvalue gaps at which divide and conquer deflates."""
    centre = torch.tensor([1.0, 0.3, 0.05, 0.01], dtype=torch.float64)[torch.arange(k) * 4 // k]
    return centre * (1 - 1e-3 * torch.rand(k, generator=generator, dtype=torch.float64))


def _ones(k):
    return torch.ones(k, dtype=torch.float64)


def _mostly(value: float, rest: float) -> Callable:
    """One singular value of the one kind, all others of the other (LAPACK's latms modes 1 and 2)."""
    return lambda k, aspect, generator: torch.cat([value * _ones(min(k, 1)), rest * _ones(max(k - 1, 0))])


# name -> values(k, aspect, generator), largest 1 unless the name says otherwise
SPECTRA: dict[str, Callable] = {
    "orthogonal": lambda k, aspect, generator: _ones(k),
    "marchenko-pastur": _marchenko_pastur,
    "power law": _power(1.0),
    "steep power law": _power(2.0),
    "exponential": lambda k, aspect, generator: torch.logspace(0, -3, k, dtype=torch.float64),  # latms mode 3
    "arithmetic": lambda k, aspect, generator: 1 - torch.arange(k, dtype=torch.float64) / k * 0.999,  # latms mode 4
    "one large": _mostly(1.0, 1e-2),
    "one small": lambda k, aspect, generator: _mostly(1e-3, 1.0)(k, aspect, generator).flip(0),
    "clustered": _clustered,
    "log-uniform 1e-3": _log_uniform(1e-3),
    "log-uniform 1e-6": _log_uniform(1e-6),
    "log-uniform 1e-12": _log_uniform(1e-12),
    "rank deficient": lambda k, aspect, generator: (
        torch.linspace(1, 0.1, k, dtype=torch.float64) * (torch.arange(k) < (2 * k + 2) // 3)
    ),
    "rank one": _mostly(1.0, 0.0),
    "zero": lambda k, aspect, generator: 0 * _ones(k),
    "huge": _scaled(1e30, "log-uniform 1e-3"),
    "tiny": _scaled(1e-30, "log-uniform 1e-3"),
}


NAMES = ("gaussian", *SPECTRA, *recorded.RECORDED)


def _haar(rows: int, columns: int, generator) -> torch.Tensor:
    """rows x columns with orthonormal columns."""
    q, r = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)  # without it the law depends on LAPACK's sign convention


def matrix(
    spectrum: str, m: int, n: int, *, seed: int = 0, batch: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, s): x of shape (*batch, m, n) in `dtype` and the singular values it was made from, (*batch, min(m, n)).

    spectrum: one of NAMES: a key of SPECTRA, "gaussian" for independent normal entries, or a recorded gradient (s is
    measured for these).  The singular values of the rounded x are within u ||x||_F of s, u being the unit roundoff of
    `dtype`.
    """
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    count = math.prod(batch)
    xs = torch.empty(count, m, n, dtype=torch.float64)
    ss = torch.empty(count, k, dtype=torch.float64)
    for i in range(count):
        if spectrum == "gaussian":
            xs[i] = torch.randn(m, n, generator=generator, dtype=torch.float64)
            ss[i] = torch.linalg.svdvals(xs[i])
        elif spectrum in recorded.RECORDED:
            xs[i] = recorded.part(spectrum, m, n, generator)
            ss[i] = torch.linalg.svdvals(xs[i])
        elif spectrum in SPECTRA:
            ss[i] = SPECTRA[spectrum](k, k / max(m, n, 1), generator)
            xs[i] = (_haar(m, k, generator) * ss[i]) @ _haar(n, k, generator).T
        else:
            raise ValueError(f"matrix: spectrum is {spectrum!r}, expected one of {', '.join(NAMES)}")
    return xs.reshape(*batch, m, n).to(dtype), ss.reshape(*batch, k)


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_norm(x)


def _small_side(q: torch.Tensor) -> torch.Tensor:
    """q with at most as many columns as rows."""
    return q if q.shape[-2] >= q.shape[-1] else q.mT


def orthogonality(q: torch.Tensor) -> torch.Tensor:
    """||Q^T Q - I||_F / sqrt(k) per matrix, on the short side k: the mean square of sigma^2 - 1."""
    q = _small_side(q.double())
    k = q.shape[-1]
    return _norm(q.mT @ q - torch.eye(k, dtype=q.dtype)) / math.sqrt(max(k, 1))


def asymmetry(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """||H - H^T||_F / (2 ||X||_F) for H = Q^T X (short side): zero when Q has the singular vectors of X.

    It does not see the size of Q's singular values, so an iteration that has not converged but multiplied X only by
    polynomials of X X^T still scores rounding error.
    """
    q, x = _small_side(q.double()), _small_side(x.double())
    h = q.mT @ x
    return _norm(h - h.mT) / (2 * _norm(x)).clamp(min=torch.finfo(torch.float64).tiny)


def residual(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """||X - Q sym(Q^T X)||_F / ||X||_F (short side): zero for the polar factor, X = Q H."""
    q, x = _small_side(q.double()), _small_side(x.double())
    h = q.mT @ x
    return _norm(x - q @ ((h + h.mT) / 2)) / _norm(x).clamp(min=torch.finfo(torch.float64).tiny)


def dual_gap(q: torch.Tensor, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """1 - <Q, X> / sum(s): how much of the nuclear norm, the steepest step's gain, Q fails to collect.

    Negative when a singular value of Q exceeds one.  `s` as `matrix` returns it.  0 for a zero matrix.
    """
    nuclear = s.sum(-1)
    gain = (q.double() * x.double()).sum((-2, -1))
    return torch.where(nuclear > 0, 1 - gain / nuclear.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def negative_part(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """How far H = sym(Q^T X) is from positive semidefinite: max(0, -lambda_min(H)) / ||X||_F; catches a wrong sign."""
    q, x = _small_side(q.double()), _small_side(x.double())
    h = q.mT @ x
    if h.shape[-1] == 0:
        return torch.zeros(h.shape[:-2], dtype=torch.float64)
    low = torch.linalg.eigvalsh((h + h.mT) / 2)[..., 0]
    return (-low).clamp(min=0) / _norm(x).clamp(min=torch.finfo(torch.float64).tiny)
