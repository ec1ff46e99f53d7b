"""Compares two benchmark files and says which differences are more than noise.

    python bench/compare.py A B                  A: before, B: after; of pytest-benchmark or from bench/results
    python bench/compare.py A B --relative       times divided by the fastest peer's of the same run
    python bench/compare.py A B --threshold 10   a regression is significant and slower by more than 10 % (default 5)

Significance is a two-sided Mann-Whitney U test on the times of all rounds (normal approximation with corrections for
ties and continuity): no assumption about the shape of the noise, which has a long tail.  With 7 rounds against 7 it can
reach p = 0.002.  Rounds of one run share that run's machine state, so two runs of the same code can differ
significantly; the threshold, and --relative, which takes out what slows the peer as well, are for that.

Exit status: 1 with a significant regression beyond the threshold, 2 when the files cannot be compared, otherwise 0.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from table import machine_name, read


@dataclass(frozen=True)
class Difference:
    """Medians of one benchmark in both files, in ms (or relative to the peer), and the probability of chance."""

    name: str
    before: float
    after: float
    p: float

    @property
    def percent(self) -> float:
        return 100 * (self.after / self.before - 1)

    def verdict(self, alpha: float, threshold: float) -> str:
        if self.p >= alpha:
            return "no difference found"
        if self.percent > threshold:
            return "REGRESSION"
        return "faster" if self.percent < -threshold else "significant, within the threshold"


def mann_whitney(a: list[float], b: list[float]) -> float:
    """Two-sided p that a and b come from one distribution."""
    ordered = sorted([(t, 0) for t in a] + [(t, 1) for t in b])
    n, m, ties, rank_sum = len(a), len(b), 0, 0.0
    total = n + m
    start = 0
    while start < total:
        end = start
        while end < total and ordered[end][0] == ordered[start][0]:
            end += 1
        mean_rank = (start + 1 + end) / 2
        rank_sum += mean_rank * sum(1 - which for _, which in ordered[start:end])
        ties += (end - start) ** 3 - (end - start)
        start = end
    u = rank_sum - n * (n + 1) / 2
    variance = n * m / 12 * (total + 1 - ties / (total * (total - 1)))
    if variance == 0:
        return 1.0
    z = max(0.0, abs(u - n * m / 2) - 0.5) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2))


def samples(content: dict, relative: bool) -> dict[tuple[str, str], list[float]]:
    """Times by (name, case): the name alone does not say the sizes, which depend on the scale."""
    found = {}
    for entry in content["benchmarks"]:
        figures, times = entry["figures"], entry["rounds_ms"]
        if relative:
            if not figures["peers"]:
                continue
            peer = min(figures["peers"].values(), key=lambda peer: peer["ms"])
            times = [ours / theirs for ours, theirs in zip(times, peer["rounds_ms"])]
        found[entry["name"], figures["case"]] = times
    return found


def compare(before: dict, after: dict, relative: bool = False) -> list[Difference]:
    """Of the benchmarks that both have.  ValueError where there is none."""
    a, b = samples(before, relative), samples(after, relative)
    common = [key for key in a if key in b]
    if not common:
        raise ValueError("the files have no benchmark in common (of the same name and case)")
    return [
        Difference(key[0], statistics.median(a[key]), statistics.median(b[key]), mann_whitney(a[key], b[key]))
        for key in common
    ]


def print_table(found: list[Difference], alpha: float, threshold: float, unit: str) -> None:
    width = max(len(d.name) for d in found)
    print(f"{'benchmark':<{width}}  {'before ' + unit:>12}  {'after ' + unit:>12}  {'change':>8}  {'p':>8}")
    for d in sorted(found, key=lambda d: -d.percent):
        line = f"{d.name:<{width}}  {d.before:>12.4g}  {d.after:>12.4g}  {d.percent:>+7.1f}%  {d.p:>8.2g}"
        print(f"{line}  {d.verdict(alpha, threshold)}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("compare.py", description="Differences between two benchmark files.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=5.0, metavar="PERCENT", help="of slowing down; default 5")
    parser.add_argument("--alpha", type=float, default=0.01, help="significance level; default 0.01")
    parser.add_argument("--relative", action="store_true", help="compare times divided by the fastest peer's")
    options = parser.parse_args(argv)
    try:
        before, after = read(options.before), read(options.after)
        found = compare(before, after, options.relative)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    settings = [(content["scale"], machine_name(content)) for content in (before, after)]
    for one, other in zip(*settings):
        if one != other:
            print(f"compare: the runs differ in more than the code: {one} and {other}", file=sys.stderr)
    print_table(found, options.alpha, options.threshold, "/ peer" if options.relative else "ms")
    regressions = [d for d in found if d.verdict(options.alpha, options.threshold) == "REGRESSION"]
    print(f"{len(found)} compared, {len(regressions)} regressions (p < {options.alpha:g}, > {options.threshold:g} %)")
    return int(bool(regressions))


if __name__ == "__main__":
    sys.exit(main())
