"""Muon's first pass over memory: momentum, Nesterov, cast and sum of squares, for any number of matrices at once.

Read the gradient and the buffer, write the buffer and what is to be orthogonalised: 14 bytes per element of float32
with float16 to work on.  The norm is that of what was stored, so that it bounds what the products see.

Float16 has few binades, so a matrix is multiplied by a power of two that suited the step before.  Where its largest
element has left the range since, which the device notices itself, a second pass does the cast again with another power:
results never depend on history, up to rounding of subnormal numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from .portable import DTYPES, narrow, on_device, require_device, trip_count, widen

TILE = 1024
WARPS = 4
NORM_CHUNK = 256
VECTOR_BYTES = 16
# Columns of the table, one row per matrix: addresses, elements, first tile.
GRAD, BUFFER, OUT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NUMEL, FIRST_TILE, TILES = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
COLUMNS = tl.constexpr(6)


@triton.jit
def lerp(start, end, weight, rest):
    """start + weight (end - start), in the form that torch uses; rest = 1 - weight."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * rest)


@triton.jit
def rows_of(address, offsets, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    base = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base + offsets


@triton.jit
def power_of_two(largest):
    """2^(10 - e) for a largest element in [2^e, 2^(e+1)), which then is in [2^10, 2^11); exponents within +-100."""
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
    wanted = tl.minimum(tl.maximum(10 - exponent, -100), 100)
    return ((wanted + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(
    do_not_specialize=["nesterov", "momentum", "rest"],
    do_not_specialize_on_alignment=["table_ptr", "owner_ptr", "prescale_ptr", "again_ptr", "partials_ptr"],
)
def momentum_kernel(
    table_ptr,
    owner_ptr,
    prescale_ptr,
    again_ptr,
    partials_ptr,
    momentum: tl.float32,
    rest: tl.float32,
    nesterov: tl.int32,
    AGAIN: tl.constexpr,
    GRADS: tl.constexpr,
    BUFFERS: tl.constexpr,
    OUTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program takes one tile of the matrix `owner_ptr[program]`; rest = 1 - momentum.  AGAIN: only of matrices that
    `again_ptr` names, and the buffers have been advanced already."""
    program = tl.program_id(0)
    owner = tl.load(owner_ptr + program).to(tl.int64)
    row = table_ptr + owner * COLUMNS
    start = (program - tl.load(row + FIRST_TILE)) * TILE
    left = tl.load(row + NUMEL) - start
    if AGAIN:
        left = tl.where(tl.load(again_ptr + owner) != 0, left, 0)
    within = tl.arange(0, TILE)
    g_ptr = rows_of(tl.load(row + GRAD), start + within, GRADS, ALIGNED)
    b_ptr = rows_of(tl.load(row + BUFFER), start + within, BUFFERS, ALIGNED)
    u_ptr = rows_of(tl.load(row + OUT), start + within, OUTS, ALIGNED)
    prescale = tl.load(prescale_ptr + owner)
    if left >= TILE:  # without a mask, whose unknown length would forbid vector accesses
        g, b = widen(tl.load(g_ptr)), widen(tl.load(b_ptr))
        kept, stored, total, largest = advanced(g, b, momentum, rest, nesterov, prescale, AGAIN, BUFFERS, OUTS)
        if not AGAIN:
            tl.store(b_ptr, kept)
        tl.store(u_ptr, stored)
        tl.store(partials_ptr + 2 * program, total)
        tl.store(partials_ptr + 2 * program + 1, largest)
    elif left > 0:
        mask = within < left
        g, b = widen(tl.load(g_ptr, mask=mask, other=0.0)), widen(tl.load(b_ptr, mask=mask, other=0.0))
        kept, stored, total, largest = advanced(g, b, momentum, rest, nesterov, prescale, AGAIN, BUFFERS, OUTS)
        if not AGAIN:
            tl.store(b_ptr, kept, mask=mask)
        tl.store(u_ptr, stored, mask=mask)
        tl.store(partials_ptr + 2 * program, total)
        tl.store(partials_ptr + 2 * program + 1, largest)


@triton.jit
def advanced(g, b, momentum, rest, nesterov, prescale, AGAIN: tl.constexpr, BUFFERS: tl.constexpr, OUTS: tl.constexpr):
    """(new buffer, result, its sum of squares, the largest element before the power of two)."""
    if not AGAIN:
        b = lerp(b, g, rest, momentum)
    kept = narrow(b, BUFFERS)
    b = widen(kept)
    u = tl.where(nesterov != 0, lerp(g, b, momentum, rest), b)
    stored = narrow(u * prescale, OUTS)
    back = widen(stored)
    return kept, stored, tl.sum(back * back), tl.max(tl.abs(u))


@triton.jit(do_not_specialize_on_alignment=["table_ptr", "partials_ptr", "prescale_ptr", "again_ptr", "scale_ptr"])
def norm_kernel(
    table_ptr,
    partials_ptr,
    prescale_ptr,
    again_ptr,
    scale_ptr,
    margin: tl.float32,
    FINAL: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program per matrix puts its partial results together, in a fixed order.

    FINAL: scale = 1 / (margin ‖out‖), 1 for a zero matrix, and the power of two for the next step.  Before that:
    whether this step's power of two brought the largest element out of [2^3, 2^15), and if so a better one.
    """
    matrix = tl.program_id(0)
    row = table_ptr + matrix.to(tl.int64) * COLUMNS
    first, count = tl.load(row + FIRST_TILE), tl.load(row + TILES)
    sums = tl.zeros((CHUNK,), dtype=tl.float32)
    peaks = tl.zeros((CHUNK,), dtype=tl.float32)
    for chunk in range(0, trip_count(tl.cdiv(count, CHUNK))):
        within = chunk * CHUNK + tl.arange(0, CHUNK)
        place = partials_ptr + 2 * (first + within)
        sums += tl.load(place, mask=within < count, other=0.0)
        peaks = tl.maximum(peaks, tl.load(place + 1, mask=within < count, other=0.0))
    largest = tl.max(peaks)
    before = tl.load(prescale_ptr + matrix)
    better = tl.where((largest > 0) & (largest < float("inf")), power_of_two(largest), before)
    if FINAL:
        total = tl.sum(sums)
        tl.store(scale_ptr + matrix, tl.where(total == 0, 1.0, tl.div_rn(1.0, margin * tl.sqrt_rn(total))))
        tl.store(prescale_ptr + matrix, better)
    else:
        scaled = largest * before
        fits = (largest == 0) | ((scaled >= 8.0) & (scaled < 32768.0))
        tl.store(again_ptr + matrix, tl.where(fits, 0, 1))
        tl.store(prescale_ptr + matrix, tl.where(fits, before, better))


class Momentum:
    """The pass laid out for lists of contiguous matrices; launched once per step.

    grads, buffers, outs: lists of tensors, alike in size, each role of one dtype (float32, float16, bfloat16).
    scale: (count,) float32 on the device: after a launch, 1 / ((1 + margin) ‖out‖_F) for every matrix, 1 for zero.
    prescale: (count,) float32 powers of two on the device, ones at first: every launch sets them for the next.
    """

    def __init__(
        self,
        grads: Sequence[torch.Tensor],
        buffers: Sequence[torch.Tensor],
        outs: Sequence[torch.Tensor],
        prescale: torch.Tensor,
        margin: float,
    ):
        self.device, self.prescale, self.margin = outs[0].device, prescale, 1 + margin
        self.scale = torch.empty(len(outs), dtype=torch.float32, device=self.device)
        roles, sizes = (grads, buffers, outs), np.array([x.numel() for x in outs])
        for i, row in enumerate(zip(*roles)):
            if any(x.numel() != row[2].numel() or not x.is_contiguous() for x in row):
                found = [(tuple(x.shape), x.stride()) for x in row]
                raise ValueError(f"Momentum: matrices number {i} are {found}, expected contiguous and alike")
        tiles = np.maximum(-(-sizes // TILE), 1)
        self.table = np.zeros((len(outs), COLUMNS.value), dtype=np.int64)
        self.table[:, :3] = np.array([[x.data_ptr() for x in role] for role in roles]).T
        self.table[:, 3:] = np.stack([sizes, np.cumsum(tiles) - tiles, tiles], axis=1)
        aligned = bool((self.table[:, :3] % VECTOR_BYTES == 0).all())
        self.programs = int(tiles.sum())
        self.partials = torch.zeros(self.programs, 2, dtype=torch.float32, device=self.device)
        self.again = torch.zeros(len(outs), dtype=torch.int32, device=self.device)
        self.tables = [self._put(self.table), self._put(np.repeat(np.arange(len(outs), dtype=np.int32), tiles))]
        names = ("GRADS", "BUFFERS", "OUTS")
        self.options = {name: DTYPES[role[0].dtype] for name, role in zip(names, roles)}
        self.options |= {"ALIGNED": aligned, "TILE": TILE, "num_warps": WARPS, "enable_fp_fusion": False}

    def _put(self, table: np.ndarray) -> torch.Tensor:
        host = torch.from_numpy(table)
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host

    def arguments(self, momentum: float, nesterov: bool) -> tuple:
        numbers = (momentum, 1 - momentum, int(nesterov))
        return (*self.tables, self.prescale, self.again, self.partials, *numbers)

    def norm_arguments(self) -> tuple:
        return self.tables[0], self.partials, self.prescale, self.again, self.scale, self.margin

    def launch(self, momentum: float, nesterov: bool) -> None:
        """B = B + (1 - momentum) (G - B); out = a power of two times G + momentum (B - G), or B without nesterov.

        Four launches, the third of which finds nothing to do unless a matrix has left float16's range.
        """
        require_device("Momentum", self.prescale)
        options = {"CHUNK": NORM_CHUNK, "num_warps": WARPS, "enable_fp_fusion": False}
        with on_device(self.prescale):
            for again in (False, True):
                momentum_kernel[(self.programs,)](*self.arguments(momentum, nesterov), AGAIN=again, **self.options)
                norm_kernel[(len(self.scale),)](*self.norm_arguments(), FINAL=again, **options)
