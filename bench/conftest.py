"""Benchmarks with pytest-benchmark: ours and the peers in turn, in one run, correctness first.

    pytest bench                           everything, at full size, on every device of this machine
    pytest bench --scale quick             smaller sizes, under a minute on two cores
    pytest bench --device cpu              or cuda; -m gpu is the same as --device cuda
    pytest bench --benchmark-json=FILE     for bench/table.py, compare.py and plot.py

A function marked `cases(quick={...}, full={...})` runs once for each case of the scale, as its argument `case`.
"""

from __future__ import annotations

import pytest
import torch
from clock import CLOCKS
from measure import copy_bandwidth, matmul_rate
from racing import LIMITS, Limits, Race

from steepest.info import info

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine")
DEVICES = {
    "cpu": pytest.param("cpu", id="cpu", marks=[pytest.mark.benchmark(timer=CLOCKS["cpu"])]),
    "cuda": pytest.param(
        "cuda", id="cuda", marks=[pytest.mark.gpu, NO_GPU, pytest.mark.benchmark(timer=CLOCKS["cuda"])]
    ),
}
USED = pytest.StashKey[set]()  # devices on which something was timed


def pytest_addoption(parser):
    group = parser.getgroup("steepest")
    group.addoption("--scale", choices=list(LIMITS), default="full", help="sizes and time limits (default: full)")
    group.addoption("--device", choices=["auto", *DEVICES], default="auto", help="default: all that this machine has")
    group.addoption("--seconds", type=float, help="of timing per benchmark; at least 7 rounds are run")


def pytest_configure(config):
    config.stash[USED] = set()
    config.addinivalue_line("markers", "cases(quick, full): values of the argument `case` at each --scale, by id")


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("device")
        only = ["cuda"] if metafunc.definition.get_closest_marker("gpu") else list(DEVICES)
        chosen = [DEVICES[name] for name in only if wanted in ("auto", name)]
        metafunc.parametrize("device", chosen or [pytest.param("cuda", marks=pytest.mark.skip("not for the CPU"))])
    marker = metafunc.definition.get_closest_marker("cases")
    if marker is not None:
        scale = metafunc.config.getoption("scale")
        found = [pytest.param(value, id=name) for name, value in marker.kwargs[scale].items()]
        metafunc.parametrize("case", found or [pytest.param(None, marks=pytest.mark.skip(f"not at --scale {scale}"))])


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["steepest"] = info()
    machine_info["scale"] = config.getoption("scale")
    machine_info["device"] = device = "cuda" if "cuda" in config.stash[USED] else "cpu"
    machine_info["copy_GB_per_s"] = copy_bandwidth(device) / 1e9
    machine_info["matmul_GFLOP_per_s"] = matmul_rate(device) / 1e9


def setting(machine_info: dict) -> dict:
    """What must agree for times to be comparable."""
    found = machine_info["steepest"]
    devices = found["cuda"].get("devices") if machine_info["device"] == "cuda" else None
    return {"scale": machine_info["scale"], "cpu": found["cpu"], "gpu": devices, "torch": found["torch"]}


def pytest_benchmark_compare_machine_info(config, benchmarksession, machine_info, compared_benchmark):
    """Warns only for what matters: the measured bandwidth differs a little from run to run."""
    now, saved = setting(machine_info), setting(compared_benchmark["machine_info"])
    for name in now:
        if now[name] != saved[name]:
            benchmarksession.logger.warning(f"{name} is {now[name]} now and was {saved[name]} in the saved run")


@pytest.fixture
def scale(request) -> str:
    return request.config.getoption("scale")


@pytest.fixture
def race(benchmark, device, scale, request) -> Race:
    """See racing.Race."""
    request.config.stash[USED].add(device)
    limits, seconds = LIMITS[scale], request.config.getoption("seconds")
    return Race(benchmark, device, limits if seconds is None else Limits(seconds, limits.slowest))
