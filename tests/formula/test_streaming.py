"""Copies past the caches: from and to any alignment, of any size, and nothing beside."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


@pytest.fixture(scope="module")
def stream_copy(tmp_path_factory):
    out = tmp_path_factory.mktemp("streaming") / "streaming.so"
    flags = ["-std=gnu++17", "-fopenmp", "-O0", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC"]
    command = ["g++", *flags, f"-I{CSRC}", f"-I{CSRC}/include", HERE / "streaming.cpp", "-o", out]
    subprocess.run([str(part) for part in command], check=True)
    return ctypes.CDLL(str(out)).stream_copy


def shifted(size: int, shift: int) -> np.ndarray:
    """float32, `shift` elements after the start of a cache line."""
    memory = np.full(size + 64, -1.0, np.float32)
    start = -memory.ctypes.data // 4 % 16 + shift
    return memory[start : start + size]


@pytest.mark.parametrize("shift", range(16))
def test_any_alignment_and_size(stream_copy, shift):
    for size in (*range(36), 47, 48, 49, 200):
        for other in (0, 1, 7):
            source, target = shifted(size + 32, other), shifted(size + 32, shift)
            source[:] = np.arange(size + 32)
            inside = target[16 : 16 + size]
            address = [ctypes.c_void_p(x.ctypes.data) for x in (source[16 : 16 + size], inside)]
            stream_copy(*address, ctypes.c_int64(size))
            assert np.array_equal(inside, source[16 : 16 + size])
            assert (target[:16] == -1).all() and (target[16 + size :] == -1).all()
