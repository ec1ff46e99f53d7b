"""Batched products whose result is known to be symmetric: one triangle is computed, the other is its mirror image.

D = alpha A B + beta C + diagonal I with commuting symmetric A and B, and the Gram matrix D = alpha X Xᵀ, are one
kernel: D[i, j] = alpha Σ_k A[i, k] B[j, k] + ..., since B is its own transpose.  Half the FLOPs of a general product.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .portable import DTYPES, on_device, require_device
from .tiles import finish_tile, product_tile, scalar_factors, triangular_tile

VECTOR_BYTES = 16
# Large tiles are worth it once they make this many programs (a Hopper GPU has 132 processors).
FULL_DEVICE = 128


class Tiling(NamedTuple):
    """Side of the square output tile, its depth along k, and Triton's launch options."""

    tile: int
    tile_k: int
    warps: int
    stages: int


# Large to small, by what multiplies the operands: 16-bit tensor cores, float32 units, tf32 tensor cores.  Found by
# compiling: the largest that spill on no target under Triton 3.6 and 3.9, with a pipeline that fits the least shared
# memory (99 KiB on sm_120).  Register allocation is erratic: after any change here run steepest.kernels.aot.
TILINGS = {
    "half": (Tiling(128, 64, 8, 3), Tiling(64, 64, 4, 4)),
    "ieee": (Tiling(128, 16, 8, 3), Tiling(64, 32, 8, 3)),
    "tf32": (Tiling(64, 32, 4, 3),),
    "tf32x3": (Tiling(64, 16, 8, 4),),
    "bf16x3": (Tiling(64, 16, 8, 4),),
}
# The small tile of 16-bit operands in kernels with more around the product: with 4 warps some spill on sm_100.
ROOMY_TILINGS = {**TILINGS, "half": (TILINGS["half"][0], TILINGS["half"][1]._replace(warps=8))}
# Loading element by element needs many more registers, and 2-byte loads cannot be pipelined.
UNALIGNED_TILING = Tiling(32, 32, 4, 1)
PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16x3")
# Run-time values, all of them: a new shape, stride or coefficient compiles nothing.
RUN_TIME = ["alpha", "beta", "diagonal", "n", "k", "scalars_address", "scalars_batch"]
RUN_TIME += ["a_batch", "a_stride", "b_batch", "b_stride", "c_batch", "c_stride", "d_batch", "d_stride"]


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=["a_ptr", "b_ptr", "c_ptr", "d_ptr"])
def symmetric_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    alpha: tl.float32,
    beta: tl.float32,
    diagonal: tl.float32,
    scalars_address: tl.int64,
    scalars_batch: tl.int64,
    n: tl.int32,
    k: tl.int32,
    a_batch: tl.int64,
    a_stride: tl.int64,
    b_batch: tl.int64,
    b_stride: tl.int64,
    c_batch: tl.int64,
    c_stride: tl.int64,
    d_batch: tl.int64,
    d_stride: tl.int64,
    UNIT: tl.constexpr,
    HAS_C: tl.constexpr,
    K_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """One program computes one tile of the lower triangle of one matrix and stores it and its mirror image.

    Every matrix has one inner dimension of stride 1, the last one; of A and B the first one unless K_LAST.  Extents,
    batch strides and outer strides count units of UNIT elements.  UNIT > 1 (16 bytes) also promises that every address
    is a multiple of 16, so that the compiler can prove vector accesses; UNIT = 1 is right for any.
    Three float32 numbers at scalars_address + matrix scalars_batch, unless it is 0, multiply alpha, beta and diagonal.
    """
    n, k = n * UNIT, k * UNIT
    side = tl.cdiv(n, TILE).to(tl.int64)
    tiles = side * (side + 1) // 2
    program = tl.program_id(0).to(tl.int64)
    matrix = program // tiles
    row, column = triangular_tile(program % tiles, side)
    rows = row.to(tl.int32) * TILE + tl.arange(0, TILE)
    columns = column.to(tl.int32) * TILE + tl.arange(0, TILE)
    a = a_ptr + matrix * a_batch * UNIT
    b = b_ptr + matrix * b_batch * UNIT
    c = c_ptr + matrix * c_batch * UNIT
    d = d_ptr + matrix * d_batch * UNIT
    if UNIT > 1:
        a, b = tl.multiple_of(a, 16), tl.multiple_of(b, 16)
        c, d = tl.multiple_of(c, 16), tl.multiple_of(d, 16)

    product = product_tile(a, b, rows, columns, n, k, a_stride * UNIT, b_stride * UNIT, K_LAST, PRECISION, TILE, TILE_K)
    first, second, third = scalar_factors(scalars_address, matrix * scalars_batch)
    alpha, beta, diagonal = alpha * first, beta * second, diagonal * third
    d_type = d_ptr.dtype.element_ty
    finish_tile(
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
        c_stride * UNIT,
        d,
        d_stride * UNIT,
        HAS_C,
        d_type,
    )


def check_matrix(op: str, name: str, x: torch.Tensor, like: torch.Tensor) -> None:
    """Raises unless `x` is a batch of matrices of the dtype and device of `like`."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} has dtype {x.dtype}; supported: {', '.join(map(str, DTYPES))}")
    if x.ndim < 2:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected (..., rows, columns)")
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(f"{op}: {name} is {x.dtype} on {x.device}, the first matrix {like.dtype} on {like.device}")


def address_range(x: torch.Tensor) -> tuple[int, int]:
    """First address and the one after the last."""
    extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.data_ptr(), x.data_ptr() + (extent + 1) * x.element_size()


def prepare_out(op: str, out: torch.Tensor | None, inputs: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """A new result, or `out` if it can hold the result and lies apart from the inputs."""
    x = inputs[0]
    if out is None:
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    if tuple(out.shape) != shape or out.dtype != x.dtype or out.device != x.device:
        expected = f"{shape} of {x.dtype} on {x.device}"
        raise ValueError(f"{op}: out is {tuple(out.shape)} of {out.dtype} on {out.device}, expected {expected}")
    if out.numel() and not is_inner(out, -1):
        raise ValueError(f"{op}: out has strides {out.stride()}; the last must be 1")
    begin, end = address_range(out)
    if any(first < end and begin < last for first, last in map(address_range, inputs)):
        raise ValueError(f"{op}: out shares memory with an input")
    return out


def is_inner(x: torch.Tensor, d: int) -> bool:
    """Whether elements along dimension `d` are neighbours (one element is its own neighbour)."""
    return x.shape[d] == 1 or x.stride(d) == 1


def as_batch(x: torch.Tensor) -> torch.Tensor:
    """(..., m, n) as (batch, m, n) with an inner dimension: a view where strides allow one, else a copy."""
    x = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    return x if is_inner(x, 1) or is_inner(x, 2) else x.contiguous()


def triangle(n: int, tile: int) -> int:
    """Tiles on and below the diagonal."""
    side = -(-n // tile)
    return side * (side + 1) // 2


def choose_tiling(kind: str, unit: int, n: int, batch: int) -> Tiling:
    """The largest tile that still fills a large GPU, else the smallest."""
    tilings = TILINGS[kind] if unit > 1 else (UNALIGNED_TILING,)
    full = [tiling for tiling in tilings if triangle(n, tiling.tile) * batch >= FULL_DEVICE]
    return full[0] if full else tilings[-1]


def launch_arguments(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | None,
    d: torch.Tensor,
    coefficients: tuple[float, float, float],
    k_last: bool,
    precision: str,
    scalars: torch.Tensor | None = None,
) -> tuple[tuple[int, ...], tuple, dict]:
    """Grid, positional and keyword arguments of the kernel for checked (batch, rows, columns) tensors."""
    batch, n, k = a.shape
    outer = 1 if k_last else 2
    operands = [(a, outer), (b, outer), (c if c is not None else d, 1), (d, 1)]
    strides = [stride for x, dim in operands for stride in (x.stride(0) if batch > 1 else 0, x.stride(dim))]
    unit = VECTOR_BYTES // a.element_size()
    if any(x.data_ptr() % VECTOR_BYTES for x, _ in operands) or any(v % unit for v in (n, k, *strides)):
        unit = 1
    if unit == 1 and precision == "bf16x3":
        precision = "tf32x3"  # more exact; loaded element by element, columns in bf16x3 spill on sm_100
    kind = precision if a.dtype == torch.float32 else "half"
    tiling = choose_tiling(kind, unit, n, batch)
    programs = triangle(n, tiling.tile) * batch
    if programs >= 2**31 - 2**16:
        raise ValueError(
            f"symmetric_kernel: {batch} matrices of {n} rows need {programs} programs; the limit is 2^31 - 2^16"
        )
    sizes = [number // unit for number in (n, k, *strides)]
    options = {
        "UNIT": unit,
        "HAS_C": c is not None,
        "K_LAST": k_last,
        "PRECISION": precision if kind == precision else "ieee",
        "TILE": tiling.tile,
        "TILE_K": tiling.tile_k,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
        "enable_fp_fusion": False,
    }
    device_scalars = (0, 0) if scalars is None else (scalars.data_ptr(), 3 if len(scalars) > 1 else 0)
    return (programs,), (*(x for x, _ in operands), *coefficients, *device_scalars, *sizes), options


def checked_scalars(op: str, scalars: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """(1 or batch, 3) for scalars of shape (3,) or (*batch, 3); raises for others."""
    batch = tuple(out.shape[:-2])
    if (
        tuple(scalars.shape) not in ((3,), (*batch, 3))
        or scalars.dtype != torch.float32
        or scalars.device != out.device
    ):
        found = f"{tuple(scalars.shape)} of {scalars.dtype} on {scalars.device}"
        raise ValueError(f"{op}: scalars are {found}, expected (3,) or {(*batch, 3)} of float32 on {out.device}")
    return scalars.reshape(-1, 3).contiguous()


def launch(
    op: str,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | None,
    out: torch.Tensor,
    coefficients: tuple[float, float, float],
    k_last: bool,
    precision: str,
    scalars: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs the kernel on batches `a`, `b`, `c`, fills `out` and returns it."""
    if precision not in PRECISIONS:
        raise ValueError(f"{op}: input_precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    require_device(op, a)
    if out.numel() == 0:
        return out
    scalars = None if scalars is None else checked_scalars(op, scalars, out)
    grid, arguments, options = launch_arguments(
        a, b, c, out.view(len(a), *out.shape[-2:]), coefficients, k_last, precision, scalars
    )
    with on_device(a):
        symmetric_kernel[grid](*arguments, **options)
    return out


def gram(
    x: torch.Tensor,
    *,
    alpha: float = 1.0,
    scalars: torch.Tensor | None = None,
    input_precision: str = "ieee",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """alpha X Xᵀ for every matrix of a batch, exactly symmetric.

    Args:
        x: (..., n, m), float32, float16 or bfloat16, any strides; gram(x.mT) is alpha XᵀX without a copy.  (A copy is
            made only where neither matrix dimension has stride 1, or the batch dimensions do not fit one stride.)
        alpha: a number; changing it compiles nothing.
        scalars: float32 on the device, (3,) or (..., 3): per matrix, factors of alpha, beta and the diagonal (the last
            two of symmetric_product), read when the kernel runs: the host need not know them, and a replayed CUDA graph
            takes their new values.
        input_precision: what float32 operands are multiplied as: "ieee" (float32 units), "tf32x3" (three tensor-core
            products, nearly float32's accuracy), "bf16x3" (16 bits; tf32x3 if not aligned) or "tf32" (11 bits).  The
            tensor cores of sm_90 and sm_100 take float32 operands along rows only: there "tf32" loads gram(x.mT)
            element by element.
        out: where to put the result; its last stride must be 1 and it must not overlap x.

    Returns (..., n, n) in x's dtype, accumulated in float32 and rounded once.  Deterministic.  Not differentiable.

    Raises TypeError or ValueError for dtypes, shapes, devices or strides it cannot take, before anything is written.
    Cost: n (n + 1) m FLOPs per matrix, half of a general product, up to the tiles on the diagonal.
    """
    check_matrix("gram", "x", x, x)
    out = prepare_out("gram", out, [x], (*x.shape[:-1], x.shape[-2]))
    a = as_batch(x)
    return launch("gram", a, a, None, out, (alpha, 0.0, 0.0), is_inner(a, 2), input_precision, scalars)


def symmetric_product(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    c: torch.Tensor | None = None,
    diagonal: float = 0.0,
    scalars: torch.Tensor | None = None,
    input_precision: str = "ieee",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """alpha A B + beta C + diagonal I for commuting symmetric A, B and symmetric C, exactly symmetric.

    Args:
        a, b, c: (..., n, n) alike in shape, dtype (float32, float16, bfloat16) and device.  That they are symmetric and
            commute, as polynomials in one matrix do, is the caller's promise: the lower triangle of the product and of
            C is computed and mirrored.  In float16, bfloat16 and tf32 only squares (b = a) bear mirroring over many
            steps; other products lose accuracy that way.
        alpha, beta, diagonal: numbers; changing them compiles nothing.  beta = 0 leaves c unread.
        scalars, input_precision, out: as in `gram`.

    Returns (..., n, n): C is added in the float32 accumulator and the sum rounded once.  Deterministic.  Not
    differentiable.

    Raises TypeError or ValueError as `gram` does, and ValueError for beta without c.
    Cost: n² (n + 1) FLOPs per matrix, half of a general product, up to the tiles on the diagonal.
    """
    op = "symmetric_product"
    if c is None and beta != 0:
        raise ValueError(f"{op}: beta is {beta}, but c is None")
    matrices = {"a": a, "b": b} | ({} if c is None else {"c": c})
    for name, x in matrices.items():
        check_matrix(op, name, x, a)
        if x.shape != a.shape or x.shape[-1] != x.shape[-2]:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, a has {tuple(a.shape)}; expected (..., n, n)")
    out = prepare_out(op, out, list(matrices.values()), tuple(a.shape))
    # A symmetric matrix may be read along its columns.
    batches = {name: x if is_inner(x, 2) else x.mT for name, x in ((name, as_batch(x)) for name, x in matrices.items())}
    addend = batches["c"] if beta != 0 else None
    coefficients = (alpha, beta, diagonal)
    return launch(op, batches["a"], batches["b"], addend, out, coefficients, True, input_precision, scalars)
