"""How cost grows: with the number of tensors at a fixed total, with the total, with the size of a matrix.

Every point of a curve is timed once in every round of its benchmark; `extra_info` gets `points` and, from a fit of
least squared relative errors (times span decades), `fit` for ours and each peer.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import adamw_costs, adamw_runners, newton_schulz, parameters, polar_costs

import steepest
from steepest.matrix.polar import plan


def line(xs: list[float], ts: list[float]) -> tuple[float, float, float]:
    """(a, b, worst relative residual) of t = a + b x, least squares of the relative errors."""
    x, t = np.array(xs, float), np.array(ts, float)
    (a, b), *_ = np.linalg.lstsq(np.stack([1 / t, x / t], axis=1), np.ones_like(t), rcond=None)
    return float(a), float(b), float(np.abs((a + b * x) / t - 1).max())


def curves(record: dict) -> dict[str, tuple[list[float], list[float]]]:
    """(x, ms) of each runner's points."""
    points = record["points"]
    return {
        name: ([p["x"] for p in points], [p["runners"][name]["ms"] for p in points]) for name in points[0]["runners"]
    }


def fit_lines(record: dict, unit: str, per_ms: float) -> None:
    """`unit` is what the slope is called, `per_ms` how many of it make a millisecond."""
    if record:
        record["fit"] = {}
        for name, (xs, ts) in curves(record).items():
            a, b, worst = line(xs, ts)
            record["fit"][name] = {unit: b * per_ms, "at_zero_us": a * 1e3, "worst_residual": worst}


def adamw_sweep(race, device: str, lists: dict[int, list], axis: str, case: str) -> dict:
    """lists: shapes of the tensors by x."""
    points = {}
    for x, shapes in lists.items():
        params = parameters(shapes, torch.float32, device)
        points[x] = adamw_runners(params, ["torch fused"])
    ours, peers = points[max(points)]
    return race(ours, peers, points=points, op="adamw", case=case, axis=axis, **adamw_costs(params))


@pytest.mark.cases(quick={"1M": (1 << 20, 4096)}, full={"4M": (1 << 22, 16384)})
def bench_scaling_tensor_count(race, device, case):
    """The same elements in 1, 4, 16, ... tensors: the slope is what a tensor costs by being one more."""
    total, most = case
    counts = [4**k for k in range(8) if 4**k <= most]
    lists = {count: [(total // count,)] * count for count in counts}
    record = adamw_sweep(race, device, lists, "tensors", f"1 to {most} tensors, {total >> 20}M elements in all")
    fit_lines(record, "us_per_added_tensor", 1e3)


@pytest.mark.cases(quick={"to-4M": 22}, full={"to-32M": 25})
def bench_scaling_elements(race, device, case):
    """One tensor of 2^14, 2^16, ... elements."""
    sizes = [1 << k for k in range(case % 2 + 14, case + 1, 2)]
    lists = {size: [(size,)] for size in sizes}
    record = adamw_sweep(race, device, lists, "elements", f"1 tensor of {sizes[0]} to {sizes[-1]} elements")
    fit_lines(record, "ns_per_element", 1e6)


@pytest.mark.cases(quick={"to-512": (64, 128, 256, 512)}, full={"to-2048": (64, 128, 256, 512, 1024, 2048)})
def bench_scaling_matrix_size(race, device, case):
    """Polar factors of square matrices; `exponent` is the slope of log t over log n at the three largest."""
    matrices = {n: torch.randn(n, n, device=device) for n in case}
    schedule = plan((1, 1), torch.float32, device).schedule
    points = {
        n: (
            lambda x=x: steepest.polar(x),
            {"plain Newton-Schulz": lambda x=x: newton_schulz(x, schedule, torch.float32)},
        )
        for n, x in matrices.items()
    }
    ours, peers = points[case[-1]]
    costs = polar_costs(matrices[case[-1]])
    flops = {str(n): polar_costs(x)["flops"] for n, x in matrices.items()}
    name = f"{case[0]} x {case[0]} to {case[-1]} x {case[-1]}"
    record = race(ours, peers, points=points, op="polar", case=name, axis="n", point_flops=flops, **costs)
    if record:
        tails = {name: (np.log(xs[-3:]), np.log(ts[-3:])) for name, (xs, ts) in curves(record).items()}
        record["fit"] = {name: {"exponent": float(np.polyfit(xs, ts, 1)[0])} for name, (xs, ts) in tails.items()}
