"""Memory laid out so that mistakes show: guard bands, gaps, misaligned starts, NaN in whatever was never written."""

from __future__ import annotations

from contextlib import contextmanager

import torch

# A quiet NaN with a payload: reading it spoils the result, and writing anything that is not computed from it changes
# its bits.  An update in place that reaches too far is computed from it, and processors hand a NaN's payload on; so
# guards are also checked with `finite_surroundings`.
SENTINEL = {
    torch.float64: (torch.int64, 0x7FF8DEADBEEFCAFE),
    torch.float32: (torch.int32, 0x7FC5BEEF),
    torch.bfloat16: (torch.int16, 0x7FD5),
    torch.float16: (torch.int16, 0x7E55),
    # Integers have no NaN: patterns that codes and correction bits would hardly all have.
    torch.int16: (torch.int16, 0x5A5B),
    torch.int8: (torch.int8, 0x5B),
    torch.uint8: (torch.uint8, 0xA7),
}
GUARD = 64  # elements on either side: more than any vector width

LAYOUTS = ("contiguous", "transposed", "channels_last", "gaps")


def bits(x: torch.Tensor) -> torch.Tensor:
    """The tensor's bit patterns as integers, on the CPU, in logical order."""
    return x.detach().cpu().contiguous().view(SENTINEL[x.dtype][0])


def differing(a: torch.Tensor, b: torch.Tensor) -> int:
    """Number of elements whose bits differ; any NaN equals any NaN (payloads are nobody's contract)."""
    both_nan = a.detach().cpu().isnan() & b.detach().cpu().isnan()
    return int(((bits(a) != bits(b)) & ~both_nan).sum())


def layout_strides(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Element strides of `shape` in a layout: which dimension runs fastest, and whether there are gaps."""
    d = len(shape)
    if layout == "transposed":
        order = list(range(d))  # first dimension fastest
    elif layout == "channels_last" and d == 4:
        order = [1, 3, 2, 0]
    else:
        order = list(reversed(range(d)))
    strides, step = [0] * d, 2 if layout == "gaps" else 1
    for axis in order:
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)


class Guarded:
    """A tensor inside a larger buffer of sentinels; `intact` says whether only the tensor itself was written."""

    def __init__(self, values: torch.Tensor, *, layout: str = "contiguous", offset: int = 0, device="cpu"):
        integer, pattern = SENTINEL[values.dtype]
        strides = layout_strides(tuple(values.shape), layout)
        span = 0 if values.numel() == 0 else 1 + sum((n - 1) * s for n, s in zip(values.shape, strides))
        self.filled = _surroundings(span + 2 * GUARD, values.dtype, integer, pattern).to(device)
        self.buffer = self.filled.clone()
        self.view = self.buffer.view(values.dtype).as_strided(values.shape, strides, GUARD + offset)
        self.view.copy_(values)
        self.outside = torch.ones_like(self.buffer, dtype=torch.bool)
        self.outside.as_strided(values.shape, strides, GUARD + offset).fill_(False)

    def overwritten(self) -> int:
        """Number of elements outside the tensor that changed."""
        return int(((self.buffer != self.filled) & self.outside).sum())


_generator: torch.Generator | None = None


@contextmanager
def finite_surroundings():
    """Within it, what surrounds a Guarded tensor are seeded random numbers from [0.5, 1) instead of NaN."""
    global _generator
    _generator = torch.Generator().manual_seed(0)
    try:
        yield
    finally:
        _generator = None


def _surroundings(count: int, dtype: torch.dtype, integer: torch.dtype, pattern: int) -> torch.Tensor:
    if _generator is None:
        return torch.full((count,), pattern, dtype=integer)
    return (0.5 + torch.rand(count, generator=_generator, dtype=torch.float64) / 2).to(dtype).view(integer)


@contextmanager
def poisoned_memory():
    """Within it, memory that torch allocates uninitialised holds NaN, so that a result never written is seen."""
    before, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    # torch fills only in deterministic mode; "warn", because ops without such a mode must still run.  Not by
    # torch.use_deterministic_algorithms, which imports the compiler: 2.8 s in every process that runs a cell.
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
