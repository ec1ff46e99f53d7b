"""Shampoo's kernels for stacks of blocks G (batch, n, m): the statistics of both sides, and what their roots do to G.

Both sides' statistics come from one launch that reads G from memory once (its second reading hits the cache), one
triangle each, and leave behind, at no further pass, row sums, trace and sum of squares: a bound of the largest
eigenvalue and the effective dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .blocks import COLUMNS, Targets, block_at, check_targets, moved
from .portable import DTYPES, dot, narrow, on_device, require_device, trip_count, widen
from .symmetric import PRECISIONS, TILINGS, UNALIGNED_TILING, VECTOR_BYTES, Tiling, triangle
from .tiles import load_tile, product_tile, triangular_tile

RUN_TIME = ["n", "m", "g_batch", "l_programs"]
# As deep as that of TILINGS the two products of statistics_kernel spill on sm_80.
BF16X3 = TILINGS["bf16x3"][0]._replace(tile_k=32, stages=3)


@triton.jit
def statistic_tile(
    product,
    row,
    column,
    rows,
    columns,
    n,
    stride,
    keep,
    weight,
    s,
    sums,
    summary,
    DTYPE: tl.constexpr,
):
    """S = keep S + weight product, one tile and its mirror; row sums of |S|, trace and sum of squares of the tile."""
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    old = tl.load(s + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    new = narrow(keep * widen(old) + weight * product, DTYPE)
    if row == column:
        new = tl.where(rows[:, None] >= columns[None, :], new, tl.trans(new))
    tl.store(s + rows[:, None] * stride + columns[None, :], new, mask=inside)
    value = tl.where(inside, widen(new), 0.0)
    tl.store(sums + column * n + rows, tl.sum(tl.abs(value), axis=1), mask=rows < n)
    trace = tl.sum(tl.where(rows[:, None] == columns[None, :], value, 0.0))
    squares = tl.sum(value * value)
    if row != column:
        mirrored = (columns < n)[:, None] & (rows < n)[None, :]
        tl.store(s + columns[:, None] * stride + rows[None, :], tl.trans(new), mask=mirrored)
        tl.store(sums + row * n + columns, tl.sum(tl.abs(value), axis=0), mask=columns < n)
        squares = 2.0 * squares
    tl.store(summary, trace)
    tl.store(summary + 1, squares)


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=["keep_ptr", "weight_ptr", "summary_ptr"])
def statistics_kernel(
    g_ptr,
    left_ptr,
    right_ptr,
    keep_ptr,
    weight_ptr,
    left_sums_ptr,
    right_sums_ptr,
    summary_ptr,
    n: tl.int32,
    m: tl.int32,
    g_batch: tl.int64,
    l_programs: tl.int32,
    DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Programs below l_programs take tiles of G Gᵀ, the others of GᵀG; all tensors are contiguous.

    n, m, g_batch count units of UNIT elements; keep and weight are per block.
    """
    n, m = n * UNIT, m * UNIT
    program = tl.program_id(0)
    summary = summary_ptr + 2 * program.to(tl.int64)
    n_side, m_side = tl.cdiv(n, TILE).to(tl.int64), tl.cdiv(m, TILE).to(tl.int64)
    if program < l_programs:
        tiles = n_side * (n_side + 1) // 2
        matrix, tile = program.to(tl.int64) // tiles, program.to(tl.int64) % tiles
        row, column = triangular_tile(tile, n_side)
        rows = row.to(tl.int32) * TILE + tl.arange(0, TILE)
        columns = column.to(tl.int32) * TILE + tl.arange(0, TILE)
        g = g_ptr + matrix * g_batch * UNIT
        s = left_ptr + matrix * n * n
        if UNIT > 1:
            g, s = tl.multiple_of(g, 16), tl.multiple_of(s, 16)
        product = product_tile(g, g, rows, columns, n, m, m, m, True, PRECISION, TILE, TILE_K)
        sums = left_sums_ptr + matrix * n_side * n
        keep, weight = tl.load(keep_ptr + matrix), tl.load(weight_ptr + matrix)
        statistic_tile(product, row, column, rows, columns, n, n, keep, weight, s, sums, summary, DTYPE)
    else:
        rest = (program - l_programs).to(tl.int64)
        tiles = m_side * (m_side + 1) // 2
        matrix, tile = rest // tiles, rest % tiles
        row, column = triangular_tile(tile, m_side)
        rows = row.to(tl.int32) * TILE + tl.arange(0, TILE)
        columns = column.to(tl.int32) * TILE + tl.arange(0, TILE)
        g = g_ptr + matrix * g_batch * UNIT
        s = right_ptr + matrix * m * m
        if UNIT > 1:
            g, s = tl.multiple_of(g, 16), tl.multiple_of(s, 16)
        product = product_tile(g, g, rows, columns, m, n, m, m, False, PRECISION, TILE, TILE_K)
        sums = right_sums_ptr + matrix * m_side * m
        keep, weight = tl.load(keep_ptr + matrix), tl.load(weight_ptr + matrix)
        statistic_tile(product, row, column, rows, columns, m, m, keep, weight, s, sums, summary, DTYPE)


@triton.jit(do_not_specialize=["n", "m", "k"], do_not_specialize_on_alignment=["sums_ptr", "numbers_ptr"])
def product_kernel(
    a_ptr,
    b_ptr,
    d_ptr,
    sums_ptr,
    numbers_ptr,
    n: tl.int32,
    m: tl.int32,
    k: tl.int32,
    APPLY: tl.constexpr,
    OUT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """One tile of D = A B for stacks of contiguous A (n, k) and B (k, m), and the sum of its squares.

    APPLY: D is not stored but moves parameters; d_ptr is the table of `blocks.Targets`, numbers_ptr their numbers.
    """
    n, m, k = n * UNIT, m * UNIT, k * UNIT
    across = tl.cdiv(m, TILE)
    tiles = tl.cdiv(n, TILE) * across
    program = tl.program_id(0)
    matrix, tile = (program // tiles).to(tl.int64), program % tiles
    i = tile // across * TILE + tl.arange(0, TILE)
    j = tile % across * TILE + tl.arange(0, TILE)
    a, b = a_ptr + matrix * n * k, b_ptr + matrix * k * m
    if UNIT > 1:
        a, b = tl.multiple_of(a, 16), tl.multiple_of(b, 16)
    acc = tl.zeros((TILE, TILE), dtype=tl.float32)
    for step in range(0, trip_count(tl.cdiv(k, TILE_K))):
        ks = step * TILE_K + tl.arange(0, TILE_K)
        acc = dot(load_tile(a, i, ks, n, k, k, 1), load_tile(b, ks, j, k, m, m, 1), acc, PRECISION)
    inside = (i < n)[:, None] & (j < m)[None, :]
    if APPLY:
        base, stride = block_at(d_ptr, matrix, OUT, OUT_UNIT)
        w_ptr = base + i[:, None].to(tl.int64) * stride + j[None, :]
        w = moved(widen(tl.load(w_ptr, mask=inside, other=0.0)), acc, numbers_ptr + matrix * COLUMNS)
        tl.store(w_ptr, narrow(w, OUT), mask=inside)
    else:
        d = d_ptr + matrix * n * m
        if UNIT > 1:
            d = tl.multiple_of(d, 16)
        tl.store(d + i[:, None] * m + j[None, :], narrow(acc, DTYPE), mask=inside)
    tl.store(sums_ptr + program, tl.sum(acc * acc))  # outside the matrix all is zero


class Summary(NamedTuple):
    """Of every statistic of a side, (batch,) float32: its trace, its sum of squares, and the largest sum of magnitudes
    over a row, which bounds the largest eigenvalue from above."""

    trace: torch.Tensor
    squares: torch.Tensor
    bound: torch.Tensor

    @property
    def effective_dimension(self) -> torch.Tensor:
        """(tr S)² / tr(S²), 0 for zero; see `steepest.effective_dimension`."""
        return self.trace.square() / self.squares.where(self.squares != 0, 1)

    @property
    def stable_rank(self) -> torch.Tensor:
        """‖S‖_F² / bound², at most ‖S‖_F² / λ², 0 for zero."""
        return self.squares / self.bound.square().where(self.bound != 0, 1)


def tile_options(
    x: torch.Tensor, sizes: tuple[int, ...], precision: str, others: tuple[torch.Tensor, ...], bf16x3: Tiling
) -> dict:
    """Options of the kernels above for contiguous tensors of these extents."""
    kind = precision if x.dtype == torch.float32 else "half"
    unit = VECTOR_BYTES // x.element_size()
    if any(t.data_ptr() % VECTOR_BYTES for t in (x, *others)) or any(v % unit for v in sizes):
        unit = 1
    tiling = (bf16x3 if kind == "bf16x3" else TILINGS[kind][-1]) if unit > 1 else UNALIGNED_TILING
    return {
        "DTYPE": DTYPES[x.dtype],
        "UNIT": unit,
        "PRECISION": precision if kind == precision else "ieee",
        "TILE": tiling.tile,
        "TILE_K": tiling.tile_k,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
        "enable_fp_fusion": False,
    }


def statistics_arguments(g, left, right, keep, weight, precision: str):
    """Grid, positional and keyword arguments, and the buffers that `update_statistics` puts together."""
    batch, n, m = g.shape
    options = tile_options(g, (n, m), precision, (left, right), BF16X3)
    tile, unit = options["TILE"], options["UNIT"]
    sides = [-(-size // tile) for size in (n, m)]
    programs = [batch * triangle(size, tile) for size in (n, m)]
    sums = [torch.empty(batch, side, size, device=g.device) for side, size in zip(sides, (n, m))]
    summary = torch.empty(sum(programs), 2, device=g.device)
    numbers = (n // unit, m // unit, n * m // unit, programs[0])
    return (
        (sum(programs),),
        (g, left, right, keep, weight, *sums, summary, *numbers),
        options,
        (sums, summary, programs),
    )


def update_statistics(
    g: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    keep: torch.Tensor,
    weight: torch.Tensor,
    *,
    input_precision: str = "ieee",
) -> tuple[Summary, Summary]:
    """L = keep L + weight G Gᵀ and R = keep R + weight GᵀG, in place, for every block; what is known of L and R then.

    Args:
        g: (batch, n, m) float32, contiguous.  left, right: (batch, n, n) and (batch, m, m) float32, contiguous,
            symmetric: their lower triangles are read, both are written, exactly symmetric.
        keep, weight: (batch,) float32 on the device: beta and 1 - beta for an average, 1 and 1 for a sum, 1 and 0 for a
            block that is left alone.
        input_precision: what the operands are multiplied as, see `symmetric.gram`.

    Deterministic.  n m (n + m + 2) FLOPs per block; reads g once and writes each statistic once.
    Raises ValueError for tensors laid out otherwise, before anything is written.
    """
    op, (batch, n, m) = "update_statistics", g.shape
    _check(op, input_precision, {"g": (g, g.shape), "left": (left, (batch, n, n)), "right": (right, (batch, m, m))})
    _check(op, input_precision, {"keep": (keep, (batch,)), "weight": (weight, (batch,))})
    if not g.numel():
        zeros = torch.zeros(batch, device=g.device)
        return Summary(zeros, zeros, zeros), Summary(zeros, zeros, zeros)
    grid, arguments, options, (sums, summary, programs) = statistics_arguments(
        g, left, right, keep, weight, input_precision
    )
    with on_device(g):
        statistics_kernel[grid](*arguments, **options)
    found = []
    for rows, part in zip(sums, summary.split(programs)):
        trace, squares = part.view(batch, -1, 2).sum(1).unbind(1)
        found.append(Summary(trace, squares, rows.sum(1).amax(1)))
    return found[0], found[1]


def precondition(
    g: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, input_precision: str = "ieee"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(P_L G P_R, its Frobenius norm per block) for g (batch, n, m), left (batch, n, n), right (batch, m, m).

    All float32 and contiguous.  The norm comes from the second product's epilogue.  Deterministic.
    2 n m (n + m) FLOPs per block.  Raises ValueError for tensors laid out otherwise.
    """
    op, (batch, n, m) = "precondition", g.shape
    _check(op, input_precision, {"g": (g, g.shape), "left": (left, (batch, n, n)), "right": (right, (batch, m, m))})
    if not g.numel():
        return torch.empty_like(g), torch.zeros(batch, device=g.device)
    half, d = torch.empty_like(g), torch.empty_like(g)
    with on_device(g):
        for a, b, out in ((g, right, half), (left, half, d)):
            grid, arguments, options = product_arguments(a, b, out, input_precision)
            product_kernel[grid](*arguments, **options)
    return d, arguments[3].view(batch, -1).sum(1).sqrt()


def apply_precondition(
    g: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    targets: Targets,
    numbers: torch.Tensor,
    *,
    input_precision: str = "ieee",
) -> torch.Tensor:
    """W = W keep + step P_L G P_R for the blocks W of `targets`, in the second product's epilogue: no step is stored.

    numbers: (batch, 5) as `blocks.move` takes them, of which keep, step and on count here.  The rest as `precondition`,
    whose norms come back.  One rounding to the parameter's dtype.
    """
    op, (batch, n, m) = "apply_precondition", g.shape
    _check(op, input_precision, {"g": (g, g.shape), "left": (left, (batch, n, n)), "right": (right, (batch, m, m))})
    check_targets(op, targets, numbers, g.shape, COLUMNS.value)
    if not g.numel():
        return torch.zeros(batch, device=g.device)
    half = torch.empty_like(g)
    with on_device(g):
        for a, b, out in ((g, right, half), (left, half, targets)):
            grid, arguments, options = product_arguments(a, b, out, input_precision, numbers)
            product_kernel[grid](*arguments, **options)
    return arguments[3].view(batch, -1).sum(1).sqrt()


def product_arguments(a, b, d, precision: str, numbers=None) -> tuple[tuple[int, ...], tuple, dict]:
    """d: where A B goes, a tensor, or `Targets` that it moves by `numbers`."""
    batch, n, k = a.shape
    m, apply = b.shape[2], isinstance(d, Targets)
    options = tile_options(a, (n, m, k), precision, (b,) if apply else (b, d), TILINGS["bf16x3"][0])
    programs = batch * -(-n // options["TILE"]) * -(-m // options["TILE"])
    sums = torch.empty(programs, device=a.device)
    options |= {
        "APPLY": apply,
        "OUT": DTYPES[d.dtype],
        "OUT_UNIT": d.unit if apply else 1,
    }
    out, numbers = (d.table, numbers) if apply else (d, sums)
    return (programs,), (a, b, out, sums, numbers, *(v // options["UNIT"] for v in (n, m, k))), options


def _check(op: str, precision: str, tensors: dict[str, tuple[torch.Tensor, tuple[int, ...]]]) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"{op}: input_precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    for name, (x, shape) in tensors.items():
        if tuple(x.shape) != tuple(shape) or x.dtype != torch.float32 or not x.is_contiguous():
            found = f"{tuple(x.shape)} {x.dtype} with strides {x.stride()}"
            raise ValueError(f"{op}: {name} is {found}, expected contiguous float32 of {tuple(shape)}")
        require_device(op, x)
