"""What `inverse_root` will do with a batch of matrices: decided from shapes and options, never from values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from steepest.matrix import tape
from steepest.matrix.native import native_wins, symmetric_work
from steepest.matrix.verbs import symmetric_fraction
from steepest.schedules import Coefficients, Schedule, minimax

ORDERS = (1, 2, 3, 4, 6, 8)
METHODS = ("auto", "composite", "newton", "eigh")
PRECISIONS = ("auto", "float64", "float32", "tf32x3", "bf16x3", "tf32")
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "tf32x3": 2.0**-22, "bf16x3": 2.0**-16, "tf32": 2.0**-11}
GPU_PRECISIONS = ("tf32x3", "bf16x3", "tf32")
# The smallest relative ridge that the steep polynomials bear, about 17 units of what a product rounds to; below it
# rounding drives eigenvalues of M through zero, where the polynomials diverge.  Newton's have slope 1 + 1/p only.
RIDGE_FLOOR = {"float64": 1e-14, "float32": 1e-6, "tf32x3": 1e-6, "bf16x3": 1e-5, "tf32": 3e-4}
# The spectrum of M lies in (0, 1 - RANGE_MARGIN): rounding of M and of its first products must not lift it above 1.
RANGE_MARGIN = 2.0**-10
# The best polynomial of a step from lower = 1e-6 takes some eigenvalues near 1 down to 1e-7, where M's rounding turns
# their eigenvectors, and X keeps that.  With a cushion c for p = 4, c^(4/p) in general, it takes none below c^4 / 2.
# At relative ridge 1e-6, n = 64: products, root error and |X^4 S - I|_2, of six gradients of rank 3 and of rank 43:
#     coupled Newton    64    1.1e-3  0.9    3.3e-3  1.2
#     c = 0             22    1.2e-3  465    3.5e-3  138
#     c = 0.2           22    1.0e-3  1.8    3.2e-3  2.1
#     c = 0.25          22    1.2e-3  0.9    3.1e-3  1.3    with twice the certified error
#     c = 0.3           25    1.0e-3  0.4    3.1e-3  0.9
CUSHION = 0.2
PROBES = 8  # columns of the thin block that finds the largest eigenvalue and measures the residual
GROUP_BYTES = 1 << 22
# The cost model of a CPU: times in units of one symmetric n x n float32 product (as the backend computes it) of a batch
# that fills the threads.  AMD EPYC (Zen 4), AVX-512, torch 2.13 with MKL, quickest of several runs.
# torch.linalg.eigh and the root's assembly, {backend: {threads: ((n, products), ...)}}: "native" beside the C library's
# products, which take half of torch's time or less, and "torch" beside torch's.  One thread, native, p = 4, measured
# again: eigh takes 1.06, 0.76, 0.55, 0.43 and 0.45 of composite's time at ridge 1e-6 and n = 128, 256, ... 2048, and
# 1.32, 1.08, 0.88, 0.68 and 0.66 at 1e-4, where the model says 1.03, 0.75, 0.58, 0.47, 0.40 and 1.44, 1.08, 0.84,
# 0.69, 0.58; 1.2 to 1.8 for n = 16 and 64.  Alike for 32 matrices, where the worst choice costs 2 % (n = 128, 1e-6).
EIGH_IN_PRODUCTS = {
    "native": {
        1: ((16, 83.0), (32, 77.0), (64, 44.0), (128, 29.0), (256, 20.0), (512, 15.0), (1024, 12.0), (2048, 10.0)),
        2: ((16, 160.0), (32, 150.0), (64, 76.0), (128, 46.0), (256, 31.0), (512, 20.0), (1024, 13.0), (2048, 11.0)),
    },
    "torch": {
        1: ((16, 93.0), (32, 56.0), (64, 28.0), (128, 19.0), (256, 13.0), (512, 8.0), (1024, 6.0), (2048, 5.0)),
        2: ((16, 120.0), (32, 94.0), (64, 45.0), (128, 26.0), (256, 15.0), (512, 9.0), (1024, 6.0), (2048, 5.0)),
    },
}
WIDE_PRODUCTS = {"native": 2.0, "torch": 3.6}  # what two products cost more in float64
# On a GPU, matrices up to this size are taken through all steps by one program each: M, X and two temporaries of 128
# rows are 256 KiB, the cache of a processor, and such a product takes less time than a launch. Not yet measured.
RESIDENT_ROWS = 128


@dataclass(frozen=True)
class RootPlan:
    """method: "composite", "newton" or "eigh".  schedule: the polynomials, None for eigh.  precision: of the products.

    dtype: in which matrices are kept.  wide: whether the two most sensitive products are in float64.
    mirrored: whether products other than squares may be computed on one triangle and mirrored.
    products: n x n products per matrix.  steps: iterations.  group: matrices that are walked through all steps at once.
    flops: of the products, for the whole batch.  backend: "native", "torch" or "triton", whose verbs are called.
    why: the reason for the method.  resident: all steps of a matrix run in one program, the whole batch in one launch.
    """

    method: str
    p: int
    schedule: Schedule | None
    precision: str
    dtype: torch.dtype
    wide: bool
    mirrored: bool
    products: int
    group: int
    flops: int
    backend: str
    why: str
    resident: bool = False

    @property
    def steps(self) -> int:
        return self.schedule.steps if self.schedule else 0


def power_factors(p: int) -> tuple[int, ...]:
    """Exponents (e1, e2, ...) that sum to p: M Hᵖ is computed as (M H^e1) H^e2 ....

    Multiplying M by two square roots of Hᵖ instead of by Hᵖ itself costs the same and loses less: M H^(p/2) is small
    where M is large, so the second product has nothing to cancel.  (Error at relative ridge 1e-6: 1.7e-3 for 2.0e-3.)
    """
    return (p // 2, p // 2) if p % 2 == 0 else (1,) * p


def _power_products(e: int) -> int:
    """Products for H^e from H, e <= 4: by squaring, and one more for 3."""
    return {1: 0, 2: 1, 3: 2, 4: 2}[e]


def _polynomial_products(degree: int) -> int:
    """Products for a polynomial of this degree in M: M² serves degrees 3 and 4 twice."""
    return {1: 0, 2: 1, 3: 2, 4: 2}[degree]


def degree_of(row: Coefficients) -> int:
    return max(k for k, c in enumerate(row) if c)


def count_products(p: int, schedule: Schedule) -> int:
    """n x n products of a chain: the first X is the polynomial itself, and the last M is not needed."""
    each_m = len(power_factors(p)) + _power_products(power_factors(p)[0])
    polynomials = sum(_polynomial_products(degree_of(row)) for row in schedule.coefficients)
    return polynomials + (schedule.steps - 1) * (1 + each_m)


@lru_cache(maxsize=256)
def composite_schedule(p: int, lower: float, tol: float, cushion: float | None = None) -> Schedule:
    """Minimax steps of degree 2, the last of degree 1 to 4, whichever reaches tol with the fewest products.

    A last step of higher degree costs one product and often saves a step of five: at lower = 1e-6, p = 4, tol = 1e-3
    it needs 22 products for 26.  Its rounding is not amplified by later steps; a first step of degree 4 would multiply
    the error by 10.  A certificate of `tol` bounds the relative error of every eigenvalue of the root.

    Steps before the last are fitted with a cushion (`steepest.schedules.minimax`), CUSHION for p = 4, by default.
    """
    cushion = (CUSHION if cushion is None else cushion) ** (4 / p)
    best = None
    rows, low, high = [], lower ** (1 / p), 1.0
    while True:
        for degree in (1, 2, 3, 4):
            last = minimax(p, low**p, upper=high**p, degree=degree, steps=1).coefficients[0]
            candidate = _schedule((*rows, last), p, lower, "composite minimax")
            cost = count_products(p, candidate)
            if candidate.error <= tol and (best is None or cost < count_products(p, best)):
                best = candidate
        if best is not None:
            return best
        before = high / low
        rows.append(minimax(p, low**p, upper=high**p, steps=1, cushion=cushion).coefficients[0])
        low, high = _schedule(tuple(rows), p, lower, "").intervals[-1]
        if high / low >= before * (1 - 1e-15):
            raise ValueError(f"inverse_root: tol={tol:g} cannot be reached in float64 from a spectrum over {lower:g}")


def _schedule(rows: tuple[Coefficients, ...], p: int, lower: float, name: str) -> Schedule:
    width = max(map(len, rows))
    return Schedule(tuple((*row, *(0.0,) * (width - len(row))) for row in rows), p, lower, 1.0, name)


@lru_cache(maxsize=256)
def newton_schedule(p: int, lower: float, tol: float) -> Schedule:
    """Coupled Newton (Guo and Higham 2006): h(t) = (1 + 1/p) - t/p on the spectrum scaled to (0, (p + 1)/2]."""
    scale = (p + 1) / 2
    step = (1 + 1 / p, -1 / p)
    rows = [tuple(c * scale ** (1 / p + k) for k, c in enumerate(step))]
    while Schedule(tuple(rows), p, lower).error > tol:
        rows.append(step)
        if len(rows) > 200:
            raise ValueError(f"inverse_root: coupled Newton does not reach tol={tol:g} from {lower:g} in 200 steps")
    return Schedule(tuple(rows), p, lower, 1.0, "coupled Newton")


def plan(
    shape,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    p: int = 4,
    ridge: float = 1e-6,
    absolute: bool = False,
    tol: float = 1e-3,
    method: str = "auto",
    precision: str = "auto",
    backend: str = "auto",
) -> RootPlan:
    """What `inverse_root` does with these arguments; raises what it raises."""
    if len(shape) < 2 or shape[-1] != shape[-2]:
        raise ValueError(f"inverse_root: a must be (..., n, n), got shape {tuple(shape)}")
    if not dtype.is_floating_point:
        raise TypeError(f"inverse_root: a has dtype {dtype}, expected a floating dtype")
    _check_options(p, ridge, tol, method, precision, backend)
    device = torch.device(device)
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    numbers = (p, float(ridge), bool(absolute), float(tol))
    return _plan(tuple(shape), dtype, device.type, threads, *numbers, method, precision, backend)


def _check_options(p, ridge, tol, method, precision, backend) -> None:
    if isinstance(p, bool) or p not in ORDERS:
        raise ValueError(f"inverse_root: p is {p!r}, expected one of {', '.join(map(str, ORDERS))}")
    if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not 0 <= ridge < math.inf:
        raise ValueError(f"inverse_root: ridge is {ridge!r}, expected a finite number >= 0")
    if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 0 < tol < 1:
        raise ValueError(f"inverse_root: tol is {tol!r}, expected a number in (0, 1)")
    for name, value, known in (
        ("method", method, METHODS),
        ("precision", precision, PRECISIONS),
        ("backend", backend, ("auto", "native", "torch", "triton")),
    ):
        if value not in known:
            raise ValueError(f"inverse_root: {name} is {value!r}, expected one of {', '.join(known)}")


@lru_cache(maxsize=1024)
def _plan(shape, dtype, device_type, threads, p, ridge, absolute, tol, method, precision, backend) -> RootPlan:
    n, batch = shape[-1], math.prod(shape[:-2])
    backend, precision = _choose_units(dtype, device_type, ridge, absolute, precision, backend)
    floor = RIDGE_FLOOR[precision]
    if method == "auto":
        method, why = _choose_method(n, device_type, threads, p, ridge, absolute, tol, precision, backend)
    else:
        why = "as asked"
    working = torch.float64 if precision == "float64" else torch.float32
    group = batch
    if device_type == "cpu" and backend == "torch" and n:
        # So many matrices that M, X and two temporaries of each stay in cache; native programs see to that themselves.
        group = max(1, min(batch, GROUP_BYTES // (4 * n * n * working.itemsize)))
    if method == "eigh":
        # 4/3 n³ to tridiagonalise and about 8 n³ for vectors, and the assembly.
        numbers = (1, group, 12 * n**3 * batch)
        assembly = backend if device_type == "cpu" else "torch"
        return RootPlan("eigh", p, None, precision, working, False, True, *numbers, assembly, why)
    if method == "composite" and not absolute and ridge < floor:
        raise ValueError(
            f"inverse_root: ridge {ridge:g} is below {floor:g}, the least that composite polynomials bear in "
            f"{precision}; use method='eigh', method='newton' or a wider precision"
        )
    lower = lower_end(floor if absolute else max(ridge, RIDGE_FLOOR["float64"]))
    schedule = (composite_schedule if method == "composite" else newton_schedule)(p, lower, tol)
    wide = (
        device_type == "cpu"
        and precision == "float32"
        and method == "composite"
        and UNIT["float32"] / (p * lower) > tol
    )
    resident = backend == "triton" and n <= RESIDENT_ROWS
    products = count_products(p, schedule)
    mirrored = precision != "tf32"
    if backend == "native":
        flops = 2 * n * symmetric_work(n) * products * batch
    else:
        fraction = 0.5
        if backend == "torch":  # in float64 by `verbs.WholeVerbs`
            fraction = 1.0 if precision == "float64" else symmetric_fraction(n, device_type)
        fraction = tape.symmetric_fraction(n) if resident else fraction
        flops = round(2 * n**3 * products * fraction * batch)
    numbers = (products, max(group, 1), flops)
    return RootPlan(method, p, schedule, precision, working, wide, mirrored, *numbers, backend, why, resident)


def lower_end(ridge: float) -> float:
    """The least eigenvalue of M = (A / lambda + ridge I) (1 - RANGE_MARGIN) / (1 + ridge) for A >= 0."""
    return ridge / (1 + ridge) * (1 - RANGE_MARGIN)


def _choose_units(dtype, device_type, ridge, absolute, precision, backend) -> tuple[str, str]:
    """(backend, precision) of the products."""
    if precision == "auto":
        needs_float64 = dtype == torch.float64 or absolute or ridge < RIDGE_FLOOR["float32"]
        precision = "float64" if needs_float64 else "float32" if device_type == "cpu" else "tf32x3"
    if precision in GPU_PRECISIONS and device_type == "cpu":
        raise ValueError(f"inverse_root: the CPU multiplies in float32 or float64, got precision={precision!r}")
    native = device_type == "cpu" and precision == "float32"
    if backend == "native" and not native:
        raise ValueError(
            f"inverse_root: backend 'native' needs a CPU tensor and float32; got {device_type}, {precision}"
        )
    if backend == "native" or (backend == "auto" and native and native_wins(torch.float32)):
        return "native", precision
    can = device_type == "cuda" and precision != "float64"
    if backend == "triton" and not can:
        raise ValueError(f"inverse_root: backend 'triton' needs a CUDA tensor and not float64; got {device_type}")
    chosen = ("triton" if can else "torch") if backend == "auto" else backend
    if chosen == "torch" and precision in GPU_PRECISIONS:
        precision = "float32"
    return chosen, precision


def _choose_method(n, device_type, threads, p, ridge, absolute, tol, precision, backend) -> tuple[str, str]:
    if absolute:
        return "eigh", "an absolute ridge says nothing about the spectrum relative to its largest eigenvalue"
    if ridge < RIDGE_FLOOR[precision]:
        return "eigh", f"ridge {ridge:g} is below {RIDGE_FLOOR[precision]:g}, the least that polynomials bear"
    try:
        schedule = composite_schedule(p, lower_end(ridge), tol)
    except ValueError:
        return "eigh", f"polynomials do not reach tol={tol:g}"
    products = count_products(p, schedule)
    if device_type != "cpu":
        return "composite", f"{products} products"
    wide = precision == "float32" and UNIT["float32"] / (p * lower_end(ridge)) > tol
    cost = composite_in_products(n, products, wide, backend, whole=precision == "float64")
    other = eigh_in_products(n, threads, backend)
    chosen = "composite" if cost <= other else "eigh"
    return chosen, f"composite costs as much as {cost:.3g} products, eigh as {other:.3g}"


def composite_in_products(n: int, products: int, wide: bool, backend: str, whole: bool = False) -> float:
    """`products` and what is not products, in products of this size.

    native: 13 with 8 rows and a few passes, measured 20, 13, 7, 4, 2.6, 1.8 and 1.4 for n = 16, 32, ... 1024.
    torch: 1.6 times all products at n = 64, 1.3 at 128, 1.04 at 1024.  whole: by `verbs.WholeVerbs`.
    """
    products += WIDE_PRODUCTS[backend] * wide
    if backend == "native":
        return products + 1 + 400 / max(n, 1)
    return products * (1.0 if whole else symmetric_fraction(n, "cpu")) * (1 + 40 / max(n, 1))


def eigh_in_products(n: int, threads: int, backend: str) -> float:
    """EIGH_IN_PRODUCTS interpolated in log n, and constant beyond its ends."""
    table = EIGH_IN_PRODUCTS[backend][1 if threads == 1 else 2]
    if n <= table[0][0]:
        return table[0][1]
    for (n0, c0), (n1, c1) in zip(table, table[1:]):
        if n <= n1:
            return c0 * (c1 / c0) ** (math.log(n / n0) / math.log(n1 / n0))
    return table[-1][1]
