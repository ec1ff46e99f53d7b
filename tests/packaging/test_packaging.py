"""Wheel, sdist, editable install, CPU-only build, and a C program through find_package and pkg-config."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import steepest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="runs from a source checkout")


def run(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def environment(**extra):
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "STEEPEST_BUILD_DIR")}
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **extra}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources, so that nothing is written into the checkout."""
    target = tmp_path_factory.mktemp("source") / "steepest"
    ignore = shutil.ignore_patterns(".git", ".venv", "build", "out", "*.so", "__pycache__", "lib", "include-installed")
    shutil.copytree(ROOT, target, ignore=ignore)
    return target


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """A wheel built for the CPU only."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", out, source,
        env=environment(CMAKE_ARGS="-DSTEEPEST_CUDA=OFF -DSTEEPEST_WERROR=ON"))  # fmt: skip
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh virtual environment with the wheel; torch and numpy are seen through a path file."""
    where = tmp_path_factory.mktemp("venv")
    venv.create(where, with_pip=False)
    (site,) = where.glob("lib/python*/site-packages")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel)
    # Third-party packages only: an editable steepest of this environment must not be found.
    (site / "third_party.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    return where / "bin" / "python", site / "steepest"


def test_wheel_holds_library_header_and_packages(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "steepest/lib/libsteepest.so", "steepest/include/steepest/steepest.h",
        "steepest/include/steepest/matrix.h", "steepest/include/steepest/dlpack.h",
        "steepest/lib/cmake/steepest/steepest-config.cmake", "steepest/lib/pkgconfig/steepest.pc",
        "steepest/kernels/adamw.py", "steepest/optim/adamw.py", "steepest/reference/adamw.py",
        "steepest/conformance/registry.py", "steepest/matrix/polar.py",
    ):  # fmt: skip
        assert name in names, name
    assert sum(name.startswith("steepest/_C") for name in names) == 1
    assert wheel.stat().st_size < 8 << 20


def test_installed_wheel_steps_without_cuda(installed):
    python, package = installed
    script = (
        "import torch, steepest, json; p = torch.ones(5, requires_grad=True); p.grad = torch.ones(5)\n"
        "steepest.optim.AdamW([p]).step(); from steepest._native import build_info\n"
        "print(json.dumps([steepest.__file__, build_info()['cuda'], p.tolist()]))"
    )
    out = run(python, "-c", script, env=environment(), cwd="/")
    assert str(package) in out and "false" in out


def test_c_program_through_find_package_equals_python_bit_for_bit(installed, tmp_path):
    python, package = installed
    where = run(python, "-m", "steepest", "cmake-dir", env=environment(), cwd="/").strip()
    assert Path(where) == package / "lib/cmake/steepest"
    cmake = shutil.which("cmake", path=environment()["PATH"])
    run(cmake, "-S", HERE, "-B", tmp_path, f"-Dsteepest_DIR={where}", env=environment())
    run(cmake, "--build", tmp_path, env=environment())
    n, steps = 1003, 7
    p, g, m = (torch.randn(n) for _ in range(3))
    v = torch.rand(n)
    data = struct.pack(f"{4 * n}f", *torch.cat([p, g, m, v]).tolist())
    done = subprocess.run([tmp_path / "adamw_steps", str(n), str(steps)], input=data, capture_output=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    for t in range(1, steps + 1):
        steepest.adamw_([p], [g], [m], [v], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, step=t)
    expected = torch.cat([p, m, v]).numpy().view(np.uint32)
    assert [int(line, 16) for line in done.stdout.split()] == expected.tolist()
    check_messages(run(tmp_path / "errors"))


def check_messages(printed):
    """Every wrong call has a code, and a message that names what was wrong."""
    lines = [line.split("|") for line in printed.splitlines()]
    expected = {
        "abi": "compiled for ABI version",
        "exec NULL": "exec is NULL", "exec older": "struct_size is 8", "device": "device is 7", "args NULL": "NULL",
        "workspace": "workspace", "args older": "struct_size is 16", "rule": "rule is 99", "states": "states[1]",
        "dtype": "dtype", "beta2": "beta2",
    }  # fmt: skip
    assert [line[0] for line in lines] == list(expected)
    for what, status, message in lines:
        code = {"workspace": "workspace too small", "abi": "unsupported"}.get(what, "invalid argument")
        assert status == code and expected[what] in message, (what, status, message)


def test_cpp_example_trains_to_the_loss_of_python(installed, tmp_path):
    """Both round in float32, in other orders: sums of up to 1,797 terms, each off by 2^-24 of their size, 60 times."""
    python, _ = installed
    example = ROOT / "examples/cpp"
    where = run(python, "-m", "steepest", "cmake-dir", env=environment(), cwd="/").strip()
    cmake = shutil.which("cmake", path=environment()["PATH"])
    run(cmake, "-S", example, "-B", tmp_path / "build", f"-Dsteepest_DIR={where}", env=environment())
    run(cmake, "--build", tmp_path / "build", env=environment())
    run(sys.executable, example.parent / "training/digits.py", tmp_path / "digits.bin")
    steps = 60
    losses = [float(line) for line in run(tmp_path / "build/train", tmp_path / "digits.bin", steps).split()]
    sys.path.insert(0, str(example.parent / "training"))
    import digits

    x, y = digits.data()
    model = digits.network()
    optimizer = steepest.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01, max_grad_norm=1.0)
    for step in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        assert abs(losses[step] - loss.item()) <= 1e-5, (step, losses[step], loss.item())
        optimizer.step()
    assert len(losses) == steps and losses[-1] < losses[0] / 10
    wrong = subprocess.run([tmp_path / "build/train", tmp_path / "missing", "3"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "ends too early" in wrong.stderr


def test_pkg_config_names_what_is_there(installed):
    _, package = installed
    text = (package / "lib/pkgconfig/steepest.pc").read_text()
    assert "prefix=${pcfiledir}/../.." in text and f"Version: {steepest.__version__}" in text
    if shutil.which("pkg-config"):
        env = environment(PKG_CONFIG_PATH=str(package / "lib/pkgconfig"))
        assert "-lsteepest" in run("pkg-config", "--libs", "steepest", env=env)


def test_sdist_builds_a_wheel(source, tmp_path):
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=source, env=environment())
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[-1] for name in tar.getnames()}
        tar.extractall(tmp_path / "unpacked")
    sources = ("csrc/engine/cuda.cu", "csrc/formula/adam.h", "pyext/bind.cpp", "kernels/adamw.py")
    sources += ("csrc/matrix/kernels.inc", "pyext/bind_matrix.cpp")
    for needed in ("CMakeLists.txt", *sources):
        assert needed in names
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    cmake = shutil.which("cmake", path=environment()["PATH"])
    run(cmake, "-S", unpacked, "-B", tmp_path / "b", "-DSTEEPEST_CUDA=OFF", env=environment())


def test_editable_install_maps_the_source_directories(source, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "third_party.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    python = tmp_path / "venv/bin/python"
    run(python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", source,
        env=environment(CMAKE_ARGS="-DSTEEPEST_CUDA=OFF"))  # fmt: skip
    script = (
        "import torch, steepest, steepest.kernels; print(steepest.__file__, steepest.kernels.__file__)\n"
        "p = torch.ones(3, requires_grad=True); p.grad = torch.ones(3); steepest.optim.AdamW([p]).step()"
    )
    out = run(python, "-c", script, env=environment(), cwd="/")
    assert str(source / "pyext") in out and str(source / "kernels") in out


def test_cuda_on_without_nvcc_says_what_to_set(tmp_path):
    names = ("cmake", "c++", "cc", "make", "ninja", "ld", "as")
    tools = [shutil.which(name, path=environment()["PATH"]) for name in names]
    (tmp_path / "bin").mkdir()
    for tool in filter(None, tools):
        (tmp_path / "bin" / Path(tool).name).symlink_to(Path(tool).resolve() if "venv" not in tool else tool)
    env = {"PATH": str(tmp_path / "bin"), "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(
        ["cmake", "-S", ROOT, "-B", tmp_path / "b", "-DSTEEPEST_CUDA=ON", "-G", "Unix Makefiles"],
        capture_output=True, text=True, env=env,
    )  # fmt: skip
    if "CUDA " in done.stdout and done.returncode == 0:
        pytest.skip("CMake finds this machine's nvcc without PATH")
    assert done.returncode != 0
    assert "no nvcc was found" in done.stderr and "CUDACXX" in done.stderr and "STEEPEST_CUDA=OFF" in done.stderr
    auto = subprocess.run(
        ["cmake", "-S", ROOT, "-B", tmp_path / "auto", "-G", "Unix Makefiles"], capture_output=True, text=True, env=env
    )
    assert auto.returncode == 0, auto.stderr
    assert "building for the CPU only" in auto.stdout
