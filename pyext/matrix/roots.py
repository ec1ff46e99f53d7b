"""Inverse p-th roots of symmetric positive definite matrices, in batches: planned first, executed as planned."""

from __future__ import annotations

import logging
import math
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from steepest.matrix import tape
from steepest.matrix.native import NativeVerbs
from steepest.matrix.root_plan import PROBES, RANGE_MARGIN, RIDGE_FLOOR, RootPlan, degree_of, plan, power_factors
from steepest.matrix.verbs import TensorVerbs, TorchVerbs, Verbs, WholeVerbs, full_float32
from steepest.schedules import Coefficients

_log = logging.getLogger("steepest")

# A block whose root has a larger residual is not ok.  A good one had 0.41 at most (8 x 8, p = 8, ridge 1e-6, rank
# 2, float32; p <= 4: 0.11); an eigenvalue of A at -3 ridge lambda made it at least 23 for n up to 400, and it falls
# like 1/sqrt(n) then.
RESIDUAL_LIMIT = 1.0


class RootStatus(NamedTuple):
    """What became of each matrix, as tensors of a's batch shape on a's device.

    ok: False where the input was not finite or not positive definite enough; such a block comes out as `previous`, or
        NaN without one.
    iterations: steps taken, 0 for eigh.  residual: root mean square over random unit vectors v of
        |X^q S X^(p-q) v - v|, q = p // 2, S the matrix with its ridge; for eigh the larger of |Q Qᵀ v - v| and
        |(Q W Qᵀ - A) v| / lambda.
    scale: the lambda of the ridge, between the largest |eigenvalue| and twice that; 1 for a zero matrix.
    """

    ok: Tensor
    iterations: Tensor
    residual: Tensor
    scale: Tensor


def inverse_root(
    a: Tensor,
    p: int = 4,
    *,
    ridge: float = 1e-6,
    absolute: bool = False,
    tol: float = 1e-3,
    method: str = "auto",
    return_status: bool = False,
    previous: Tensor | None = None,
    precision: str = "auto",
    backend: str = "auto",
):
    """(A + ridge·λ·I)^(-1/p) of every matrix of a, symmetric; with return_status also a `RootStatus`.

    λ bounds the largest eigenvalue within a factor of 2, λmax ≤ λ ≤ 2 λmax; with absolute=True `ridge` itself is added.
    The ridge is never written into a.

    "composite" runs minimax polynomials hₖ on M = (A + ridge λ I)/ν, whose spectrum is in [lower, 1]:
    X ← X hₖ(M), M ← M hₖ(M)^p, until the certified error sup |1 - t^(1/p) Π hₖ| over [lower, 1] is at most tol.  All
    steps are fixed in advance by (p, ridge, tol, precision): nothing is read back from the device.  "newton" is the
    coupled Newton iteration, for comparison: three times the products.  "eigh" is torch.linalg.eigh, its
    orthogonality and residual checked.  "auto" takes composite, or eigh where ridge is absolute or too small for
    polynomials, or where a measured cost model says that eigh is faster (large matrices on a CPU).

    a: (..., n, n), float64, float32, float16 or bfloat16, any strides; only its symmetric part counts; never changed.
        Returns the same shape and dtype, without gradient.  Worked on in float32, or float64 for float64 input, an
        absolute ridge, or a ridge below 1e-6.
    p: 1, 2, 3, 4, 6 or 8.  For other rational exponents multiply roots.
    ridge: relative to λ; composite polynomials need 1e-6 in float32 and tf32x3, 1e-5 in bf16x3, 3e-4 in tf32, 1e-14 in
        float64.
    previous: what a block that fails comes out as; NaN by default.  A failed block does not disturb the others: each
        comes out bit for bit the same whatever the rest of the batch is.  A zero block gives ridge^(-1/p)·I.
    precision: "auto", or "float64", "float32" and on CUDA "tf32x3", "bf16x3", "tf32".
    backend: "auto", "native" (the C library's kernels, on the CPU in float32), "torch" or "triton".

    Accuracy: relative error in the Frobenius norm at most tol + 3 u κ / p with κ = 1/ridge and u the unit roundoff
    (steepest.conformance.root_bounds derives it).  On the CPU the two products whose rounding is amplified by κ, both
    in the first step, are in float64 where u κ / p exceeds tol.  (Rank 32 of 128, ridge 1e-6: 1.7e-3 with, 8.6e-3
    without; newton 5.0e-3, eigh in float32 1.8e-2, whose bound has 2 r + u for 3 u, r the status's residual: what
    LAPACK leaves depends on the spectrum.)  With e that bound for a side, L^(-1/4) G R^(-1/4) is off by at most
    (1 + e)² - 1, relatively; and |X^p S - I|₂ is at most (1 + tol)^p - 1 + 2 (3 + iterations) √n u κ: coupled Newton's
    6 √n u κ at κ = 1e6 is what is seen here too.

    Cost: `plan(...).products` products of n × n matrices, 22 for p = 4, ridge 1e-6, tol 1e-3; 16 for 1e-4; and some
    15 products with 8 columns for λ and the residual.  Memory besides the result: three copies of a, and scratch of
    five matrices per thread.

    Raises TypeError for a dtype that is not floating; ValueError for a shape that is not (..., n, n), a p, ridge, tol,
    method, precision or backend out of range, and a ridge that the asked method and precision cannot bear.

    Sources: Higham, Functions of Matrices, 2008, chapter 7; Guo and Higham, 2006 (coupled Newton); Amsel et al., arXiv
    2505.16932 (greedy composition, for p = 2); Dixon, 1983 (power method from random vectors).
    """
    if not isinstance(a, Tensor):
        raise TypeError(f"inverse_root: a is a {type(a).__name__}, expected a torch.Tensor")
    if previous is not None and (previous.shape != a.shape or previous.device != a.device):
        shape = tuple(a.shape)
        raise ValueError(f"inverse_root: previous is {tuple(previous.shape)} on {previous.device}, expected {shape}")
    options = {"p": p, "ridge": ridge, "absolute": absolute, "tol": tol, "method": method}
    todo = plan(a.shape, a.dtype, a.device, precision=precision, backend=backend, **options)
    if backend == "auto":
        _log_choice(a.device.type, todo.backend)
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False), full_float32():
        flat = a.detach().reshape(math.prod(a.shape[:-2]), *a.shape[-2:])
        roots, status = execute(flat, todo, ridge, absolute, _verbs(todo))
        if previous is not None:
            roots = torch.where(status.ok[:, None, None], roots, previous.detach().reshape(flat.shape).to(roots.dtype))
        roots = roots.to(a.dtype).reshape(a.shape)
    if not return_status:
        return roots
    return roots, RootStatus(*(field.reshape(a.shape[:-2]) for field in status))


@cache
def _log_choice(device_type: str, backend: str) -> None:
    _log.info("inverse_root: backend 'auto' on %s uses %s", device_type, backend)


def _verbs(todo: RootPlan) -> Verbs:
    if todo.backend == "native":
        return NativeVerbs()
    if todo.backend == "torch":
        return WholeVerbs() if todo.precision == "float64" else TorchVerbs()
    from steepest.matrix.triton_verbs import TritonVerbs

    return TritonVerbs("ieee" if todo.precision == "float32" else todo.precision)


def effective_dimension(a: Tensor) -> Tensor:
    """(tr A)² / tr(A²) of every symmetric matrix of a (..., n, n): how many eigenvalues share the trace, from 1 to n.

    With eigenvalues λᵢ >= 0 it is (Σ λᵢ)² / Σ λᵢ², found without them: tr(A²) = ‖A‖_F².  0 for a zero matrix, NaN for
    one with NaN or inf.  Computed in float64 for float64 and in float32 otherwise, scaled by max |a| so that squares
    stay in range; returned in that dtype, without gradient.  Cost: one read of a.

    Raises TypeError for a dtype that is not floating and ValueError for a shape that is not (..., n, n).
    """
    if not isinstance(a, Tensor) or not a.is_floating_point():
        raise TypeError(
            f"effective_dimension: a is {getattr(a, 'dtype', type(a).__name__)}, expected a floating tensor"
        )
    if a.dim() < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"effective_dimension: a must be (..., n, n), got shape {tuple(a.shape)}")
    wide = a.detach().to(torch.promote_types(a.dtype, torch.float32))
    if not a.shape[-1]:
        return wide.new_zeros(a.shape[:-2])
    largest = wide.abs().amax((-2, -1), keepdim=True)
    y = wide / largest.where(largest != 0, 1)
    squares = y.square().sum((-2, -1))
    return y.diagonal(dim1=-2, dim2=-1).sum(-1).square() / squares.where(squares != 0, 1)


def execute(a: Tensor, todo: RootPlan, ridge: float, absolute: bool, verbs: Verbs) -> tuple[Tensor, RootStatus]:
    """A plan on a (batch, n, n); a few matrices at a time go through all steps, so that they stay in cache."""
    batch, n = a.shape[0], a.shape[-1]
    if not batch or not n:
        ones = torch.ones(batch, dtype=todo.dtype, device=a.device)
        return a.to(todo.dtype), RootStatus(ones.bool(), ones.int() * todo.steps, 0 * ones, ones)
    solve = _by_eigh if todo.method == "eigh" else _by_polynomials
    parts = [solve(part, todo, ridge, absolute, verbs) for part in a.split(todo.group)]
    roots, *fields = (torch.cat(column) if len(column) > 1 else column[0] for column in zip(*parts))
    return roots, RootStatus(*fields)


def _by_polynomials(a, todo, ridge, absolute, verbs):
    a = a.to(torch.promote_types(a.dtype, todo.dtype))
    start = _directions(a.shape[-1], todo.dtype, a.device)[None]
    # An absolute ridge is another number for every matrix, which recorded algorithms cannot have.
    run = TensorVerbs.run if absolute else type(verbs).run
    x, sizes, bound, deviation = run(verbs, _root_chain, (a, start), (todo, ridge, absolute))
    zero, scale = sizes[:, 0, 0] == 0, _scale(sizes, bound)[:, 0, 0]
    relative = ridge / scale if absolute else ridge
    residual = deviation[:, 0, 0].to(todo.dtype) / math.sqrt(PROBES)
    ok = (residual <= RESIDUAL_LIMIT) & (relative >= RIDGE_FLOOR[todo.precision])  # False for NaN
    # (A + ridge scale I)^(-1/p) = X (nu scale)^(-1/p)
    factor = ((_nu(relative) * scale) ** (-1 / todo.p)).to(todo.dtype)
    return _finish(x, factor, ok, zero, ridge, todo, residual, scale.to(todo.dtype))


def _scale(sizes: Tensor, bound: Tensor) -> Tensor:
    """λ of A from the sizes of `Verbs.symmetrised` and λ of Y: (batch, 1, 1) in float64, 1 for a zero matrix."""
    return torch.where(sizes[..., :1] == 0, 1.0, sizes[..., :1] * bound)


def _nu(relative):
    """Just above the norm 1 + relative of Y / λ + relative I, which nu divides."""
    return (1 + relative) / (1 - RANGE_MARGIN)


def _power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent by way of float64: torch's vectorised float32 power rounds an element by its place in the tensor."""
    return (x.double() ** exponent).to(x.dtype)


def _finish(x, factor, ok, zero, ridge, todo, residual, scale):
    """X times the factor, failed blocks NaN, zero blocks exact; (roots, ok, iterations, residual, scale)."""
    if ridge > 0:
        ok, residual = ok | zero, torch.where(zero, 0.0, residual)
    ok = ok & torch.isfinite(scale)
    x *= torch.where(ok, factor, torch.nan)[:, None, None]
    diagonal = x.diagonal(dim1=-2, dim2=-1)
    if ridge > 0:  # off the diagonal a zero block is exactly zero already
        diagonal.copy_(torch.where(zero[:, None], ridge ** (-1 / todo.p), diagonal))
    # The largest element of a positive definite matrix is on its diagonal; above the largest number it is inf.
    finite = torch.isfinite(diagonal.amax(-1))
    if todo.p < 4:  # a fourth root of the smallest float32 number is far from that
        x *= torch.where(finite, 1.0, torch.nan)[:, None, None]
    iterations = torch.full(ok.shape, todo.steps, dtype=torch.int32, device=x.device)
    return x, ok & finite, iterations, residual, scale


def _symmetrised(verbs: Verbs, a):
    """As a program of its own: what follows it in `_by_eigh` is no verb."""
    return verbs.symmetrised(a)


def power_steps(n: int) -> int:
    """Steps after which PROBES power iterations underestimate |λ|max by 2 with a probability below 1e-12.

    A Gaussian start v has |v₁| / ‖v‖ <= e with probability at most 0.8 e √n (Dixon 1983), and m steps underestimate by
    2 only if that ratio is below 2^-m; all PROBES must.  0.8 √n 2^-m <= 1e-12^(1/8) = 0.0316 asks for
    m >= log2(√n) + 4.66.
    """
    return math.ceil(0.5 * math.log2(n) + 4.66)


@cache
def _directions(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """PROBES random unit vectors as rows: Vᵀ A took a fifth of the time of A V with MKL (4 x 128 x 128, 8 vectors)."""
    generator = torch.Generator().manual_seed(n)
    v = torch.randn(PROBES, n, generator=generator, dtype=torch.float64)
    return (v / v.norm(dim=1, keepdim=True)).to(device=device, dtype=dtype)


def _root_chain(verbs: Verbs, a, v, todo: RootPlan, ridge: float, absolute: bool):
    """(X, sizes, λ of Y, ‖V X^q M X^(p-q) - V‖_F), q = p // 2: the root of M, and what its residual is measured by."""
    y, sizes, bound = bounded(verbs, a, v, todo.dtype)
    relative = ridge / _scale(sizes, bound) if absolute else ridge
    m = verbs.divided(y, bound, power=1.0, factor=_nu(relative))
    m = verbs.combination(m, diagonal=relative / _nu(relative))
    x, probed = iterate(m, todo, verbs), v
    for factor in (*(x,) * (todo.p // 2), m, *(x,) * (todo.p - todo.p // 2)):
        probed = verbs.long_product(factor, probed.mT).mT
    return x, sizes, bound, verbs.norm(verbs.combination(probed, beta=-1.0, c=v))


def bounded(verbs: Verbs, a, v, dtype: torch.dtype):
    """(Y, sizes, λ): A scaled by its largest row sum, and λ with |λ|max <= λ <= 2 |λ|max of Y; 0 for zero.

    λ is twice the best of PROBES power iterations from the rows of V, which is at most 2 |λ|max, and at least |λ|max
    but for a probability of 1e-12 (`power_steps`); or an upper bound if that is smaller: 1 or the Frobenius norm.
    |λ|max of Y is at least 1/√n, so nothing underflows.

    It starts from random vectors at every refresh.  A vector kept from the last one would make it no tighter and save
    no product: the ridge is relative to λ, so that products follow from (p, ridge, tol) alone.  Measured on 60 steps of
    Shampoo for the demo model (width 48, 3312 refreshes, beta2 from 0.5 to 0.999, in every step or every tenth):
    λ / |λ|max was 1.04 in the median and 1.62 at most, since the Frobenius norm of a statistic is close to it.  Two
    steps from even the exact eigenvector of the last refresh gave less than half of |λ|max in 20 of 3192 refreshes
    (0.23 of it at least), where M would leave [0, 1] and the block keep a stale root.  The steps that it would save are
    6 % of the time at n = 16, 3 % at 128 and 0.7 % at 1024 (one core).
    """
    y, sizes = verbs.symmetrised(a)
    y = verbs.combination(y, dtype=dtype)
    for _ in range(power_steps(y.shape[-1])):
        before, v = v, verbs.long_product(y, v.mT).mT
    return y, sizes, verbs.spectral_bound(sizes, before, v)


def iterate(m: Tensor, todo: RootPlan, verbs: Verbs, wide_verbs: Verbs | None = None) -> Tensor:
    """M^(-1/p) for m (batch, n, n) with spectrum in [lower, 1]: every product is of polynomials in M, so symmetric.

    Each factor is c I + C and only C is multiplied: rounding I + small would lose the small part.  `wide_verbs`, by
    default the same, take the float64 products of a wide plan.
    """
    if todo.resident and hasattr(verbs, "chain"):  # verbs that only watch or err on purpose go step by step
        return _resident(m, todo, verbs)
    wide_verbs = wide_verbs or verbs
    x = None
    for k, row in enumerate(todo.schedule.coefficients):
        wide = todo.wide and k == 0
        m = wide_verbs.combination(m, dtype=torch.float64) if wide else m
        c = verbs.combination(polynomial(m, row, wide_verbs if wide else verbs), dtype=todo.dtype)
        h = c, row[0]
        x = verbs.combination(c, diagonal=row[0]) if x is None else times(x, h, verbs, todo.mirrored)
        if k + 1 < todo.steps:
            first, *others = power_factors(todo.p)
            factor, shift = power(h, first, verbs, todo.mirrored)
            # The one product whose rounding is amplified by 1 / lower; m is small after it where it was large.
            factor_m = wide_verbs.combination(factor, dtype=m.dtype) if wide else factor
            m = times(m, (factor_m, shift), wide_verbs if wide else verbs, todo.mirrored)
            m = verbs.combination(m, dtype=todo.dtype)
            for e in others:
                m = times(m, (factor, shift) if e == first else power(h, e, verbs, todo.mirrored), verbs, todo.mirrored)
    return x


def _resident(m: Tensor, todo: RootPlan, verbs: Verbs) -> Tensor:
    """The same in one launch."""
    n = m.shape[-1]
    y = tape.padded(m)
    x = verbs.chain(_tape(todo, y.shape[-1]), y)
    return x if x.shape == m.shape else x[:, :n, :n].contiguous()


@lru_cache(maxsize=256)
def _tape(todo: RootPlan, n: int) -> tape.Chain:
    return tape.allocate(*tape.record(lambda m, verbs: iterate(m, todo, verbs), n, n), n, n)


def polynomial(m: Tensor, row: Coefficients, verbs: Verbs) -> Tensor:
    """C = c1 M + c2 M² + ...: the polynomial of `row` without its constant."""
    c = row[1 : degree_of(row) + 1]
    if len(c) == 1:
        return verbs.combination(m, alpha=c[0])
    if len(c) == 2:
        return verbs.symmetric_product(m, m, alpha=c[1], beta=c[0], c=m)
    z = verbs.symmetric_product(m, m)
    rest = verbs.combination(m, alpha=c[0], beta=c[1], c=z)
    factor = verbs.combination(m, alpha=c[2], beta=c[3] if len(c) == 4 else 0.0, c=z if len(c) == 4 else None)
    return verbs.symmetric_product(factor, z, beta=1.0, c=rest)


def power(h: tuple[Tensor, float], e: int, verbs: Verbs, mirrored: bool) -> tuple[Tensor, float]:
    """H^e = K + s I for H = C + c I, as (K, s); e from 1 to 4."""
    c, s = h
    if e == 1:
        return h
    square = verbs.symmetric_product(c, c, beta=2 * s, c=c), s * s
    if e == 2:
        return square
    if e == 4:
        return power(square, 2, verbs, mirrored)
    k, t = square
    product = verbs.symmetric_product if mirrored else verbs.commuting_product
    return product(k, c, beta=1.0, c=verbs.combination(k, alpha=s, beta=t, c=c)), s * t


def times(y: Tensor, h: tuple[Tensor, float], verbs: Verbs, mirrored: bool) -> Tensor:
    """Y (C + s I), with s Y in the product's accumulator."""
    product = verbs.symmetric_product if mirrored else verbs.commuting_product
    return product(y, h[0], beta=h[1], c=y)


def _size(v: Tensor) -> Tensor:
    """Root mean square of the rows' norms."""
    return torch.linalg.vector_norm(v, dim=(-2, -1)) / math.sqrt(PROBES)


def _by_eigh(a, todo, ridge, absolute, verbs):
    """Q f(W) Qᵀ with W and Q from torch.linalg.eigh, which are checked: wrong ones are on record."""
    y, sizes = verbs.run(_symmetrised, (a.to(torch.promote_types(a.dtype, todo.dtype)),))
    y, largest = y.to(todo.dtype), sizes[:, 0, 0]
    zero, finite = largest == 0, torch.isfinite(largest)
    largest = torch.where(zero, 1.0, largest)
    if y.is_cuda or not bool(finite.all()):  # LAPACK raises for NaN, and the others would be lost
        y = torch.where(finite[:, None, None], y, 1.0)
    w, q = _eigh(y)
    bound = torch.where(zero, 1.0, w.abs().amax(-1) * (1 + 2.0**-12))
    relative = (ridge / largest).to(y.dtype) if absolute else ridge * bound
    n = y.shape[-1]
    # Backward error of LAPACK, and of rounding a to its dtype: at most these, seen below a third of them.
    allowed, stored = (10 * math.sqrt(n) * torch.finfo(t).eps / 2 for t in (todo.dtype, a.dtype))
    # An eigenvalue that rounding alone can have made negative counts as zero.
    shifted = torch.where(w >= -max(allowed, stored) * bound[:, None], w.clamp(min=0), w) + relative[:, None]
    # Q f(W) Qᵀ as a Gram matrix: symmetric; q is stored by columns, which MKL rounds differently in every batch.
    weighted = q * _power(shifted, -0.5 / todo.p)[:, None, :]
    x = verbs.gram(weighted if todo.backend == "native" else weighted.contiguous())
    v = _directions(n, y.dtype, y.device).expand(len(y), -1, -1)
    rotated = torch.matmul(v, q)
    orthogonal = _size(torch.matmul(rotated, q.mT) - v)
    restored = _size(torch.matmul(rotated * w[:, None, :], q.mT) - torch.matmul(v, y)) / bound
    ok = finite & (orthogonal <= allowed) & (restored <= allowed) & (shifted.amin(-1) > 0)
    return _finish(
        x, (largest ** (-1 / todo.p)).to(x.dtype), ok, zero, ridge, todo, torch.maximum(orthogonal, restored),
        (bound * largest).to(x.dtype),
    )  # fmt: skip


def _eigh(y: Tensor) -> tuple[Tensor, Tensor]:
    """Batched; where LAPACK gives one matrix up, the others are solved one by one and that one is NaN.

    y is symmetric to the bit; its transposed view lies as LAPACK wants it (1024 rows: 42.4 ms, 45.5 with a copy).
    """
    try:
        return torch.linalg.eigh(y.mT)
    except torch.linalg.LinAlgError:
        w, q = torch.full_like(y[..., 0], torch.nan), torch.full_like(y, torch.nan)
        for i, matrix in enumerate(y):
            try:
                w[i], q[i] = torch.linalg.eigh(matrix.mT)
            except torch.linalg.LinAlgError:
                _log.warning("inverse_root: eigh did not converge for matrix %d of a batch", i)
        return w, q
