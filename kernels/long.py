"""Products with a long side, D = alpha Q X + shift X, stored or applied to parameters at once.

Applied, no update is ever stored: P = P (1 - lr decay) - lr scale D in the epilogue, with cautious decay and stochastic
rounding if wanted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .portable import DTYPES, dot, narrow, on_device, require_device, trip_count, widen
from .symmetric import FULL_DEVICE, PRECISIONS, ROOMY_TILINGS, UNALIGNED_TILING, VECTOR_BYTES
from .tiles import load_tile

STORE, APPLY = tl.constexpr(0), tl.constexpr(1)
RUN_TIME = [
    "alpha",
    "shift",
    "scale_address",
    "rows",
    "columns",
    "k",
    "x_batch",
    "q_batch",
    "q_stride",
    "cautious",
    "seed",
]


@triton.jit
def stochastic_bfloat16(x, random):
    """float32 to bfloat16, up with the probability of the part that is cut; infinities and NaN stay what they are."""
    bits = x.to(tl.uint32, bitcast=True)
    moved = ((bits + (random.to(tl.uint32, bitcast=True) & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, moved, x)


@triton.jit
def applied(value, p, keep, step, cautious):
    """P keep + step value; with cautious decay P keeps its size where the step leads away from zero."""
    decayed = tl.where((cautious == 0) | (value * p * step < 0), p * keep, p)
    return decayed + step * value


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=["q_ptr", "x_ptr", "out_ptr", "hyper_ptr"])
def long_kernel(
    q_ptr,
    x_ptr,
    out_ptr,
    hyper_ptr,
    alpha: tl.float32,
    shift: tl.float32,
    scale_address: tl.int64,
    rows: tl.int32,
    columns: tl.int32,
    k: tl.int32,
    q_batch: tl.int64,
    q_stride: tl.int64,
    x_batch: tl.int64,
    cautious: tl.int32,
    seed: tl.int32,
    TALL: tl.constexpr,
    EPILOGUE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    DTYPE: tl.constexpr,
    OUT: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """One tile of one matrix: Q X for X (rows, columns), or X Q where X is TALL; X is contiguous.

    STORE: out_ptr is a batch like X.  APPLY: out_ptr is a table of addresses of parameters like X, and hyper_ptr holds
    (keep, step).  A float32 number per matrix at scale_address, unless it is 0, multiplies alpha and shift.
    Extents and strides count units of UNIT elements.
    """
    rows, columns, k = rows * UNIT, columns * UNIT, k * UNIT
    across = tl.cdiv(columns, TILE)
    tiles = tl.cdiv(rows, TILE) * across
    program = tl.program_id(0)
    matrix, tile = (program // tiles).to(tl.int64), program % tiles
    i = tile // across * TILE + tl.arange(0, TILE)
    j = tile % across * TILE + tl.arange(0, TILE)
    x = x_ptr + matrix * x_batch * UNIT
    q, q_stride = q_ptr + matrix * q_batch * UNIT, q_stride * UNIT
    if UNIT > 1:
        x, q = tl.multiple_of(x, 16), tl.multiple_of(q, 16)
    acc = tl.zeros((TILE, TILE), dtype=tl.float32)
    for step in range(0, trip_count(tl.cdiv(k, TILE_K))):
        ks = step * TILE_K + tl.arange(0, TILE_K)
        if TALL:
            left, right = load_tile(x, i, ks, rows, k, columns, 1), load_tile(q, ks, j, k, columns, q_stride, 1)
        else:
            left, right = load_tile(q, i, ks, rows, k, q_stride, 1), load_tile(x, ks, j, k, columns, columns, 1)
        acc = dot(left, right, acc, PRECISION)
    factor = 1.0
    if scale_address != 0:
        factor = tl.load(scale_address.to(tl.pointer_type(tl.float32)) + matrix)
    value = (factor * alpha) * acc
    if shift != 0:
        value += (factor * shift) * widen(load_tile(x, i, j, rows, columns, columns, 1))
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    offsets = i[:, None].to(tl.int64) * columns + j[None, :]
    if EPILOGUE == STORE:
        out = out_ptr + matrix * x_batch * UNIT
        if UNIT > 1:
            out = tl.multiple_of(out, 16)
        tl.store(out + offsets, narrow(value, DTYPE), mask=inside)
    else:
        p_base = tl.load(out_ptr + matrix).to(tl.pointer_type(OUT))
        if UNIT > 1:
            p_base = tl.multiple_of(p_base, 16)
        p = widen(tl.load(p_base + offsets, mask=inside, other=0.0))
        p = applied(value, p, tl.load(hyper_ptr), tl.load(hyper_ptr + 1), cautious)
        if STOCHASTIC:
            p = stochastic_bfloat16(p, tl.randint(seed + matrix.to(tl.int32) * 7919, offsets.to(tl.int32)))
        tl.store(p_base + offsets, narrow(p, OUT), mask=inside)


def launch_arguments(
    q: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    hyper: torch.Tensor,
    numbers: tuple[float, float],
    scale: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    aligned: bool,
    precision: str,
    cautious: bool = False,
    seed: int | None = None,
) -> tuple[tuple[int, ...], tuple, dict]:
    """Grid, positional and keyword arguments; out_dtype None stores, else out is a table of addresses of that dtype."""
    batch, rows, columns = x.shape
    tall = rows > columns
    k = min(rows, columns)
    kind = precision if x.dtype == torch.float32 else "half"
    unit = VECTOR_BYTES // x.element_size()
    sizes = (rows, columns, k, q.stride(0), q.stride(1), x.stride(0))
    if not aligned or q.data_ptr() % VECTOR_BYTES or x.data_ptr() % VECTOR_BYTES or any(v % unit for v in sizes):
        unit = 1
    tilings = ROOMY_TILINGS[kind] if unit > 1 else (UNALIGNED_TILING,)

    def tiles(t):
        return batch * -(-rows // t.tile) * -(-columns // t.tile)

    tiling = next((t for t in tilings if tiles(t) >= FULL_DEVICE), tilings[-1])
    options = {
        "TALL": tall,
        "EPILOGUE": STORE.value if out_dtype is None else APPLY.value,
        "STOCHASTIC": seed is not None and out_dtype == torch.bfloat16,
        "DTYPE": DTYPES[x.dtype],
        "OUT": DTYPES[out_dtype or x.dtype],
        "UNIT": unit,
        "PRECISION": precision if kind == precision else "ieee",
        "TILE": tiling.tile,
        "TILE_K": tiling.tile_k,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
        "enable_fp_fusion": False,
    }
    address = 0 if scale is None else scale.data_ptr()
    values = (*numbers, address, *(v // unit for v in sizes), int(cautious), seed or 0)
    return (tiles(tiling),), (q, x, out, hyper, *values), options


def _checked(op: str, q: torch.Tensor, x: torch.Tensor, precision: str) -> None:
    k = min(x.shape[-2:])
    if precision not in PRECISIONS:
        raise ValueError(f"{op}: input_precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if x.ndim != 3 or not x.is_contiguous() or tuple(q.shape) != (len(x), k, k) or q.dtype != x.dtype:
        found = f"q {tuple(q.shape)} {q.dtype}, x {tuple(x.shape)} {x.dtype} with strides {x.stride()}"
        raise ValueError(f"{op}: got {found}, expected q ({len(x)}, {k}, {k}) and x contiguous, of one dtype")
    if x.numel() and q.stride(2) != 1:
        raise ValueError(f"{op}: q has strides {q.stride()}; the last must be 1")
    require_device(op, x)


def long_product(
    q: torch.Tensor,
    x: torch.Tensor,
    *,
    alpha: float = 1.0,
    shift: float = 0.0,
    scale: torch.Tensor | None = None,
    input_precision: str = "ieee",
) -> torch.Tensor:
    """scale_i (alpha Q_i X_i + shift X_i) for x (batch, rows, columns), contiguous; X_i Q_i where rows > columns.

    q: (batch, k, k) with k the short side, symmetric.  scale: (batch,) float32 on the device, read by the kernel.
    Sums in float32, one rounding.  Deterministic.  2 rows columns k FLOPs per matrix.  Raises ValueError for other
    layouts.
    """
    _checked("long_product", q, x, input_precision)
    out = torch.empty_like(x)
    if x.numel():
        grid, arguments, options = launch_arguments(q, x, out, q, (alpha, shift), scale, None, True, input_precision)
        with on_device(x):
            long_kernel[grid](*arguments, **options)
    return out


def apply_long_product(
    q: torch.Tensor,
    x: torch.Tensor,
    params: list[torch.Tensor],
    table: torch.Tensor,
    hyper: torch.Tensor,
    *,
    alpha: float = 1.0,
    shift: float = 0.0,
    scale: torch.Tensor | None = None,
    cautious: bool = False,
    seed: int | None = None,
    input_precision: str = "ieee",
) -> None:
    """P_i = P_i keep + step U_i with U_i what `long_product` would give, in float32, never stored.

    params: contiguous, of the size of the matrices, one dtype; table: (batch,) int64 on the device, their addresses.
    hyper: (2,) float32 on the device, keep = 1 - lr decay and step = -lr scale.  cautious: keep applies only where the
    step moves P towards zero.  seed: bfloat16 parameters are rounded stochastically, by Philox numbers of this seed.
    Raises ValueError for other layouts.
    """
    op = "apply_long_product"
    _checked(op, q, x, input_precision)
    for i, p in enumerate(params):
        if not p.is_contiguous() or p.numel() != x[0].numel() or p.dtype != params[0].dtype:
            raise ValueError(f"{op}: params[{i}] is {tuple(p.shape)} {p.dtype}, expected contiguous and of x's size")
    if len(params) != len(x) or tuple(table.shape) != (len(x),) or tuple(hyper.shape) != (2,):
        raise ValueError(f"{op}: got {len(params)} params and a table of {tuple(table.shape)} for {len(x)} matrices")
    if not x.numel():
        return
    unit = VECTOR_BYTES // params[0].element_size()
    aligned = all(p.data_ptr() % VECTOR_BYTES == 0 for p in params) and x.shape[2] % unit == 0
    numbers = (alpha, shift)
    grid, arguments, options = launch_arguments(
        q, x, table, hyper, numbers, scale, params[0].dtype, aligned, input_precision, cautious, seed
    )
    with on_device(x):
        long_kernel[grid](*arguments, **options)
