"""What a GPU machine runs, on a machine without one: every step leaves its line, and what is skipped says why."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from steepest.conformance import records
from steepest.conformance.runner import FAIL, OK, SKIPPED

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench/gpu_report.sh"
pytestmark = [
    pytest.mark.skipif(not SCRIPT.exists() or shutil.which("bash") is None, reason="needs a source checkout and bash"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="this is the dry run; here the script itself can be run"),
]


def report(folder: Path, steps: str, python: str = sys.executable):
    environment = {**os.environ, "PYTHON": python, "STEEPEST_STEPS": steps, "STEEPEST_PATIENCE": "4"}
    done = subprocess.run(
        ["bash", SCRIPT, folder], env=environment, cwd=folder, capture_output=True, text=True, timeout=900
    )
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return done, {line["step"]: line for line in lines}


@pytest.mark.slow
def test_every_step_leaves_its_line_and_gpu_steps_say_why_they_did_nothing(tmp_path):
    done, steps = report(tmp_path, "info gpu_tests validate bench")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: line["rc"] for name, line in steps.items()} == dict.fromkeys(
        ("info", "gpu_tests", "validate", "bench"), 0
    )
    assert all(line["seconds"] >= 0 for line in steps.values())

    after = {name: done.stdout.partition(f'"step": "{name}"')[2].partition('{"step"')[0] for name in steps}
    for name, place in (("gpu_tests", "tests/gpu/"), ("bench", "bench/bench_")):
        lines = [line for line in after[name].splitlines() if line.startswith("SKIPPED")]
        assert lines and all("no NVIDIA GPU on this machine" in line for line in lines)
        assert any(place in line for line in lines)
    assert "skipped  cuda" in after["validate"] and "no CUDA device" in after["validate"]

    assert json.loads((tmp_path / "info.json").read_text())["torch"] == torch.__version__
    results = records.unpack(records.read(tmp_path / "validate.json"))
    statuses = {name: {r.status for r in results if r.backend == name} for name in ("cpu", "triton", "cuda")}
    assert OK in statuses["cpu"] and FAIL not in statuses["cpu"]
    assert statuses["triton"] == statuses["cuda"] == {SKIPPED}
    assert "skipped" in (tmp_path / "gpu_tests.xml").read_text()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"steps.jsonl", "log.txt", "info.json", "validate.json", "gpu_tests.xml"}  # and no timings
    log = (tmp_path / "log.txt").read_text()
    assert [line for line in log.splitlines() if line.startswith("== ")] == [f"== {name}: status 0" for name in steps]


def test_a_step_that_fails_is_the_exit_status_and_does_not_stop_the_others(tmp_path):
    broken = tmp_path / "python"
    broken.write_text('#!/bin/sh\necho "torch is broken here" >&2\nexit 3\n')
    broken.chmod(0o755)
    done, steps = report(tmp_path, "info validate", str(broken))
    assert done.returncode == 1
    assert {name: line["rc"] for name, line in steps.items()} == {"info": 3, "validate": 3}
    assert "torch is broken here" in done.stdout  # the end of a failing step's log is shown
