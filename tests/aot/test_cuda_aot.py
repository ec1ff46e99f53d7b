"""What nvcc makes of the CUDA engine, on a machine without a GPU: registers, memory accesses, rounding, size.

The kernels are bound by memory bandwidth, so what matters is that enough bytes are in flight (occupancy, 16-byte
accesses) and that no byte is moved twice (no spills). The numbers are read from the compiler's own output.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import resource
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
ARCHITECTURES = ("80", "90", "100", "120")
TYPES = {
    "fff": ("f32", "f32", "f32"),
    "NS_8bfloat16ES3_S3_": ("bf16", "bf16", "bf16"),
    "NS_7float16ES3_S3_": ("f16", "f16", "f16"),
    "NS_8bfloat16ES3_f": ("bf16", "bf16", "f32"),
    "NS_7float16ES3_f": ("f16", "f16", "f32"),
}
BLOCK = 256  # threads
REGISTERS_PER_SM = 65536
ARGUMENT_BYTES = 32764  # limit on kernel arguments since CUDA 12.1, sm_70 and later


def find_nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def find_cuobjdump() -> str | None:
    """From the CUDA toolkit or from the triton wheel; triton itself is not imported."""
    triton = importlib.util.find_spec("triton")
    packages = triton.submodule_search_locations if triton else []
    folders = [os.environ.get("PATH", ""), *(f"{package}/backends/nvidia/bin" for package in packages)]
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc: set CUDACXX or put it on PATH")


def cmake_list(name: str) -> list[str]:
    """A list of flags as CMakeLists.txt sets it."""
    found = re.search(rf"^set\({name} ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
    assert found, f"CMakeLists.txt does not set {name}"
    return found[1].split()


def run(*command) -> subprocess.CompletedProcess:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def nvcc(*options) -> str:
    includes = [f"-I{CSRC}", f"-I{CSRC}/include"]
    done = run(find_nvcc(), "-std=c++17", "-O3", *cmake_list("cuda_numerics"), *includes, *options)
    return done.stdout + done.stderr


@dataclass
class Kernel:
    registers: int
    stack: int
    spills: int
    code: list[tuple[int, str]] = field(default_factory=list)  # (address, instruction)


def kernel_name(mangled: str) -> tuple[tuple[str, str, str], bool]:
    """Types of parameter, gradient and state, and whether it is the AMSGrad variant."""
    found = re.search(r"adamw_kernelI(?:I?)(.+?)Lb([01])E", mangled)
    return TYPES[found[1]], found[2] == "1"


def read_resources(log: str) -> dict:
    """{architecture: {kernel name: Kernel}} from the output of `ptxas -v`."""
    kernels: dict = {}
    pattern = (
        r"Compiling entry function '(\S*adamw_kernel\S*)' for 'sm_(\d+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    for name, architecture, stack, stores, loads, registers in re.findall(pattern, log, re.DOTALL):
        kernel = Kernel(int(registers), int(stack), int(stores) + int(loads))
        kernels.setdefault(architecture, {})[kernel_name(name)] = kernel
    return kernels


@dataclass
class Build:
    object_file: Path
    cpu_seconds: float
    kernels: dict


@pytest.fixture(scope="session")
def build(tmp_path_factory) -> Build:
    """cuda.cu for all architectures, as the library is built."""
    target = tmp_path_factory.mktemp("cuda_aot") / "cuda.o"
    real = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES[:-1]]
    last = f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=[sm_{ARCHITECTURES[-1]},compute_{ARCHITECTURES[-1]}]"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    log = nvcc("-Xptxas=-v", "-Xcompiler=-fPIC", *real, last, "-c", CSRC / "engine" / "cuda.cu", "-o", target)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Build(target, seconds, read_resources(log))


@pytest.fixture(scope="session")
def machine_code(build) -> dict:
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump: install the CUDA toolkit's or the triton wheel")
    for architecture in ARCHITECTURES:
        text = run(tool, "-sass", "-arch", f"sm_{architecture}", build.object_file).stdout
        for function in text.split("Function : ")[1:]:
            code = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(\S.*?)\s*;", function)
            kernel = build.kernels[architecture][kernel_name(function.split()[0])]
            kernel.code = [(int(address, 16), instruction) for address, instruction in code]
    return build.kernels


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_and_spills(build, architecture):
    kernels = build.kernels[architecture]
    assert set(kernels) == {(types, amsgrad) for types in TYPES.values() for amsgrad in (False, True)}
    for (types, amsgrad), kernel in kernels.items():
        # Blocks per SM: 4 x 256 threads have 64 KiB of loads in flight (4 roles of 16 bytes each), where an H200 needs
        # 4.8 TB/s x 0.8 us / 132 SMs = 29 KiB; with AMSGrad 3 x 256 threads and 5 roles make 60 KiB.
        blocks = 3 if amsgrad else 4
        assert kernel.registers <= REGISTERS_PER_SM // (blocks * BLOCK) // 8 * 8, (types, amsgrad, kernel.registers)
        assert (kernel.stack, kernel.spills) == (0, 0), (types, amsgrad)


def loop_around(code: list[tuple[int, str]], first: int, last: int) -> bool:
    """Whether a backward branch encloses addresses first..last."""
    jumps = [(address, re.search(r"\bBRA\b.*0x([0-9a-f]+)", instruction)) for address, instruction in code]
    return any(jump and int(jump[1], 16) <= first and address >= last for address, jump in jumps)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_main_loop_moves_16_bytes_at_a_time(machine_code, architecture):
    width = {"f32": 4, "bf16": 2, "f16": 2}
    for ((p, g, s), amsgrad), kernel in machine_code[architecture].items():
        loads = [at for at, instruction in kernel.code if re.search(r"\bLDG\.E\S*\.128", instruction)]
        stores = [at for at, instruction in kernel.code if re.search(r"\bSTG\.E\S*\.128", instruction)]
        # A thread steps as many elements as 16 bytes of parameters hold: one access of them, two of a float32 state
        # beside them.
        words = width[s] // width[p]
        states = 3 if amsgrad else 2
        assert (len(loads), len(stores)) == (1 + width[g] // width[p] + states * words, 1 + states * words), (p, g, s)
        assert loop_around(kernel.code, min(loads), max(stores)), (p, g, s, amsgrad)
        assert max(loads) < min(stores), (p, g, s, amsgrad)


@pytest.fixture(scope="session")
def ptx(tmp_path_factory) -> str:
    target = tmp_path_factory.mktemp("cuda_ptx") / "cuda.ptx"
    nvcc("-ptx", "-arch=compute_80", CSRC / "engine" / "cuda.cu", "-o", target)
    return target.read_text()


def test_every_operation_rounds_once_to_nearest(ptx):
    """ptxas contracts `mul.f32` and `add.f32` unless they say `.rn`; divisions and roots are IEEE 754's with `.rn`.

    (In machine code they become sequences with FFMA in them, so the check has to be made here.)
    """
    arithmetic = set(re.findall(r"^\s+(?:@\S+ )?([a-z0-9_.]+\.f32)\s", ptx, re.MULTILINE))
    used = {name for name in arithmetic if re.match(r"(add|sub|mul|div|sqrt|fma|mad|rcp|rsqrt)\b", name)}
    assert used == {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f32"}
    assert ".ftz" not in ptx and ".approx" not in ptx


def test_kernel_arguments_fit(ptx):
    sizes = {int(size) for size in re.findall(r"\.param \S+ \S+ \.b8 \S*adamw_kernel\S*_param_0\[(\d+)\]", ptx)}
    assert sizes == {24 + 682 * 48, 24 + 584 * 56}
    assert max(sizes) <= ARGUMENT_BYTES


def test_compile_time_and_size(build):
    # The whole build has 2 minutes on 2 cores and 8 MB for the library; CPU time does not depend on what else runs.
    assert build.cpu_seconds < 60
    assert build.object_file.stat().st_size < 4e6


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(has_driver(), reason="needs a machine without a CUDA driver")
def test_clean_error_without_a_driver(build, tmp_path):
    """A library with a static CUDA runtime loads anywhere, and a step on a GPU that is not there says so."""
    program = tmp_path / "program.cpp"
    program.write_text(
        """
        #include <cstdio>
        #include "engine/engine.h"
        int main() {
          using namespace steepest;
          float x[4] = {1, 1, 1, 1};
          void *address[1] = {x};
          int64_t numel = 4;
          steepest_adamw_hyper hyper = {1e-3, 0.9, 0.999, 1e-8, 0, 1};
          steepest_adamw_args args = {};
          args.num_tensors = 1, args.numel = &numel, args.num_hyper = 1, args.hyper = &hyper;
          args.params = args.exp_avgs = args.exp_avg_sqs = address, args.grads = address;
          steepest_exec exec = {};
          exec.device = STEEPEST_CUDA;
          AdamWScalars scalars = adamw_scalars(hyper);
          const steepest_status status = cuda::adamw({&exec, &args, &scalars});
          std::printf("%d %d %s", status, x[0] == 1, steepest_last_error());
        }
        """
    )
    executable = tmp_path / "program"
    sources = [program, CSRC / "engine" / "status.cpp", build.object_file]
    nvcc("-cudart=static", *sources, "-o", executable)
    status, unchanged, message = run(executable).stdout.split(" ", 2)
    assert (int(status), int(unchanged)) == (4, 1)
    assert message.startswith("steepest_adamw_step: device 0 cannot be used: "), message
    assert "driver" in message or "no CUDA-capable device" in message, message
