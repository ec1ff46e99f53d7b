"""Symmetric products of matrices of different shapes in one launch, through a table of descriptors.

Products of 512 to 1024 rows do not fill a large GPU one by one; together they do.  A `Group` is laid out once for given
tensors and launched as often as wanted: launching copies nothing and compiles nothing, and alpha, beta and the diagonal
are numbers on the device, so a CUDA graph may hold it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from .portable import DTYPES, on_device, require_device, widen
from .symmetric import (
    FULL_DEVICE,
    PRECISIONS,
    ROOMY_TILINGS,
    UNALIGNED_TILING,
    VECTOR_BYTES,
    check_matrix,
    is_inner,
    prepare_out,
    triangle,
)
from .tiles import finish_tile, load_tile, product_tile, triangular_tile

# Columns of the table, one row per matrix: addresses (C: 0 without), extents and strides in units, and the first tile.
A, B, C, D = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
N, K = tl.constexpr(4), tl.constexpr(5)
A_STRIDE, B_STRIDE, C_STRIDE, D_STRIDE = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8), tl.constexpr(9)
FIRST_TILE = tl.constexpr(10)
COLUMNS = tl.constexpr(11)


@triton.jit
def matrix_at(address, DTYPE: tl.constexpr, UNIT: tl.constexpr):
    """A pointer; UNIT > 1 promises that it is a multiple of 16 bytes."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if UNIT > 1:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(do_not_specialize_on_alignment=["table_ptr", "owner_ptr", "numbers_ptr"])
def grouped_kernel(
    table_ptr,
    owner_ptr,
    numbers_ptr,
    DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    K_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """One program computes one tile of the lower triangle of the matrix `owner_ptr[program]`, and its mirror image."""
    program = tl.program_id(0).to(tl.int64)
    owner = tl.load(owner_ptr + program).to(tl.int64)
    entry = table_ptr + owner * COLUMNS
    n, k = (tl.load(entry + N) * UNIT).to(tl.int32), (tl.load(entry + K) * UNIT).to(tl.int32)
    a, b = matrix_at(tl.load(entry + A), DTYPE, UNIT), matrix_at(tl.load(entry + B), DTYPE, UNIT)
    d, c_address = matrix_at(tl.load(entry + D), DTYPE, UNIT), tl.load(entry + C)
    a_stride, b_stride = tl.load(entry + A_STRIDE) * UNIT, tl.load(entry + B_STRIDE) * UNIT
    side = tl.cdiv(n, TILE).to(tl.int64)
    row, column = triangular_tile(program - tl.load(entry + FIRST_TILE), side)
    rows = row.to(tl.int32) * TILE + tl.arange(0, TILE)
    columns = column.to(tl.int32) * TILE + tl.arange(0, TILE)

    product = product_tile(a, b, rows, columns, n, k, a_stride, b_stride, K_LAST, PRECISION, TILE, TILE_K)
    numbers = numbers_ptr + owner * 3
    value = tl.load(numbers) * product
    if c_address != 0:
        c_stride = tl.load(entry + C_STRIDE) * UNIT
        c = matrix_at(c_address, DTYPE, UNIT)
        value += tl.load(numbers + 1) * widen(load_tile(c, rows, columns, n, n, c_stride, 1))
    diagonal, d_stride = tl.load(numbers + 2), tl.load(entry + D_STRIDE) * UNIT
    finish_tile(value, row, column, rows, columns, n, 1.0, 0.0, diagonal, d, d_stride, d, d_stride, False, DTYPE)


class Group:
    """Products alpha_i A_i B_i + beta_i C_i + diagonal_i I, or Gram matrices alpha_i X_i X_iᵀ, laid out to be launched.

    numbers: (count, 3) float32 on the device: alpha, beta, diagonal; write to it to change them for the next launch.
    outs: the results.  launches: how many kernel launches a call takes: 1, or up to 4 where some matrices are not
    aligned to 16 bytes or are read along their columns.
    """

    def __init__(self, op, a, b, c, outs, numbers, k_last: Sequence[bool], precision: str):
        if precision not in PRECISIONS:
            raise ValueError(f"{op}: input_precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
        self.op, self.outs, self.precision = op, outs, precision
        self.device, self.dtype = a[0].device, a[0].dtype
        self.tensors = (a, b, c)  # kept alive: the tables hold their addresses
        self.numbers = torch.tensor(numbers, dtype=torch.float32).to(self.device)
        self.parts = []
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for i, out in enumerate(outs):
            if out.numel():
                kinds.setdefault((k_last[i], self._fits(i)), []).append(i)
        for (last, fits), members in kinds.items():
            self.parts.append(self._part(members, last, fits))

    @property
    def launches(self) -> int:
        return len(self.parts)

    def _operands(self, i: int) -> list[torch.Tensor]:
        a, b, c = self.tensors
        return [a[i], b[i], c[i] if c[i] is not None else self.outs[i], self.outs[i]]

    def _outer(self, x: torch.Tensor) -> int:
        return x.stride(0) if is_inner(x, 1) else x.stride(1)

    def _fits(self, i: int) -> bool:
        unit = VECTOR_BYTES // self.dtype.itemsize
        sizes = [*self.tensors[0][i].shape, *(self._outer(x) for x in self._operands(i))]
        return not any(x.data_ptr() % VECTOR_BYTES for x in self._operands(i)) and not any(v % unit for v in sizes)

    def _part(self, members: list[int], k_last: bool, fits: bool):
        """Tables, grid and options of one launch."""
        kind = self.precision if self.dtype == torch.float32 else "half"
        unit = VECTOR_BYTES // self.dtype.itemsize if fits else 1
        tilings = ROOMY_TILINGS[kind] if fits else (UNALIGNED_TILING,)
        rows = [self.outs[i].shape[0] for i in members]
        full = [t for t in tilings if sum(triangle(n, t.tile) for n in rows) >= FULL_DEVICE]
        tiling = full[0] if full else tilings[-1]
        counts = np.array([triangle(n, tiling.tile) for n in rows], dtype=np.int64)
        table = np.zeros((len(self.outs), COLUMNS.value), dtype=np.int64)
        for i, first in zip(members, np.cumsum(counts) - counts):
            operands = self._operands(i)
            addresses = [x.data_ptr() for x in operands]
            addresses[C.value] *= self.tensors[2][i] is not None
            sizes = [*self.tensors[0][i].shape, *(self._outer(x) for x in operands)]
            table[i] = [*addresses, *(v // unit for v in sizes), first]
        owner = np.repeat(np.array(members, dtype=np.int32), counts)
        options = {
            "DTYPE": DTYPES[self.dtype],
            "UNIT": unit,
            "K_LAST": k_last,
            "PRECISION": self.precision if kind == self.precision else "ieee",
            "TILE": tiling.tile,
            "TILE_K": tiling.tile_k,
            "num_warps": tiling.warps,
            "num_stages": tiling.stages,
            "enable_fp_fusion": False,
        }
        tables = [torch.from_numpy(t).to(self.device) for t in (table, owner)]
        return (int(counts.sum()),), (*tables, self.numbers), options

    def launch(self) -> list[torch.Tensor]:
        """Computes all results from what the tensors hold now, and returns them."""
        require_device(self.op, self.numbers)
        with on_device(self.numbers):
            for grid, arguments, options in self.parts:
                grouped_kernel[grid](*arguments, **options)
        return self.outs


def _checked(op: str, name: str, tensors: Sequence[torch.Tensor], like: torch.Tensor) -> list[torch.Tensor]:
    for i, x in enumerate(tensors):
        check_matrix(op, f"{name}[{i}]", x, like)
        if x.ndim != 2 or not (is_inner(x, 0) or is_inner(x, 1)):
            raise ValueError(
                f"{op}: {name}[{i}] has shape {tuple(x.shape)} and strides {x.stride()}, expected a matrix"
            )
    return list(tensors)


def group_of_grams(
    xs: Sequence[torch.Tensor],
    *,
    alphas: Sequence[float] | None = None,
    outs: Sequence[torch.Tensor] | None = None,
    input_precision: str = "ieee",
) -> Group:
    """alpha_i X_i X_iᵀ for matrices of any shapes, one dtype and device; see `symmetric.gram`.

    Raises TypeError or ValueError for what the group cannot take, before anything is written.
    """
    op = "group_of_grams"
    if not xs:
        raise ValueError(f"{op}: got no matrices")
    a = _checked(op, "xs", xs, xs[0])
    outs = [prepare_out(op, outs[i] if outs else None, [x], (x.shape[0],) * 2) for i, x in enumerate(a)]
    numbers = [(alpha, 0.0, 0.0) for alpha in (alphas or [1.0] * len(a))]
    return Group(op, a, a, [None] * len(a), outs, numbers, [is_inner(x, 1) for x in a], input_precision)


def group_of_products(
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    *,
    c: Sequence[torch.Tensor | None] | None = None,
    numbers: Sequence[tuple[float, float, float]] | None = None,
    outs: Sequence[torch.Tensor] | None = None,
    input_precision: str = "ieee",
) -> Group:
    """alpha_i A_i B_i + beta_i C_i + diagonal_i I for commuting symmetric A_i, B_i of any sizes, one dtype and device.

    numbers: (alpha, beta, diagonal) each, by default (1, 1, 0).  The promises of `symmetric.symmetric_product` apply.
    Raises TypeError or ValueError for what the group cannot take, before anything is written.
    """
    op, c = "group_of_products", list(c) if c is not None else [None] * len(a)
    if not a or len(a) != len(b) or len(a) != len(c):
        raise ValueError(f"{op}: got {len(a)} a, {len(b)} b and {len(c)} c, expected as many of each, at least one")
    lists = [_checked(op, "a", a, a[0]), _checked(op, "b", b, a[0])]
    _checked(op, "c", [x for x in c if x is not None], a[0])
    for i, matrices in enumerate(zip(*lists, c)):
        if any(x is not None and tuple(x.shape) != (a[i].shape[0],) * 2 for x in matrices):
            found = [None if x is None else tuple(x.shape) for x in matrices]
            raise ValueError(f"{op}: a, b, c number {i} have shapes {found}, expected square ones alike")
    # A symmetric matrix may be read along its columns.
    lists = [[x if x is None or is_inner(x, 1) else x.mT for x in role] for role in (*lists, c)]
    inputs = [[x for x in matrices if x is not None] for matrices in zip(*lists)]
    outs = [prepare_out(op, outs[i] if outs else None, xs, tuple(xs[0].shape)) for i, xs in enumerate(inputs)]
    return Group(op, *lists, outs, list(numbers or [(1.0, 1.0, 0.0)] * len(a)), [True] * len(a), input_precision)
