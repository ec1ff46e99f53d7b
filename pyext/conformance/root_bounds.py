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
              eigh: 2 r + u for 3 u, r the residual that the op returns, which it measures on Q W Q^T - A and on
              Q Q^T - I: root mean squares over unit vectors v of |D v|, that is ||D||_F / sqrt(n).  A D without a
              preferred direction has ||D||_2 = 2 ||D||_F / sqrt(n).  What LAPACK leaves depends on the spectrum by a
              factor of 20 (one small eigenvalue among equal ones: up to 6 sqrt(n) u in that one, random spectra 0.3
              sqrt(n) u), so that no multiple of u alone is a bound; the op itself refuses r > 10 sqrt(n) u.  (Seen:
              1.54 r for 2 r, eight families, n from 2 to 200.)
              The oracle is float64 eigh itself and may be off by its own share, which is 2 r + u of it, measured alike.
residual      ||X^p S - I||_2 <= (1 + e)^p (1 + 2 (3 + K) sqrt(n) kappa u) - 1, K steps.  f(t)^p - 1 is certified.
              X is the root of S + D, so X^p S - I = -(S + D)^-1 D <= kappa ||D||_2 / ||S||_2.  A product that
              makes X, rounded by d, adds X^(p-1) d S: one-sided, it multiplies what d mixes of the largest eigenvalue
              into the smallest by all of kappa.  Each of these 3 + K roundings is at most sqrt(n) u of the norms, for
              sums of n terms; twice, since the products that make M turn its eigenvectors as well, which a cushion
              keeps that small (CUSHION in steepest.matrix.root_plan).  Seen: 5.7 sqrt(n) kappa u at 1e6 in float32 for
              16 sqrt(n), 12.7 at 1e12 in float64 for 28; Distributed Shampoo's coupled Newton 5.9 and 10.5.
              kappa is here the largest condition among S and the M of all steps: where S is well conditioned but
              the ridge small, steps take eigenvalues apart before they bring them together (n = 2, eigenvalues 1 and
              1/2, ridge 1e-6, tol 1e-6: 94 u, of which kappa = 2 would allow 77 u).
              Storing X is one more, with the unit of its dtype.  p n u of float64 itself.
              eigh: (p + 2) (2 r + u) + p sqrt(n) u for the terms in kappa u.  X^p S = Q f Q^T Q f ... Q^T Q W Q^T has
              p factors Q^T Q = I + E and one Q Q^T, with ||E||_2 <= 2 r, and W Q's own error is ||D||_2 <= 2 r; each is
              between powers of S and multiplied by at most kappa.  Each of the p X is a product of n terms.  (Seen:
              10.6 r kappa for 12 r kappa, all eigenvalues alike.)
update        U = L^(-1/4) G R^(-1/4): ||error||_F <= ((1 + a)(1 + b) - 1) ||U||_F + (n + m) u || |X| |G| |Y| ||_F with
              a, b = e + 3 kappa u / 4 for L and R.  With X = (I + A) L^(-1/4), element (i, j) of A is
              (t_i^(-1/4) - t_j^(-1/4)) / (t_i - t_j) t_j^(1/4) D_ij: at most kappa / 4 ||D||_2 / ||S||_2 where both
              eigenvalues are the smallest, and kappa^(1/4) of it elsewhere.  The last term is that of two products.
asymmetry     ||X - X^T||_F / ||X||_F <= twice the bound on rounding, of which it is made.
scale         lambda in [1, 2] times the largest |eigenvalue|, up to 2^-10 above, and below up to what two float64
              solvers may differ by: each is exact for A + E, ||E||_2 <= n u ||A||_2.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from steepest.conformance.bounds import number_format
from steepest.conformance.noise import NoisyVerbs
from steepest.conformance.registry import Figure
from steepest.matrix.root_plan import RANGE_MARGIN, UNIT, RootPlan
from steepest.matrix.roots import _directions, iterate

DEVIATIONS = 3
DRAWS = 8
CONSTANT = 3.0  # of kappa u / p


Eigen = tuple[torch.Tensor, torch.Tensor]


def shifted_spectrum(a: torch.Tensor, scale: float, ridge: float, absolute: bool, eigen: Eigen | None = None):
    """(t, q): eigenvalues of A / scale + ridge and eigenvectors, float64, one matrix; eigen: those of A, if known."""
    w, q = eigen or torch.linalg.eigh((a.double() + a.double().mT) / 2)
    return w / scale + (ridge / scale if absolute else ridge), q


def rounding_bound(m: torch.Tensor, todo: RootPlan) -> float:
    """Bound on ||X - X*||_F for M (n, n) in float64, from `iterate` with noise as large as rounding may be."""
    exact_plan = dataclasses.replace(todo, dtype=torch.float64)
    working = torch.float64 if todo.precision == "float64" else torch.float32
    # Two roundings of M's elements: scaling, and the sum that makes them symmetric.
    unit = 2 * number_format(working).unit
    generator = torch.Generator().manual_seed(0)
    exact = iterate(m[None], exact_plan, NoisyVerbs(working, None))
    mirrored = todo.backend != "torch"
    noisy, wide = (NoisyVerbs(dtype, generator, mirrored) for dtype in (working, torch.float64))
    draws = DRAWS if m.shape[-1] <= 128 else 3
    squares = []
    for _ in range(draws):
        noise = unit * m.abs() * torch.randn(m.shape, generator=generator, dtype=torch.float64)
        start = m + (noise.tril() + noise.tril(-1).mT)
        squares.append((iterate(start[None], exact_plan, noisy, wide) - exact).square().sum().item())
    return DEVIATIONS * math.sqrt(sum(squares) / draws)


def figures(
    a: torch.Tensor,
    x: torch.Tensor,
    scale: float,
    ridge: float,
    absolute: bool,
    todo: RootPlan,
    certified: float | None = None,
) -> list[Figure]:
    """a: one positive definite matrix as the op received it; x: its root, scale: its lambda, todo: what was run.

    certified: the residual that the op returned, which the bounds of eigh are made of.
    """
    known = torch.linalg.eigh((a.double() + a.double().mT) / 2)
    t, q = shifted = shifted_spectrum(a, scale, ridge, absolute, known)
    found, x, size, final = accuracy(x, shifted, scale, todo, oracle_share(a, known), certified)
    if todo.schedule is not None:
        unit = UNIT[todo.precision]
        nu = (1 + (ridge / scale if absolute else ridge)) / (1 - RANGE_MARGIN)
        polynomial = (q * (todo.schedule.apply(t / nu) * t ** (-1 / todo.p))) @ q.mT
        bound = rounding_bound((q * (t / nu)) @ q.mT, todo) * nu ** (-1 / todo.p) / size + final + 8 * unit
        away = (x - polynomial).norm().item() / size
        found.append(Figure("rounding", away, bound, "relative", "against the polynomial in float64"))
        found.append(Figure("asymmetry", (x - x.mT).norm().item() / size, 2 * bound, "relative"))
    return found


def oracle_share(a: torch.Tensor, eigen: Eigen) -> float:
    """2 r + u for float64 eigh of A, r measured as `inverse_root` measures it: root mean squares over unit vectors v of
    |Q Q^T v - v| and |(Q W Q^T - A) v| / |w|max, the larger."""
    (w, q), wide = eigen, (a.double() + a.double().mT) / 2
    v = _directions(len(w), torch.float64, torch.device("cpu"))
    rotated, largest = v @ q, w.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    off = ((rotated @ q.mT - v).norm(), ((rotated * (w / largest)) @ q.mT - v @ (wide / largest)).norm())
    return 2 * max(off).item() / math.sqrt(len(v)) + UNIT["float64"]


def perturbation(todo: RootPlan, oracle: float, certified: float | None) -> float:
    """||D||_2 / ||S||_2 at most, D what rounding and the oracle's error are as a perturbation of S (see above)."""
    if todo.schedule is not None:
        return CONSTANT * UNIT[todo.precision] + oracle
    return 2 * certified + UNIT[todo.precision] + oracle


def chain_condition(todo: RootPlan, t: torch.Tensor) -> float:
    """The largest condition of S = M_1, M_2, ..., which eigenvalues t take through the steps of the plan."""
    m, worst = t * (1 - RANGE_MARGIN) / t.max().clamp(min=1), 1.0
    for row in todo.schedule.coefficients if todo.schedule else ():
        worst = max(worst, (m.max() / m.min()).item())
        m = m * sum(c * m**k for k, c in enumerate(row)) ** todo.p
    return worst


def accuracy(
    x: torch.Tensor, shifted: Eigen, scale: float, todo: RootPlan, oracle: float, certified: float | None = None
):
    """Root error and residual of x, the root of A, and what they are made of: (figures, x of S, |exact|_F, storing).

    shifted: (eigenvalues, vectors) of S = A / scale + ridge, which `shifted_spectrum` gives.  oracle: `oracle_share`.
    """
    (t, q), p, stored = shifted, todo.p, number_format(x.dtype)
    x = x.double() * scale ** (1 / p)  # the root of S
    exact = (q * t ** (-1 / p)) @ q.mT
    size = exact.norm().item()
    final = stored.unit + stored.tiny * math.sqrt(x.numel()) * scale ** (1 / p) / size
    kappa = (t.max() / t.min()).item()
    certificate = todo.schedule.error if todo.schedule else 0.0
    slack = perturbation(todo, oracle, certified)
    error = (x - exact).norm().item() / size
    found = [Figure("root error", error, certificate + slack * (kappa / p + 4) + final, "relative")]
    found.append(residual_figure(x, shifted, todo, final, oracle, certified))
    return found, x, size, final


def residual_figure(
    x: torch.Tensor, shifted: Eigen, todo: RootPlan, stored: float, oracle: float, certified: float | None
) -> Figure:
    """x: the root of S, which is `shifted`, float64; stored: the relative rounding of x's elements when stored."""
    t, q = shifted
    s, p, eye = (q * t) @ q.mT, todo.p, torch.eye(len(t), dtype=t.dtype)
    kappa = max((t.max() / t.min()).item(), chain_condition(todo, t))
    found = torch.linalg.matrix_norm(torch.linalg.matrix_power(x, p) @ s - eye, 2).item()
    root = math.sqrt(len(s))
    if todo.schedule is not None:
        terms = 2 * (CONSTANT + todo.steps) * root * UNIT[todo.precision]
    else:
        terms = (p + 2) * (2 * certified + UNIT[todo.precision]) + p * root * UNIT[todo.precision]
    terms += oracle + 4 * p * root * UNIT["float64"] + 2 * root * stored
    certificate = (1 + (todo.schedule.error if todo.schedule else 0.0)) ** p
    bound = certificate * (1 + terms * kappa) - 1 + p * len(s) * UNIT["float64"]
    return Figure("residual", found, bound, "2-norm", "X^p S - I")


def update_figure(
    sides: tuple[torch.Tensor, ...],
    g: torch.Tensor,
    roots,
    scales,
    ridge: float,
    plans,
    update: torch.Tensor,
    eigens: tuple[Eigen | None, ...] = (None, None),
    certified: tuple[float | None, ...] = (None, None),
) -> Figure:
    """||update - L^(-1/4) G R^(-1/4)||_F by the norm of the exact one; sides: (L, R) as `inverse_root` got them.

    roots, scales, plans: what it returned and planned for each.  update: the two products as they were computed.
    eigens: (eigenvalues, vectors) of L and R in float64, where they are known.  certified: the residuals it returned.
    """
    exact, growth, sizes = g.double(), 1.0, g.double().abs()
    for axis, (a, x, scale, todo, eigen, own) in enumerate(zip(sides, roots, scales, plans, eigens, certified)):
        eigen = eigen or torch.linalg.eigh((a.double() + a.double().mT) / 2)
        t, q = shifted_spectrum(a, scale, ridge, False, eigen)
        root = (q * (t * scale) ** (-1 / todo.p)) @ q.mT
        certificate = todo.schedule.error if todo.schedule else 0.0
        growth *= (
            1
            + certificate
            + perturbation(todo, oracle_share(a, eigen), own) * ((t.max() / t.min()).item() / todo.p + 4)
        )
        exact = root @ exact if axis == 0 else exact @ root
        sizes = x.double().abs() @ sizes if axis == 0 else sizes @ x.double().abs()
    products = sum(g.shape) * number_format(update.dtype).unit * sizes.norm()
    error = (update.double() - exact).norm() / exact.norm()
    return Figure("update", error.item(), growth - 1 + (products / exact.norm()).item(), "relative")


def scale_figures(a: torch.Tensor, scale: float, eigen: Eigen | None = None) -> list[Figure]:
    w = torch.linalg.eigvalsh((a.double() + a.double().mT) / 2) if eigen is None else eigen[0]
    largest = w.abs().max().item()
    solvers = 2 * a.shape[-1] * 2.0**-53
    return [
        Figure("scale too small", largest / scale, 1 + solvers, "of lambda"),
        Figure("scale too large", scale / largest, 2 * (1 + 2**-10), "of the largest eigenvalue"),
    ]
