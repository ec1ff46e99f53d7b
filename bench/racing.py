"""Ours and the peers in turn, in one run, and what their times come to."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Callable

import torch
from clock import CLOCKS
from measure import copy_bandwidth, extra_memory, matmul_rate

OURS = "ours"


@dataclass(frozen=True)
class Limits:
    """How long a benchmark may take; results below `least` rounds would not let compare.py find anything."""

    seconds: float  # for all rounds of all runners together
    slowest: float  # a peer whose single call takes longer is left out
    least: int = 7
    most: int = 31

    def rounds(self, turn: float) -> int:
        return max(self.least, min(self.most, int(self.seconds / turn)))


LIMITS = {"quick": Limits(seconds=0.6, slowest=1.5), "full": Limits(seconds=5.0, slowest=10.0)}


def interleave(benchmark, clock, subject: Callable, others: dict, limits: Limits) -> dict | None:
    """Seconds of each round by runner: `subject` timed by pytest-benchmark (key OURS), each other once before it.

    Machines drift; a ratio of interleaved runs does not.  None where pytest-benchmark is told to time nothing.
    """
    subject = clock.timed(subject)
    timed = {key: clock.timed(function) for key, function in others.items()}
    taken: dict = {key: [] for key in others}

    def others_in_turn():
        for key, function in timed.items():
            start = clock()
            function()
            taken[key].append(clock() - start)

    begin = time.perf_counter()
    others_in_turn()
    subject()
    rounds = limits.rounds(time.perf_counter() - begin)
    benchmark.pedantic(subject, setup=others_in_turn, rounds=rounds, warmup_rounds=1)
    if benchmark.stats is None:
        return None
    mine = list(benchmark.stats.stats.data)
    return {OURS: mine, **{key: times[-len(mine) :] for key, times in taken.items()}}


LOOPS, CALLS = 3, 6  # each runner's calls in a loop: so many times so many, the first of each not counted
LOOP_SECONDS = 0.5  # of one call of every runner: a longer one finds little of its own in a cache anyway


def in_loops(runners: dict[str, Callable]) -> dict[str, float]:
    """Median seconds of a call that follows one of its own, by runner: caches hold what fits of its memory.

    That is what a timing loop finds; `interleave` finds what training does, where a model's passes come in between.
    """
    taken: dict = {name: [] for name in runners}
    for _ in range(LOOPS):
        for name, function in runners.items():
            for _ in range(CALLS):
                begin = time.perf_counter()
                function()
                taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(t for k, t in enumerate(times) if k % CALLS) for name, times in taken.items()}


def against(mine: list[float], theirs: list[float]) -> dict:
    """A peer's median and its ratio to ours, with the quartiles of the round-by-round ratios."""
    ratios = sorted(t / m for t, m in zip(theirs, mine))
    return {
        "ms": statistics.median(theirs) * 1e3,
        "ratio": statistics.median(theirs) / statistics.median(mine),
        "quartiles": [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]],
        "rounds_ms": [t * 1e3 for t in theirs],
    }


def quick_enough(peers: dict, limits: Limits) -> tuple[dict, dict]:
    """The peers to time, and those left out with the reason.  Every peer is called once."""
    kept, left_out = {}, {}
    for name, function in peers.items():
        begin = time.perf_counter()
        function()
        seconds = time.perf_counter() - begin
        if seconds > limits.slowest:
            left_out[name] = f"one call takes {seconds:.1f} s"
        else:
            kept[name] = function
    return kept, left_out


class Race:
    """race(ours, peers, ...) times `ours` with pytest-benchmark and each peer in turn, and fills `extra_info`.

    Args:
        ours, peers: functions without arguments; all have been called once, and their results compared.
        op, case: what is timed; shown in tables.
        nbytes, flops: the least that has to be moved and computed, from the registry or the planner.
        dtype: in which products are computed; their measured rate is what GFLOP/s are compared with.
        points: for a sweep, {x: (ours, peers)} timed in the same rounds; the call itself is the last point of it.
        extra: further figures to keep.
    """

    def __init__(self, benchmark, device: str, limits: Limits):
        self.benchmark, self.device, self.limits = benchmark, device, limits
        self.clock = CLOCKS[device]

    def __call__(
        self, ours: Callable, peers: dict, *, op: str, case: str, nbytes: int | None = None, flops: int | None = None,
        dtype: torch.dtype = torch.float32, points: dict | None = None, **extra,
    ) -> dict:  # fmt: skip
        self.benchmark.group = op
        ours()
        peers, left_out = quick_enough(peers, self.limits)
        others = dict(peers)
        for x, (function, rivals) in (points or {}).items():
            others |= {(x, name): rival for name, rival in {OURS: function, **rivals}.items()}
        times = interleave(self.benchmark, self.clock, ours, others, self.limits)
        if times is None:
            return {}
        mine = times[OURS]
        record = {
            "op": op, "case": case, "device": self.device, "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(), **extra, "ms": statistics.median(mine) * 1e3,
            "peers": {name: against(mine, times[name]) for name in peers},
        }  # fmt: skip
        if left_out:
            record["left_out"] = left_out
        self._costs(record, {OURS: ours, **peers})
        if self.device == "cpu":
            self._loops(record, {OURS: ours, **peers})
        self._roofline(record, nbytes, flops, dtype)
        if points:
            record["points"] = [_point(x, point, times) for x, point in points.items()]
        self.benchmark.extra_info.update(record)
        return self.benchmark.extra_info

    def _costs(self, record: dict, runners: dict) -> None:
        """Microseconds until the call returns, and the most memory that it takes besides its arguments."""
        for name, function in runners.items():
            place = record if name == OURS else record["peers"][name]
            seconds = self.clock.host_seconds(function)
            place["host_us"] = place["ms"] * 1e3 if seconds is None else seconds * 1e6
            place["extra_bytes"] = extra_memory(function, self.device)

    def _loops(self, record: dict, runners: dict) -> None:
        turn = record["ms"] + sum(peer["ms"] for peer in record["peers"].values())
        if turn > 1e3 * LOOP_SECONDS:
            return
        seconds = in_loops(runners)
        record["loop_ms"] = 1e3 * seconds[OURS]
        for name, peer in record["peers"].items():
            peer.update(loop_ms=1e3 * seconds[name], loop_ratio=seconds[name] / seconds[OURS])

    def _roofline(self, record: dict, nbytes: int | None, flops: int | None, dtype: torch.dtype) -> None:
        seconds = record["ms"] / 1e3
        if nbytes:
            rate, peak = nbytes / seconds, copy_bandwidth(self.device)
            record.update(bytes=nbytes, GB_per_s=rate / 1e9, of_copy=rate / peak, copy_GB_per_s=peak / 1e9)
        if flops:
            rate, peak = flops / seconds, matmul_rate(self.device, dtype)
            record.update(flops=flops, GFLOP_per_s=rate / 1e9, of_matmul=rate / peak, matmul_GFLOP_per_s=peak / 1e9)


def _point(x, point: tuple[Callable, dict], times: dict) -> dict:
    """Median and quartiles in ms, by runner."""
    found = {}
    for name in (OURS, *point[1]):
        ordered = sorted(1e3 * t for t in times[x, name])
        quartiles = [ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]]
        found[name] = {"ms": statistics.median(ordered), "quartiles_ms": quartiles}
    return {"x": x, "runners": found}
