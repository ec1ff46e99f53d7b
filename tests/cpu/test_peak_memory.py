"""Peak extra memory of matrix functions and of Muon's step on the CPU, as their docstrings state it, measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20
# Of a call's growth beyond what it was: the kernel counts pages, and allocators keep some.
SLACK = 6 * MIB
PREAMBLE = """
import torch, steepest
from steepest.matrix import native
torch.set_num_threads(2)

def peak(function):
    function()  # programs are recorded, pages of code are read
    native._kept.__dict__.clear()  # the scratch of a first call counts too
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins anew
    read = lambda key: next(int(s.split()[1]) * 1024 for s in open("/proc/self/status") if s.startswith(key))
    before = read("VmRSS")
    function()
    print(read("VmHWM") - before)
"""


def measured(code: str) -> int:
    script = PREAMBLE + code
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return int(found.stdout)


pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)


def native_scratch(n: int, m: int, threads: int) -> int:
    """One n x m and four n x n matrices in panels of 48 columns and a multiple of 8 rows; packed parts per thread."""
    rows, wide, square = n + 7, m + 47, n + 47
    return 4 * (rows * wide + 4 * rows * square) + threads * (4 << 20)


@pytest.mark.parametrize("n, m", [(1024, 4096), (1024, 1024)])
def test_polar_of_a_large_matrix(n, m):
    found = measured(f"x = torch.randn({n}, {m}); peak(lambda: steepest.polar(x))")
    result = 4 * n * m
    assert result <= found + SLACK and found <= result + native_scratch(n, m, 2) + SLACK, found / MIB


def test_polar_of_a_batch_takes_scratch_per_thread_and_not_per_matrix():
    found = measured("x = torch.randn(4000, 64, 64); peak(lambda: steepest.polar(x))")
    result = 4 * 4000 * 64 * 64
    assert found <= result + 2 * native_scratch(64, 64, 2) + SLACK, found / MIB


def test_inverse_roots_walk_a_few_matrices_at_a_time():
    """The result, its input scaled, M and the vectors of the bound; not one matrix per product."""
    found = measured("""
x = torch.randn(400, 128, 16)
a = x @ x.mT
peak(lambda: steepest.inverse_root(a, ridge=1e-4))""")
    assert found <= 4 * (4 * 400 * 128 * 128) + 2 * native_scratch(128, 128, 2) + SLACK, found / MIB


@pytest.mark.parametrize("count, rows, columns", [(20, 512, 2048), (60, 256, 256)])
def test_a_step_of_muon(count, rows, columns):
    """Besides parameters, gradients and momentum: the updates (Nesterov's), and for one batch of at most 2^24 elements
    its input and result; then steps that are scaled and added.  No second copy of the model beyond these."""
    found = measured(f"""
params = [torch.randn({rows}, {columns}, requires_grad=True) for _ in range({count})]
for p in params:
    p.grad = torch.randn_like(p)
optimizer = steepest.optim.Muon(params, lr=0.01)
peak(optimizer.step)""")
    model = 4 * count * rows * columns
    batch = min(model, 4 << 24)
    scratch = native_scratch(min(rows, columns), max(rows, columns), 2)
    assert found <= model + 2 * batch + scratch + SLACK, (found / MIB, model / MIB)
