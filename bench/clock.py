"""What times a call: seconds of the host, or of the device between two events."""

from __future__ import annotations

import os
import statistics
import time
from typing import Callable

import torch

# While the device sleeps, the host queues the timed work, so that the events enclose no waiting for the host.
CYCLES_PER_SECOND = 2.0e9  # at least the clock of any GPU so far: too many only sleep longer
LONGEST_SLEEP = 0.02
CACHE_SIZES = (
    3  # so many times the size of the last cache is read before each call, which finds nothing of its own in it
)


class HostClock:
    """Host seconds spent so far inside functions that went through `timed`; the work is done when a call returns.

    Each call finds a cold cache, as an optimizer does in training: other memory is read first.  Without that each
    runner would start in the state that the one before it left: writing back what torch's foreach had written cost
    the next call 1.3 of 7 ms.
    """

    __name__ = "host_clock"

    def __init__(self):
        self.seconds = 0.0
        self.scratch: torch.Tensor | None = None

    def __call__(self) -> float:
        return self.seconds

    def timed(self, function: Callable) -> Callable:
        def run():
            self.cool()
            begin = time.perf_counter()
            function()
            self.seconds += time.perf_counter() - begin

        return run

    def host_seconds(self, function: Callable) -> float | None:
        """Nothing besides the time itself."""
        return None

    def cool(self) -> None:
        if self.scratch is None:
            self.scratch = torch.zeros(CACHE_SIZES * last_level_cache() // 4)
        self.scratch.sum()


def last_level_cache() -> int:
    """Bytes of the largest cache that this process may use; 64 MiB where the system does not say."""
    names = ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE")
    sizes = [os.sysconf(name) for name in names if name in os.sysconf_names]
    return max([size for size in sizes if size > 0], default=64 << 20)


class DeviceClock:
    """Device seconds spent so far inside functions that went through `timed`.

    pytest-benchmark takes differences of its timer around a call, so an accumulated time serves as one in its pedantic
    mode, where nothing is calibrated.  Each call finds a cold cache, as an optimizer does in training, and a device
    that is still busy while the host queues the call.  Single calls are timed, so the cache is emptied by reading other
    memory; that leaves no dirty lines whose writing back would be counted.
    """

    __name__ = "device_clock"  # pytest-benchmark reports its timer by name

    def __init__(self, cuda=torch.cuda, device: str = "cuda"):
        self.cuda, self.device = cuda, device
        self.seconds = 0.0
        self.scratch: torch.Tensor | None = None

    def __call__(self) -> float:
        return self.seconds

    def host_seconds(self, function: Callable) -> float:
        """Median of the time until the call returns, on an idle device."""
        taken = []
        for _ in range(5):
            self.cuda.synchronize()
            begin = time.perf_counter()
            function()
            taken.append(time.perf_counter() - begin)
        self.cuda.synchronize()
        return statistics.median(taken)

    def timed(self, function: Callable) -> Callable:
        cycles = int(min(1.5 * self.host_seconds(function), LONGEST_SLEEP) * CYCLES_PER_SECOND)
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))

        def run():
            self.cuda._sleep(cycles)
            self.cool()
            start.record()
            function()
            end.record()
            end.synchronize()
            self.seconds += start.elapsed_time(end) / 1e3

        return run

    def cool(self) -> None:
        if self.scratch is None:
            nbytes = CACHE_SIZES * self.cuda.get_device_properties(self.device).L2_cache_size
            self.scratch = torch.zeros(nbytes // 4, device=self.device)
        self.scratch.sum()


CLOCKS = {"cpu": HostClock(), "cuda": DeviceClock()}
