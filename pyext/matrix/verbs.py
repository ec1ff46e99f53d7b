"""The few matrix operations ("verbs") that algorithms are written over, and their implementation by torch.

An algorithm takes a `Verbs` object and never asks which backend it is; a backend replaces verbs, not algorithms.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

# On the CPU a symmetric n × n result is computed in row panels up to the diagonal, then mirrored. Time relative to the
# full product with panels of 96, 128, 192, 256, 384 rows (torch 2.13, MKL, one AVX-512 Zen 4 core, float32):
#     n =  512   .76 .77 .78 .83 .89        n = 1024   .68 .70 .69 .70 .74
#     n =  768   .65 .65 .69 .73 .77        n = 2048   .65 .64 .61 .61 .61
# Each panel and each mirrored block is one more parallel region, which below 512 costs two threads what it saves.
PANEL_ROWS = 192
PANELS_FROM = 512


class Verbs(Protocol):
    """Operations on (..., n, n) and (..., n, m) tensors of one dtype and device; each returns a new tensor."""

    def gram(self, x: Tensor) -> Tensor:
        """X Xᵀ for x (..., n, m); gram(x.mT) is XᵀX."""

    def symmetric_product(
        self,
        a: Tensor,
        b: Tensor,
        *,
        alpha: float = 1.0,
        beta: float = 0.0,
        c: Tensor | None = None,
        diagonal: float = 0.0,
    ) -> Tensor:
        """alpha·A B + beta·C + diagonal·I for symmetric A, B, C, where A and B commute, so that A B is symmetric."""

    def commuting_product(self, a: Tensor, b: Tensor, *, beta: float = 0.0, c: Tensor | None = None) -> Tensor:
        """A B + beta·C like `symmetric_product`, but every element is computed: where operands are rounded (tf32),
        mirroring a product that is not a square destroys what is small in it."""

    def long_product(self, q: Tensor, x: Tensor, *, alpha: float = 1.0, shift: float = 0.0) -> Tensor:
        """alpha·Q X + shift·X for symmetric q (..., n, n) and x (..., n, m), rounded to half precision only once."""

    def combination(
        self,
        a: Tensor,
        *,
        alpha: float = 1.0,
        beta: float = 0.0,
        c: Tensor | None = None,
        diagonal: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """alpha·A + beta·C + diagonal·I in `dtype`, by default a's; may be `a` itself where nothing changes.

        Over tensors `diagonal` may be one of (..., 1, 1): a number for every matrix.
        """

    def norm(self, a: Tensor) -> Tensor:
        """‖A‖_F, summed in float64: (..., 1, 1) in float64."""

    def divided(self, a: Tensor, by: Tensor, *, power: float, factor: float) -> Tensor:
        """A / (factor·by^power) for `by` as `norm` gives it, 0 counting as 1."""

    def spectral_bound(self, sizes: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """min(1, ‖Y‖_F, 2 maxᵢ ‖afterᵢ‖ / ‖beforeᵢ‖) (1 + 2^-12), (..., 1, 1) in float64, for the sizes of
        `symmetrised` and the rows of V Yᵏ and V Yᵏ⁺¹; 0 for zero. An upper bound stays one after rounding: sums of n
        terms err by n u at most, in practice by √n u."""

    def symmetrised(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """(Y, sizes): Y = (A + Aᵀ) / (2 r), r the largest row sum of |A + Aᵀ| / 2: no eigenvalue of Y exceeds 1, the
        largest is at least 1/√n. sizes (..., 1, 2) in float64: r and ‖Y‖_F. Zero gives zero, NaN or Inf NaN."""

    def run(self, algorithm, tensors: tuple, options: tuple = ()):
        """algorithm(verbs, *tensors, *options), for tensors (batch, rows, cols) and hashable options."""


class TensorVerbs:
    """The verbs that need no products, by torch's elementwise operations."""

    def combination(
        self,
        a: Tensor,
        *,
        alpha: float = 1.0,
        beta: float = 0.0,
        c: Tensor | None = None,
        diagonal: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        out = a.to(dtype or a.dtype)
        if alpha != 1:
            out = out * alpha
        if c is not None:
            out = torch.add(out, c, alpha=beta)
        if isinstance(diagonal, Tensor):
            diagonal = diagonal[..., 0]
        elif diagonal == 0:
            return out
        out = out.clone() if out is a else out
        out.diagonal(dim1=-2, dim2=-1).add_(diagonal)
        return out

    def norm(self, a: Tensor) -> Tensor:
        return torch.linalg.vector_norm(a.flatten(1), dim=1, dtype=torch.float64)[:, None, None]

    def divided(self, a: Tensor, by: Tensor, *, power: float, factor: float) -> Tensor:
        by = by.where(by != 0, 1) ** power * factor
        if a.dtype in (torch.float32, torch.float64):
            return a / by.to(a.dtype)
        return (a.float() / by.float()).to(a.dtype)

    def spectral_bound(self, sizes: Tensor, before: Tensor, after: Tensor) -> Tensor:
        before, after = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64) for x in (before, after))
        growth = (after / before.where(before != 0, 1)).amax(-1)[:, None, None]
        return torch.minimum(sizes[..., 1:].clamp(max=1), 2 * growth) * (1 + 2.0**-12)

    def symmetrised(self, a: Tensor) -> tuple[Tensor, Tensor]:
        # By max |a| first, so that no sum leaves the range.
        largest = torch.linalg.vector_norm(a.flatten(1), math.inf, dim=1)[:, None, None]
        y = a / largest.where(largest != 0, 1)
        y = torch.add(y, y.mT).mul_(0.5)
        rows = y.abs().sum(-1).amax(-1)[:, None, None]
        y.div_(rows.where(rows != 0, 1))
        norm = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True)
        return y, torch.cat((rows.double() * largest.double(), norm.double()), dim=-1)

    def run(self, algorithm, tensors: tuple, options: tuple = ()):
        return algorithm(self, *tensors, *options)


class TorchVerbs(TensorVerbs):
    """The verbs by torch's batched products, in the operands' dtype; on the CPU float32 and float64.

    Results are symmetric up to rounding. The other matrices of a batch have no influence on a matrix; in float32 it
    comes out bit for bit as it would alone if matrices follow each other at multiples of 64 bytes (MKL rounds by
    alignment, and in float64 by the number of matrices: 191 rows on a Xeon of 2023).
    """

    panels = True  # large symmetric results are computed up to the diagonal and mirrored

    def gram(self, x: Tensor) -> Tensor:
        """X Xᵀ, 2n²m FLOPs times `symmetric_fraction`."""
        return _symmetric(x, x.mT, alpha=1.0, beta=0.0, c=None, panels=self.panels)

    def symmetric_product(
        self,
        a: Tensor,
        b: Tensor,
        *,
        alpha: float = 1.0,
        beta: float = 0.0,
        c: Tensor | None = None,
        diagonal: float = 0.0,
    ) -> Tensor:
        """alpha·A B + beta·C + diagonal·I, 2n³ FLOPs times `symmetric_fraction`."""
        if c is None and beta != 0:
            raise ValueError(f"symmetric_product: beta is {beta}, but c is None")
        out = _symmetric(a, b, alpha=alpha, beta=beta, c=c, panels=self.panels)
        if diagonal != 0:
            out.diagonal(dim1=-2, dim2=-1).add_(diagonal)
        return out

    def commuting_product(self, a: Tensor, b: Tensor, *, beta: float = 0.0, c: Tensor | None = None) -> Tensor:
        """A B + beta·C, 2n³ FLOPs."""
        return general_product(a, b, beta, c)

    def long_product(self, q: Tensor, x: Tensor, *, alpha: float = 1.0, shift: float = 0.0) -> Tensor:
        """alpha·Q X + shift·X, 2n²m FLOPs, in the memory order of x: where that is a transposed matrix, as (Xᵀ Q)ᵀ."""
        if x.dtype in (torch.float16, torch.bfloat16):
            return rounded_once(q, x, alpha, shift)
        q = q if alpha == 1 else q * alpha
        transposed = x.mT.is_contiguous() and not x.is_contiguous()
        product = torch.matmul(x.mT, q).mT if transposed else torch.matmul(q, x)
        return product.add_(x, alpha=shift) if shift else product


class WholeVerbs(TorchVerbs):
    """TorchVerbs that mirror nothing, for roots in float64, which alone go down to a ridge of 1e-14.

    Panels leave the blocks on the diagonal as asymmetric as rounding makes them, beside mirrored ones, and steep
    polynomials enlarge the contradiction: |X^4 S - I| of 512 rows at ridge 1e-12 was 2e5 with panels and is 2e-2.
    """

    panels = False


def rounded_once(q: Tensor, x: Tensor, alpha: float, shift: float) -> Tensor:
    """alpha·Q X + shift·X with the sum in the product's float32 accumulator: Q X and shift·X nearly cancel for the
    singular values near 1, and rounding Q X to half precision first was seen to let some grow to 7."""
    flat = torch.baddbmm(_flat(x), _flat(q), _flat(x), alpha=alpha, beta=shift)
    return flat.reshape(x.shape)


def general_product(a: Tensor, b: Tensor, beta: float, c: Tensor | None) -> Tensor:
    """A B + beta·C with the sum in the product's accumulator."""
    out = torch.empty_like(a)
    torch.baddbmm(_flat(out if c is None else c), _flat(a), _flat(b), beta=beta, out=_flat(out))
    return out


def panel_ends(n: int, device_type: str) -> list[int]:
    """The row after the last one of each panel in which TorchVerbs computes a symmetric n × n result."""
    if device_type != "cpu" or n < PANELS_FROM:
        return [n]
    return [*range(PANEL_ROWS, n, PANEL_ROWS), n]


def symmetric_fraction(n: int, device_type: str) -> float:
    """The part of a general product's FLOPs that TorchVerbs spends on a symmetric n × n result, (1 + 1/n)/2 or more."""
    ends = panel_ends(n, device_type)
    return sum((end - start) * end for start, end in zip([0, *ends], ends)) / n**2 if n else 1.0


def _symmetric(a: Tensor, b: Tensor, *, alpha: float, beta: float, c: Tensor | None, panels: bool) -> Tensor:
    """alpha·A B + beta·C, known to be symmetric, for a (..., n, k) and b (..., k, n)."""
    n = a.shape[-2]
    out = a.new_empty(*a.shape[:-1], n)
    flat_a, flat_b, flat = _flat(a), _flat(b), _flat(out)
    flat_c = flat if c is None else _flat(c)  # beta = 0 leaves it unread
    # Every product is a batched one, also of a single matrix: MKL's gemm and batched gemm round differently.
    ends = panel_ends(n, a.device.type) if panels else [n]
    for start, end in zip([0, *ends], ends):
        panel = flat[:, start:end, :end]
        torch.baddbmm(
            flat_c[:, start:end, :end], flat_a[:, start:end], flat_b[:, :, :end], alpha=alpha, beta=beta, out=panel
        )
    for start, end in zip(ends, ends[1:]):
        flat[:, :start, start:end] = flat[:, start:end, :start].mT
    return out


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, -3) if x.dim() > 3 else x.expand(1, *x.shape) if x.dim() == 2 else x


@contextmanager
def full_float32():
    """Float32 products round to float32 inside, whatever torch.set_float32_matmul_precision or its successors allow.

    With "medium" or fp32_precision = "bf16", torch hands CPU products to oneDNN with permission to multiply in
    bfloat16, which it does where the CPU has matrix units for it (measured without them: other rounding, same
    accuracy); "high" and "tf32" do the like on CUDA. The settings are process-wide; they are put back on leaving, and
    not touched where they already ask for float32.
    """
    found = [(m, m.fp32_precision) for m in (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)]
    changed = [(m, precision) for m, precision in found if precision not in ("ieee", "none")]
    for m, _ in changed:
        m.fp32_precision = "ieee"
    try:
        yield
    finally:
        for m, precision in changed:
            m.fp32_precision = precision
