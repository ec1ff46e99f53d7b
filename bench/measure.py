"""What this machine can do at best, and what memory a call takes besides its arguments."""

from __future__ import annotations

from functools import cache
from typing import Callable

import torch
from clock import CLOCKS
from torch.profiler import ProfilerActivity, profile


def best_of(function: Callable, device: str, rounds: int = 7) -> float:
    """Fewest seconds of some calls: what the machine can do, not what it usually does."""
    clock = CLOCKS[device]
    function()
    timed = clock.timed(function)
    taken = []
    for _ in range(rounds):
        start = clock()
        timed()
        taken.append(clock() - start)
    return min(taken)


@cache
def copy_bandwidth(device: str) -> float:
    """Bytes per second, read plus written, of a copy that fits into no cache: 256 MiB each way, 1 GiB on a GPU."""
    x = torch.randn(1 << (26 if device == "cpu" else 28), device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / best_of(lambda: y.copy_(x), device)


@cache
def matmul_rate(device: str, dtype: torch.dtype = torch.float32) -> float:
    """FLOP per second of a square product: n = 2048, 8192 on a GPU."""
    n = 2048 if device == "cpu" else 8192
    x = torch.randn(n, n, device=device).to(dtype)
    out = torch.empty_like(x)
    return 2 * n**3 / best_of(lambda: torch.mm(x, x, out=out), device)


def extra_memory(function: Callable, device: str) -> int:
    """Most bytes that a call holds at any time beyond those allocated before it, as torch's allocator counts."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    # Every allocation is a "[memory]" event of so many bytes, every release one of a negative number.
    events = profiled.profiler.kineto_results.events()
    held = most = 0
    for _, nbytes in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        held += nbytes
        most = max(most, held)
    return most
