"""The matrix core in C++ by itself: under AddressSanitizer and UBSan on arrays that end exactly at their last element,
and with each instruction set that this machine has."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=gnu++17", "-Wall", "-Wextra", "-Werror", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
SOURCES = [CSRC / "matrix/product.cpp", CSRC / "matrix/program.cpp", CSRC / "matrix/matrix.cpp"]
SOURCES += [CSRC / "engine/status.cpp", HERE / "driver.cpp"]

pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler: {CXX} is not on PATH")


@functools.cache
def program(extra: tuple[str, ...]) -> Path:
    """The driver, compiled once per process."""
    path = Path(tempfile.mkdtemp(prefix="steepest-matrix-")) / "driver"
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    command = [CXX, *FLAGS, *extra, f"-I{CSRC}", f"-I{CSRC}/include", *SOURCES, "-o", path]
    built = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return path


@pytest.mark.parametrize("extra", [("-O2", "-ffp-contract=fast"), ("-O1", *SANITIZE)], ids=["clones", "sanitized"])
def test_products_and_loops(extra):
    done = subprocess.run([str(program(extra))], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(", 0 failures\n")
