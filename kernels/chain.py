"""Chains of products of small matrices in one launch: one program per matrix runs the whole chain, step by step.

A chain is data: a table of steps D = alpha A B + beta C + gamma E + diagonal I over numbered buffers.  So one compiled
kernel per (dtype, tile) runs every polynomial iteration on every shape; coefficients, orders and the number of steps
compile nothing.  Intermediate matrices live in a scratch tensor that stays in the processor's cache: three matrices of
128 rows are 192 KiB in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from .portable import DTYPES, dot, narrow, on_device, require_device, trip_count, widen
from .symmetric import PRECISIONS, VECTOR_BYTES
from .tiles import load_tile

# How a step reads its factors, named by the inner dimension of A and of B: rows of A over k and rows of B over columns
# (products); rows of both over k (X Xᵀ); columns of both (XᵀX).
PRODUCT, GRAM_OF_ROWS, GRAM_OF_COLUMNS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Columns of the table of steps.  Extents count units of 16 bytes; buffers are -1 where there is none.
KIND, ROWS, COLS, K = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
A, B, C, E, D = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
MIRROR = tl.constexpr(9)  # 1: the result is symmetric; its lower triangle is computed and decides
STEP_COLUMNS = tl.constexpr(10)
# Columns of the table of buffers, in units of 16 bytes: offset into scratch, strides between matrices and rows.
# Buffer 0 is the input, which comes with its own strides, and 1 the result.
BUFFER_COLUMNS = tl.constexpr(3)
RUN_TIME = ["x_address", "y_address", "scratch_address", "x_batch", "x_row", "length"]


class ChainTiling(NamedTuple):
    tile: int
    tile_k: int
    warps: int
    stages: int


# By what multiplies the operands; found by compiling, like those of the symmetric product.
TILINGS = {
    "half": ChainTiling(64, 64, 4, 2),
    "ieee": ChainTiling(64, 16, 8, 2),
    "tf32": ChainTiling(64, 32, 8, 2),
    "tf32x3": ChainTiling(64, 16, 8, 2),
    "bf16x3": ChainTiling(64, 16, 8, 2),
}


@triton.jit
def buffer_row(
    buffers_ptr, number, matrix, x_address, y_address, scratch_address, x_batch, x_row, DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """(pointer to the matrix, elements between rows) of a buffer."""
    row = buffers_ptr + number * BUFFER_COLUMNS
    address = tl.where(number == 0, x_address, tl.where(number == 1, y_address, scratch_address))
    between = tl.where(number == 0, x_batch, tl.load(row + 1))
    base = address.to(tl.pointer_type(DTYPE)) + (tl.load(row) + between * matrix) * UNIT
    return tl.multiple_of(base, 16), tl.where(number == 0, x_row, tl.load(row + 2)) * UNIT


@triton.jit
def chain_product(
    kind, a, b, rows, columns, n, m, k, a_stride, b_stride, PRECISION: tl.constexpr, TILE: tl.constexpr,
    TILE_K: tl.constexpr,
):  # fmt: skip
    """One tile of A B, A Aᵀ or AᵀA in float32."""
    acc = tl.zeros((TILE, TILE), dtype=tl.float32)
    if kind == PRODUCT:
        for step in range(0, trip_count(tl.cdiv(k, TILE_K))):
            ks = step * TILE_K + tl.arange(0, TILE_K)
            left = load_tile(a, rows, ks, n, k, a_stride, 1)
            acc = dot(left, load_tile(b, ks, columns, k, m, b_stride, 1), acc, PRECISION)
    elif kind == GRAM_OF_ROWS:
        for step in range(0, trip_count(tl.cdiv(k, TILE_K))):
            ks = step * TILE_K + tl.arange(0, TILE_K)
            left = load_tile(a, rows, ks, n, k, a_stride, 1)
            acc = dot(left, load_tile(b, ks, columns, k, m, 1, b_stride), acc, PRECISION)
    else:
        for step in range(0, trip_count(tl.cdiv(k, TILE_K))):
            ks = step * TILE_K + tl.arange(0, TILE_K)
            left = load_tile(a, rows, ks, n, k, 1, a_stride)
            acc = dot(left, load_tile(b, ks, columns, k, m, b_stride, 1), acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=["steps_ptr", "numbers_ptr", "buffers_ptr"])
def chain_kernel(
    steps_ptr,
    numbers_ptr,
    buffers_ptr,
    x_address: tl.int64,
    y_address: tl.int64,
    scratch_address: tl.int64,
    x_batch: tl.int64,
    x_row: tl.int64,
    length: tl.int32,
    DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """All steps for one matrix.  A step's result is never one of its own operands."""
    matrix = tl.program_id(0).to(tl.int64)
    for step in range(0, trip_count(length)):
        row = steps_ptr + step * STEP_COLUMNS
        n, m, k = tl.load(row + ROWS) * UNIT, tl.load(row + COLS) * UNIT, tl.load(row + K) * UNIT
        kind, c_number, e_number = tl.load(row + KIND), tl.load(row + C), tl.load(row + E)
        a, a_stride = buffer_row(
            buffers_ptr, tl.load(row + A), matrix, x_address, y_address, scratch_address, x_batch, x_row, DTYPE, UNIT
        )
        b, b_stride = buffer_row(
            buffers_ptr, tl.load(row + B), matrix, x_address, y_address, scratch_address, x_batch, x_row, DTYPE, UNIT
        )
        d, d_stride = buffer_row(
            buffers_ptr, tl.load(row + D), matrix, x_address, y_address, scratch_address, x_batch, x_row, DTYPE, UNIT
        )
        c, c_stride = buffer_row(
            buffers_ptr,
            tl.maximum(c_number, 0),
            matrix,
            x_address,
            y_address,
            scratch_address,
            x_batch,
            x_row,
            DTYPE,
            UNIT,
        )
        e, e_stride = buffer_row(
            buffers_ptr,
            tl.maximum(e_number, 0),
            matrix,
            x_address,
            y_address,
            scratch_address,
            x_batch,
            x_row,
            DTYPE,
            UNIT,
        )
        numbers = numbers_ptr + step * 4
        alpha, beta = tl.load(numbers), tl.load(numbers + 1)
        gamma, diagonal = tl.load(numbers + 2), tl.load(numbers + 3)
        across = tl.cdiv(m, TILE)
        mirror = tl.load(row + MIRROR)
        for tile in range(0, trip_count(tl.cdiv(n, TILE) * across)):
            i, j = tile // across, tile % across
            if (mirror == 0) | (j <= i):
                rows, columns = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
                value = alpha * chain_product(
                    kind, a, b, rows, columns, n, m, k, a_stride, b_stride, PRECISION, TILE, TILE_K
                )
                if c_number >= 0:
                    value += beta * widen(load_tile(c, rows, columns, n, m, c_stride, 1))
                if e_number >= 0:
                    value += gamma * widen(load_tile(e, rows, columns, n, m, e_stride, 1))
                value += tl.where(rows[:, None] == columns[None, :], diagonal, 0.0)
                inside = (rows < n)[:, None] & (columns < m)[None, :]
                out = narrow(value, DTYPE)
                if mirror != 0:
                    if i == j:
                        out = tl.where(rows[:, None] >= columns[None, :], out, tl.trans(out))
                    else:
                        mirrored = (columns < m)[:, None] & (rows < n)[None, :]
                        tl.store(d + columns[:, None] * d_stride + rows[None, :], tl.trans(out), mask=mirrored)
                tl.store(d + rows[:, None] * d_stride + columns[None, :], out, mask=inside)
        tl.debug_barrier()  # what this step wrote is what others of the program's threads read in the next


def unit_of(dtype: torch.dtype) -> int:
    """Elements in 16 bytes: rows of all buffers begin at multiples of it."""
    return VECTOR_BYTES // dtype.itemsize


def device_tables(
    steps: np.ndarray, numbers: np.ndarray, shapes: tuple[tuple[int, int], ...], batch: int, dtype, device
) -> tuple[list[torch.Tensor], int]:
    """The three tables of a chain on the device, and the elements of scratch that it needs for a batch.

    Nothing in them depends on addresses: they serve every call with these shapes, and a CUDA graph's replays.
    """
    unit = unit_of(dtype)
    steps = steps.astype(np.int32)
    if (steps[:, [ROWS.value, COLS.value, K.value]] % unit).any():
        raise ValueError(f"chain: extents must be multiples of {unit}, 16 bytes of {dtype}")
    steps[:, [ROWS.value, COLS.value, K.value]] //= unit
    buffers, offset = np.zeros((len(shapes), BUFFER_COLUMNS.value), dtype=np.int64), 0
    for i, (rows, columns) in enumerate(shapes):
        buffers[i] = offset if i > 1 else 0, rows * columns // unit, columns // unit
        offset += batch * rows * columns // unit if i > 1 else 0
    tables = [torch.from_numpy(t) for t in (steps, numbers.astype(np.float32), buffers)]
    return [table.to(device) for table in tables], offset * unit


def launch_arguments(
    tables: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor, scratch: torch.Tensor, precision: str
) -> tuple[tuple[int, ...], tuple, dict]:
    """Grid, positional and keyword arguments of one launch for checked tensors."""
    kind = precision if x.dtype == torch.float32 else "half"
    tiling, unit = TILINGS[kind], unit_of(x.dtype)
    options = {
        "DTYPE": DTYPES[x.dtype],
        "UNIT": unit,
        "PRECISION": precision if kind == precision else "ieee",
        "TILE": tiling.tile,
        "TILE_K": tiling.tile_k,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
        "enable_fp_fusion": False,
    }
    addresses = (x.data_ptr(), y.data_ptr(), scratch.data_ptr(), x.stride(0) // unit, x.stride(1) // unit)
    return (len(x),), (*tables, *addresses, len(tables[0])), options


def run_chain(
    tables: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor, scratch: torch.Tensor, input_precision: str = "ieee"
) -> None:
    """Runs a chain on every matrix of x (batch, rows, columns), in one launch; y receives the result.

    Args:
        tables: of `device_tables`.  A step is a row of steps, (length, 10): KIND, ROWS, COLS, K in elements, buffers A,
            B, C, E, D, -1 for none, and MIRROR, and a row of numbers, (length, 4): alpha, beta, gamma, diagonal.
            K = 0 makes it linear.  D is none of A, B, C, E.
        x, y, scratch: float32, float16 or bfloat16, alike; rows contiguous, starting at multiples of 16 bytes, all
            extents of x multiples of 16 bytes; y contiguous; scratch of the size that `device_tables` said.
        input_precision: what float32 operands are multiplied as, see `symmetric.gram`.

    Sums are float32, each result is rounded once.  Deterministic; a matrix does not depend on the others.
    Raises ValueError for tensors that are laid out otherwise or that Triton cannot reach.
    """
    op, unit = "run_chain", unit_of(x.dtype)
    if input_precision not in PRECISIONS:
        raise ValueError(f"{op}: input_precision is {input_precision!r}, expected one of {', '.join(PRECISIONS)}")
    require_device(op, x)
    if any(t.data_ptr() % VECTOR_BYTES for t in (x, y, scratch)) or x.stride(2) != 1 or not y.is_contiguous():
        raise ValueError(f"{op}: rows must be contiguous and tensors start at multiples of {VECTOR_BYTES} bytes")
    if any(v % unit for v in (*x.shape[1:], x.stride(0), x.stride(1))):
        raise ValueError(f"{op}: x is {tuple(x.shape)} with strides {x.stride()}, expected multiples of {unit}")
    if not len(x) or not len(tables[0]):
        return
    grid, arguments, options = launch_arguments(tables, x, y, scratch, input_precision)
    with on_device(x):
        chain_kernel[grid](*arguments, **options)
