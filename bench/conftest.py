"""Benchmarks with pytest-benchmark: ours and the peers in turn, in one run, correctness first."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

import steepest
from steepest.info import info


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["steepest"] = info()
    machine_info["copy_GB_per_s"] = copy_bandwidth() / 1e9
    machine_info["matmul_GFLOP_per_s"] = matmul_rate() / 1e9


def best_of(function, rounds: int = 7) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def copy_bandwidth(cache={}) -> float:  # noqa: B006
    """Bytes per second, read plus written, of a copy that does not fit in any cache (256 MiB each way)."""
    if not cache:
        x = torch.randn(1 << 26)
        y = torch.empty_like(x)
        cache["rate"] = 2 * x.nbytes / best_of(lambda: y.copy_(x))
    return cache["rate"]


def matmul_rate(cache={}) -> float:  # noqa: B006
    """FLOP per second of a 2048 x 2048 float32 product."""
    if not cache:
        x, out = torch.randn(2048, 2048), torch.empty(2048, 2048)
        cache["rate"] = 2 * 2048**3 / best_of(lambda: torch.mm(x, x, out=out))
    return cache["rate"]


@pytest.fixture
def race(benchmark):
    """race(ours, peers, ...) times `ours` with pytest-benchmark and each peer once in every round, in turn.

    Machines drift; a ratio of medians of interleaved runs does not.  `extra_info` gets each peer's median in
    milliseconds and ratio (peer / ours) with the quartiles of the round-by-round ratios.
    """

    def run(ours, peers: dict, *, rounds: int = 15, nbytes: int | None = None, flops: int | None = None, **extra):
        peer_times: dict[str, list[float]] = {name: [] for name in peers}

        def peers_in_turn():
            for name, function in peers.items():
                start = time.perf_counter()
                function()
                peer_times[name].append(time.perf_counter() - start)

        for function in (ours, *peers.values()):
            function()
        benchmark.pedantic(ours, setup=peers_in_turn, rounds=rounds, warmup_rounds=1)
        mine = benchmark.stats.stats.data
        median = statistics.median(mine)
        record = {**extra, "ms": median * 1e3, "threads": torch.get_num_threads()}
        for name, times in peer_times.items():
            times = times[-len(mine) :]
            ratios = sorted(t / m for t, m in zip(times, mine))
            record[name] = {
                "ms": statistics.median(times) * 1e3,
                "ratio": statistics.median(times) / median,
                "quartiles": [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]],
            }
        if nbytes:
            record.update(GB_per_s=nbytes / median / 1e9, of_copy=nbytes / median / copy_bandwidth())
        if flops:
            record.update(GFLOP_per_s=flops / median / 1e9, of_matmul=flops / median / matmul_rate())
        benchmark.extra_info.update(record)
        return record

    run.steepest = steepest
    return run
