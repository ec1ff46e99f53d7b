"""Every example runs as its first lines say.  Those for libraries that are not installed are skipped, by name."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "examples").exists(), reason="runs from a source checkout")


def run(*command):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def losses(printed):
    return [float(x) for x in re.findall(r"loss ([0-9.]+)", printed)]


def torchrun(ranks, *options):
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    return losses(run(*command, ROOT / "examples/training/distributed.py", *options))


def test_fsdp2_goes_on_from_a_checkpoint_on_fewer_ranks(tmp_path):
    """2 ranks, then 1: the first loss after resuming follows the last one before it, within a few steps' fall."""
    kept = ("--mode", "fsdp2", "--optimizer", "muon", "--checkpoint", tmp_path / "checkpoint", "--steps", 25)
    first, last = torchrun(2, *kept)
    assert last < 0.7 * first
    resumed, end = torchrun(1, *kept, "--resume")
    assert last - (first - last) / 5 < resumed < last and end < resumed


def test_ddp_shares_the_work(tmp_path):
    first, last = torchrun(2, "--mode", "ddp", "--optimizer", "shampoo", "--steps", 25)
    assert last < first


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed_steps_a_client_optimizer_and_resumes(tmp_path):
    """ZeRO 2 over two ranks; the script compares its resumed run with the uninterrupted one."""
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    script = ROOT / "examples/training/deepspeed_train.py"
    printed = run(*command, script, tmp_path / "out", "--stage", 2, "--steps", 6)
    first, last = map(float, re.search(r"loss ([0-9.]+) -> ([0-9.]+)", printed).groups())
    assert last < first


@pytest.mark.parametrize(
    ("script", "library"),
    [("accelerate_train.py", "accelerate"), ("hf_trainer.py", "transformers"), ("lightning_train.py", "lightning")],
)
def test_example_of_a_library_trains_and_resumes(script, library, tmp_path):
    """Each script compares its resumed run with the uninterrupted one and fails if they differ."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    printed = run(sys.executable, ROOT / "examples/training" / script, tmp_path / "out")
    numbers = [float(x) for x in re.findall(r"loss(?:es)?\s+([0-9.]+)(?:\s*->\s*[0-9.]+|(?:\s[0-9.]+)*)", printed)]
    falls = [float(x) for x in re.findall(r"(?:->|losses [0-9.]+ [0-9.]+) ([0-9.]+)", printed)]
    assert falls and falls[-1] < numbers[-1]
