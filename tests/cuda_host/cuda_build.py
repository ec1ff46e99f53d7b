"""Compiles the CUDA engine's own source with g++ (see shim/cuda_shim.h) and runs it on the host."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CXX = os.environ.get("CXX", "g++")
# The flags that the library is built with: every operation rounds once.
NUMERICS = re.search(r"^set\(cxx_numerics ([^)]*)\)", (CSRC.parent / "CMakeLists.txt").read_text(), re.MULTILINE)[
    1
].split()
FLAGS = ["-std=gnu++17", "-O1", "-g", "-Wall", "-Wextra", *NUMERICS]
INCLUDES = [f"-I{CSRC}", f"-I{CSRC}/include", f"-I{HERE}", f"-I{HERE}/shim"]
ENGINE_DEFINES = ["-DSTEEPEST_WITH_CUDA=1", '-DSTEEPEST_VERSION="0"'] + [
    f'-DSTEEPEST_{name}=""' for name in ("BUILD_TYPE", "COMPILER", "CUDA_ARCHITECTURES", "CUDA_COMPILER")
]
CUDA_SOURCES = ("cuda.cu", "cuda_general.cu", "cuda_live.cu", "cuda_survey.cu")
SMALL = ("-DSTEEPEST_CUDA_BLOCK=8",)
TWO_CHUNKS = ("-DSTEEPEST_CUDA_BLOCK=16",)  # to a tile of general_kernel: in the small one there is one
CUT = ("-DSTEEPEST_CUDA_BLOCK=8", "-DSTEEPEST_CUDA_MAX_GRID=5")
CUT_PAIRS = ("-DSTEEPEST_CUDA_BLOCK=32", "-DSTEEPEST_CUDA_MAX_GRID=5")  # a survey's threads come in two groups of 16
ADDRESS, THREAD = "address,undefined", "thread"

needs_compiler = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler: {CXX} is not on PATH")


def call(command: list, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **options)


def compile_(command: list) -> None:
    done = call([CXX, *command])
    assert done.returncode == 0, done.stderr


@functools.cache
def without_address_randomisation() -> tuple[str, ...]:
    """Prefix under which ThreadSanitizer's fixed shadow addresses are free, where the system lets us turn that off."""
    prefix = ("setarch", platform.machine(), "-R")
    if shutil.which("setarch") and call([*prefix, "true"]).returncode == 0:
        return prefix
    return ()


class Builder:
    """Compiles the engine in variants. What does not depend on the variant is compiled once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.common = []
        for source in (
            "steepest.cpp",
            "survey.cpp",
            "normalize.cpp",
            "check.cpp",
            "engine/status.cpp",
            "engine/cpu.cpp",
            "engine/cpu_survey.cpp",
            "engine/traffic.cpp",
            "engine/storage_stages.cpp",
            "engine/survey_stages.cpp",
            "engine/weight_norm.cpp",
            "engine/measure.cpp",
            "engine/stages.cpp",
        ):
            self.common.append(self.compile_source(CSRC / source, ["-fopenmp", *ENGINE_DEFINES]))
        self.common.append(self.compile_source(HERE / "driver.cpp", []))
        self.programs: dict = {}
        self.objects: dict = {}

    def compile_source(self, source: Path, options: list) -> Path:
        target = self.folder / f"{source.stem}.o"
        compile_([*FLAGS, *options, *INCLUDES, "-c", source, "-o", target])
        return target

    def program(self, defines: tuple = (), sanitizer: str = "", engine: Path = CSRC) -> Path:
        """The driver with the CUDA engine found in folder `engine`, instrumented by `sanitizer`."""
        key = (defines, sanitizer, engine)
        if key not in self.programs:
            files = [path for path in (engine / "engine").glob("cuda*") if engine != CSRC]
            changed = {path.name for path in files if path.read_text() != (CSRC / "engine" / path.name).read_text()}
            everything = any(name.endswith(".h") for name in changed)
            target = self.folder / f"driver-{len(self.programs)}"
            objects = [
                self.engine_object(engine if everything or name in changed else CSRC, name, defines, sanitizer)
                for name in CUDA_SOURCES
            ]
            compile_(
                [*aligned(), *instrumented(sanitizer), *objects, *self.common, "-fopenmp", "-pthread", "-o", target]
            )
            self.programs[key] = target
        return self.programs[key]

    def plan(self, name: str, defines: tuple = ()) -> Path:
        """The checks NAME_plan.cpp of how lists are packed into launches, which need no CUDA and no shim."""
        key = (name, defines)
        if key not in self.programs:
            self.programs[key] = self.folder / f"{name}-{len(self.programs)}"
            compile_([*FLAGS, *defines, *INCLUDES, HERE / f"{name}_plan.cpp", "-o", self.programs[key]])
        return self.programs[key]

    def engine_object(self, engine: Path, name: str, defines: tuple, sanitizer: str) -> Path:
        key = (engine, name, defines, sanitizer)
        if key not in self.objects:
            target = self.folder / f"{name}-{len(self.objects)}.o"
            as_host_code = ["-include", "cuda_shim.h", "-x", "c++", "-c", engine / "engine" / name]
            options = [*FLAGS, *aligned(), *instrumented(sanitizer), *defines, f"-I{engine}", *INCLUDES]
            compile_([*options, *as_host_code, "-fopenmp", "-pthread", "-o", target])
            self.objects[key] = target
        return self.objects[key]


def instrumented(sanitizer: str) -> list[str]:
    # At -O0 instrumented code compiles five times faster than at -O1.
    return ["-O0", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"] if sanitizer else []


@functools.cache
def can_link(sanitizer: str) -> bool:
    source = "int main() { return 0; }"
    return call([CXX, f"-fsanitize={sanitizer}", "-x", "c++", "-", "-o", os.devnull], input=source).returncode == 0


def aligned() -> list[str]:
    """A vector at an address that is no multiple of its size is a fault on a GPU, and none on x86."""
    return ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"] if can_link("alignment") else []


def need(sanitizer: str) -> None:
    if sanitizer and not can_link(sanitizer):
        pytest.skip(f"{CXX} has no runtime for -fsanitize={sanitizer}")


def run(program: Path, *arguments, sanitizer: str = "") -> subprocess.CompletedProcess:
    # Leak detection needs ptrace, which containers forbid.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    prefix = without_address_randomisation() if sanitizer == THREAD else ()
    return call([*prefix, program, *arguments], env={**os.environ, **options})


def result(done: subprocess.CompletedProcess) -> dict:
    """The driver's line of JSON; fails unless it succeeded without a word on stderr (sanitizers write there)."""
    assert done.returncode == 0 and done.stderr == "", f"exit status {done.returncode}\n{done.stderr}"
    return json.loads(done.stdout)
