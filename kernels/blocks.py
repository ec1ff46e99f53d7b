"""Blocks of parameters, found through a table of addresses, moved by Shampoo's step in one elementwise pass.

    P = ratio D, or the graft where a block has no root yet;    B = momentum B + P;    P = P + momentum B or B
    W = W keep + step P

The scale `ratio` is known only after the norm of a whole block of D, which its product leaves behind: hence a second
pass.  Without grafting and momentum the product itself writes the parameter (`statistics.apply_precondition`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .portable import DTYPES, narrow, on_device, require_device, widen

VECTOR_BYTES = 16
CHUNK, WARPS = 1024, 4
NONE, HEAVY_BALL, NESTEROV = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Columns of the table of parameters, and of the numbers of a block.
ADDRESS, STRIDE, TABLE_COLUMNS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
KEEP, STEP, ON, RATIO, READY, COLUMNS = (tl.constexpr(i) for i in range(6))


@triton.jit
def block_at(table_ptr, matrix, OUT: tl.constexpr, UNIT: tl.constexpr):
    """(pointer to the first element, row stride) of a block; UNIT > 1 promises multiples of 16 bytes for both."""
    entry = table_ptr + matrix * TABLE_COLUMNS
    base = tl.load(entry + ADDRESS).to(tl.pointer_type(OUT))
    if UNIT > 1:
        base = tl.multiple_of(base, 16)
    return base, tl.load(entry + STRIDE) * UNIT


@triton.jit
def moved(w, value, numbers):
    """W keep + step value where the block is on, W keep where it is not, whatever value holds there."""
    w = w * tl.load(numbers + KEEP)
    return tl.where(tl.load(numbers + ON) != 0, w + tl.load(numbers + STEP) * value, w)


@triton.jit(do_not_specialize=["momentum", "n", "m"], do_not_specialize_on_alignment=["table_ptr", "numbers_ptr"])
def move_kernel(
    d_ptr,
    graft_ptr,
    buffer_ptr,
    table_ptr,
    numbers_ptr,
    momentum: tl.float32,
    n: tl.int32,
    m: tl.int32,
    MOMENTUM: tl.constexpr,
    OUT: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """CHUNK elements of one block; D, graft and buffer are contiguous stacks (batch, n, m), m counts UNIT elements."""
    m = m * UNIT
    size = n * m
    chunks = tl.cdiv(size, CHUNK)
    program = tl.program_id(0)
    matrix, chunk = (program // chunks).to(tl.int64), program % chunks
    flat = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = flat < size
    offset = matrix * size
    numbers = numbers_ptr + matrix * COLUMNS
    base, stride = block_at(table_ptr, matrix, OUT, UNIT)
    if tl.load(numbers + READY) != 0:
        value = tl.load(numbers + RATIO) * tl.load(d_ptr + offset + flat, mask=inside, other=0.0)
    else:
        value = tl.load(graft_ptr + offset + flat, mask=inside, other=0.0)
    if MOMENTUM != NONE:  # noqa: SIM102 (known when compiled)
        if tl.load(numbers + ON) != 0:  # a block that is skipped keeps its buffer
            kept = momentum * tl.load(buffer_ptr + offset + flat, mask=inside, other=0.0) + value
            tl.store(buffer_ptr + offset + flat, kept, mask=inside)
            if MOMENTUM == NESTEROV:
                value += momentum * kept
            else:
                value = kept
    w_ptr = base + (flat // m).to(tl.int64) * stride + flat % m
    w = moved(widen(tl.load(w_ptr, mask=inside, other=0.0)), value, numbers)
    tl.store(w_ptr, narrow(w, OUT), mask=inside)


class Targets:
    """Blocks of parameters that kernels write, as a table of addresses and row strides on the device.

    views: (n, m) each, of one dtype and device, with elements of a row side by side.  They are kept, and so are their
    addresses: make a new one when a parameter's memory is replaced (`fits`).
    """

    def __init__(self, views: list[torch.Tensor]):
        self.views, self.dtype, shape = views, views[0].dtype, views[0].shape
        for i, x in enumerate(views):
            if x.ndim != 2 or x.shape != shape or x.dtype != self.dtype or (x.shape[1] > 1 and x.stride(1) != 1):
                found = f"{tuple(x.shape)} {x.dtype} with strides {x.stride()}"
                raise ValueError(f"Targets: views[{i}] is {found}, expected rows of {tuple(shape)} {self.dtype}")
        self.addresses = [x.data_ptr() for x in views]
        unit = VECTOR_BYTES // self.dtype.itemsize
        odd = any(a % VECTOR_BYTES for a in self.addresses) or any(
            v % unit for x in views for v in (x.stride(0), *shape[1:])
        )
        self.unit = 1 if odd else unit
        rows = [(a, x.stride(0) // self.unit) for a, x in zip(self.addresses, views)]
        self.table = torch.tensor(rows, dtype=torch.int64).to(views[0].device)

    def fits(self, views: list[torch.Tensor]) -> bool:
        return self.addresses == [x.data_ptr() for x in views]


def move_arguments(d, graft, buffer, targets: Targets, numbers, momentum: float, nesterov: bool):
    batch, n, m = d.shape
    unit = 1 if any(x.data_ptr() % VECTOR_BYTES for x in (d, graft, buffer)) else targets.unit
    table = targets.table if unit == targets.unit else targets.table * torch.tensor([1, targets.unit]).to(d.device)
    options = {
        "MOMENTUM": (NESTEROV if nesterov else HEAVY_BALL).value if momentum else NONE.value,
        "OUT": DTYPES[targets.dtype],
        "UNIT": unit,
        "CHUNK": CHUNK,
        "num_warps": WARPS,
        "enable_fp_fusion": False,
    }
    grid = (batch * -(-n * m // CHUNK),)
    return grid, (d, graft, buffer, table, numbers, float(momentum), n, m // unit), options


def move(
    d: torch.Tensor,
    graft: torch.Tensor,
    targets: Targets,
    numbers: torch.Tensor,
    *,
    buffer: torch.Tensor | None = None,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> None:
    """Moves every block as the module says; reads d, or graft where a block is not ready, and W; writes W.

    d, graft, buffer: (batch, n, m) float32, contiguous; buffer is B, updated, and needed if momentum is not 0.
    numbers: (batch, 5) float32 on the device: keep, step, whether the block is on, ratio, whether it is ready.  One
    that is not on is multiplied by keep and keeps its buffer, whatever d and graft hold.
    One rounding to the parameter's dtype.  Raises ValueError for tensors laid out otherwise, before any change.
    """
    if momentum and buffer is None:
        raise ValueError(f"move: momentum is {momentum}, but there is no buffer")
    buffer = d if buffer is None else buffer
    check_targets("move", targets, numbers, d.shape, COLUMNS.value)
    for name, x in (("d", d), ("graft", graft), ("buffer", buffer)):
        if x.shape != d.shape or x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(
                f"move: {name} is {tuple(x.shape)} {x.dtype}, expected contiguous float32 {tuple(d.shape)}"
            )
    require_device("move", d)
    if d.numel():
        grid, arguments, options = move_arguments(d, graft, buffer, targets, numbers, momentum, nesterov)
        with on_device(d):
            move_kernel[grid](*arguments, **options)


def check_targets(op: str, targets: Targets, numbers: torch.Tensor, shape, columns: int) -> None:
    found = (len(targets.views), *targets.views[0].shape)
    if found != tuple(shape):
        raise ValueError(f"{op}: got targets of {found}, expected {tuple(shape)}")
    if tuple(numbers.shape) != (len(targets.views), columns) or numbers.dtype != torch.float32:
        raise ValueError(
            f"{op}: numbers are {tuple(numbers.shape)} {numbers.dtype}, expected float32 {(shape[0], columns)}"
        )
