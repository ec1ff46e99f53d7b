"""What the matrix kernels share: walking the tiles of a triangle, one tile of a product, storing it and its mirror."""

from __future__ import annotations

import triton
import triton.language as tl

from .portable import dot, narrow, trip_count, widen

# Rows of tiles that are walked together: the tiles at work at one time then share operand panels in L2.
GROUP = tl.constexpr(8)


@triton.jit
def triangular_row(t):
    """The row of the t-th pair (row, column <= row), counted row by row; exact for 0 <= t < 2^31 - 2^16.

    Every step is monotone and correctly rounded, so its value at the first and last pair of each row decides: there
    the float32 root is never too small, and at most one row too large (tests/interpret checks every row).
    """
    row = ((tl.sqrt_rn(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int64)
    return tl.where(row * (row + 1) // 2 > t, row - 1, row)


@triton.jit
def triangular_tile(t, rows):
    """Maps 0 <= t < rows (rows + 1) / 2 onto the pairs (row, column <= row), group of rows by group of rows.

    Inside a group the full columns come first, down each column, then the triangle at the end.
    """
    first = triangular_row(t) // GROUP * GROUP
    height = tl.minimum(rows - first, GROUP)
    rest = t - first * (first + 1) // 2
    if rest < first * height:
        row = first + rest % height
        column = rest // height
    else:
        within = triangular_row(rest - first * height)
        row = first + within
        column = first + rest - first * height - within * (within + 1) // 2
    return row, column


@triton.jit
def load_tile(base, i, j, rows, columns, i_stride, j_stride):
    """M[i, j], zero outside rows × columns."""
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    return tl.load(base + i[:, None] * i_stride + j[None, :] * j_stride, mask=inside, other=0.0)


@triton.jit
def product_tile(
    a,
    b,
    rows,
    columns,
    n,
    k,
    a_stride,
    b_stride,
    K_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Σ_k A[rows, k] B[columns, k] in float32."""
    acc = tl.zeros((TILE, TILE), dtype=tl.float32)
    for step in range(0, trip_count(tl.cdiv(k, TILE_K))):
        ks = step * TILE_K + tl.arange(0, TILE_K)
        # Each operand is loaded the way the product reads it: Triton 3.9 does not pipeline a load that is transposed
        # on its way to the left operand (sm_80, sm_120).
        if K_LAST:
            left = load_tile(a, rows, ks, n, k, a_stride, 1)
            right = load_tile(b, ks, columns, k, n, 1, b_stride)
        else:
            left = load_tile(a, rows, ks, n, k, 1, a_stride)
            right = load_tile(b, ks, columns, k, n, b_stride, 1)
        acc = dot(left, right, acc, PRECISION)
    return acc


@triton.jit
def finish_tile(
    product,
    row,
    column,
    rows,
    columns,
    n,
    alpha,
    beta,
    diagonal,
    c,
    c_stride,
    d,
    d_stride,
    HAS_C: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Stores alpha product + beta C + diagonal I, one tile of the lower triangle, and its mirror image."""
    value = alpha * product
    if HAS_C:
        value += beta * widen(load_tile(c, rows, columns, n, n, c_stride, 1))
    value += tl.where(rows[:, None] == columns[None, :], diagonal, 0.0)
    out = narrow(value, DTYPE)
    if row == column:
        # Rounding differs between an element and its transpose: the lower triangle decides, here as everywhere.
        out = tl.where(rows[:, None] >= columns[None, :], out, tl.trans(out))
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    tl.store(d + rows[:, None] * d_stride + columns[None, :], out, mask=inside)
    if row != column:
        mirrored = (columns < n)[:, None] & (rows < n)[None, :]
        tl.store(d + columns[:, None] * d_stride + rows[None, :], tl.trans(out), mask=mirrored)


@triton.jit
def scalar_factors(address, offset):
    """Three float32 numbers at `address`, or 1, 1, 1 if it is 0."""
    first, second, third = 1.0, 1.0, 1.0
    if address != 0:
        scalars = address.to(tl.pointer_type(tl.float32)) + offset
        first, second, third = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    return first, second, third
