"""The CUDA engine's own source, compiled with g++ and run on the host (see shim/cuda_shim.h), against the CPU engine.

Both engines round every operation once to float32 and in the same order, so their results must be equal bit for bit:
no tolerance appears here. NaN equals NaN whatever its payload, since compilers choose which operand's survives.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
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
CUT = ("-DSTEEPEST_CUDA_BLOCK=8", "-DSTEEPEST_CUDA_MAX_GRID=5")
ADDRESS, THREAD = "address,undefined", "thread"

pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler: {CXX} is not on PATH")


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
            "engine/status.cpp",
            "engine/cpu.cpp",
            "engine/cpu_survey.cpp",
            "engine/traffic.cpp",
            "engine/storage_stages.cpp",
            "engine/weight_norm.cpp",
            "engine/measure.cpp",
            "engine/stages.cpp",
        ):
            self.common.append(self.compile_source(CSRC / source, ["-fopenmp", *ENGINE_DEFINES]))
        self.common.append(self.compile_source(HERE / "driver.cpp", []))
        self.programs: dict = {}

    def compile_source(self, source: Path, options: list) -> Path:
        target = self.folder / f"{source.stem}.o"
        compile_([*FLAGS, *options, *INCLUDES, "-c", source, "-o", target])
        return target

    def program(self, defines: tuple = (), sanitizer: str = "", engine: Path = CSRC) -> Path:
        """The driver with the CUDA engine found in folder `engine`, instrumented by `sanitizer`."""
        key = (defines, sanitizer, engine)
        if key not in self.programs:
            # At -O0 instrumented code compiles five times faster than at -O1.
            instrument = ["-O0", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"] if sanitizer else []
            target = self.folder / f"driver-{len(self.programs)}"
            sources = [engine / "engine" / name for name in CUDA_SOURCES]
            as_host_code = ["-include", "cuda_shim.h", "-x", "c++", *sources, "-x", "none"]
            options = [*FLAGS, *instrument, *defines, f"-I{engine}", *INCLUDES]
            compile_([*options, *as_host_code, *self.common, "-fopenmp", "-pthread", "-o", target])
            self.programs[key] = target
        return self.programs[key]


@pytest.fixture(scope="session")
def builder(tmp_path_factory) -> Builder:
    return Builder(tmp_path_factory.mktemp("cuda_host"))


@functools.cache
def can_link(sanitizer: str) -> bool:
    source = "int main() { return 0; }"
    return call([CXX, f"-fsanitize={sanitizer}", "-x", "c++", "-", "-o", os.devnull], input=source).returncode == 0


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


def test_equals_cpu_engine_on_200_random_lists(builder):
    seen = result(run(builder.program(SMALL), "lists", 1, 200, 20000))
    # All situations that the engine treats differently came up.
    for situation in ("empty", "aligned", "shifted", "apart", "skipped", "scaled", "clipped"):
        assert seen[situation] >= 10, (situation, seen)
    for kept in (
        "masters",
        "residuals",
        "sources",
        "averages",
        "block8",
        "stochastic",
        "noise",
        "mixed",
        "counted",
        "live",
    ):
        assert seen[kept] >= 10, (kept, seen)
    assert all(seen[f"rule {rule}"] >= 2 for rule in range(17)), seen
    assert seen["lists_of_several_launches"] >= 3, seen


def test_equals_cpu_engine_with_the_shipped_block_size(builder):
    assert result(run(builder.program(), "lists", 2, 20, 20000))["elements"] > 100_000


def test_equals_cpu_engine_when_tensors_are_cut_between_launches(builder):
    seen = result(run(builder.program(CUT), "lists", 3, 60, 20000))
    assert seen["lists_of_several_launches"] >= 40, seen


def test_measures_equal_the_cpu_s(builder):
    for defines, seed, count in ((SMALL, 1, 120), ((), 2, 8), (CUT, 3, 40)):
        seen = result(run(builder.program(defines), "measures", seed, count, 30000))
        assert defines != SMALL or min(seen[kind] for kind in ("nonfinite", "relative", "clipped", "empty")) >= 8, seen


@pytest.mark.parametrize(
    ("sanitizer", "defines", "lists"),
    [(ADDRESS, SMALL, 60), (ADDRESS, CUT, 30), (THREAD, SMALL, 30)],
    ids=["address", "address-cut", "thread"],
)
def test_sanitizers_are_silent(builder, sanitizer, defines, lists):
    need(sanitizer)
    result(run(builder.program(defines, sanitizer), "lists", 4, lists, 5000, sanitizer=sanitizer))
    result(run(builder.program(defines, sanitizer), "measures", 4, lists // 3, 20000, sanitizer=sanitizer))


@dataclass
class Mutation:
    name: str
    file: str
    old: str
    new: str
    sanitizer: str
    evidence: str  # in what the driver or the sanitizer writes
    defines: tuple = SMALL
    command: str = "lists"


MUTATIONS = [
    Mutation("no-barrier", "cuda.cu", "  __syncthreads();\n", "", THREAD, "data race"),
    Mutation("no-barrier-before-codes", "cuda_general.cu", "    __syncthreads();\n", "", THREAD, "data race"),
    Mutation(
        "no-general-tail",
        "cuda_general.cu",
        "left < kTile ? static_cast<int>(left) : kTile",
        "kTile",
        ADDRESS,
        "heap-buffer-overflow",
    ),
    Mutation(
        "no-tail-mask",
        "cuda.cu",
        "head + (end - head) / kVector * kVector",
        "head + (end - head + kVector - 1) / kVector * kVector",
        ADDRESS,
        "heap-buffer-overflow",
    ),
    Mutation(
        "no-numel-mask",
        "cuda.cu",
        "left < kTile ? static_cast<int>(left) : kTile",
        "left < 0 ? static_cast<int>(left) : kTile",
        ADDRESS,
        "heap-buffer-overflow",
    ),
    Mutation(
        "no-peel",
        "cuda.cu",
        "(first + kVector - 1) / kVector * kVector",
        "first / kVector * kVector",
        "",
        "memory around it was written to",
    ),
    Mutation("phases-not-compared", "cuda_plan.h", "tensor.shift = kApart;", "", ADDRESS, "misaligned address"),
    Mutation(
        "shift-kept-after-a-cut",
        "cuda_plan.h",
        "if (tensor.shift != kApart) tensor.shift = 0;",
        "",
        ADDRESS,
        "misaligned address",
        CUT,
    ),
    Mutation("found_inf-ignored", "cuda_block.h", "*header.found_inf != 0.0f", "false", "", "differs at element"),
    Mutation("not-counted", "cuda_live.cu", "*item.counter = behind + 1.0f;", ";", "", "counter"),
    Mutation(
        "skip-counted", "cuda_live.cu", "*launch.header.found_inf != 0.0f) return;", "false) return;", "", "counter"
    ),
    Mutation("one-row-for-all", "cuda_plan.h", "static_cast<uint16_t>(i - first_)", "0", "", "differs at element"),
    Mutation(
        "rows-of-each-launch", "cuda_plan.h", "(args_.device_rows) + i;", "(args_.device_rows);", "", "differs at"
    ),
    Mutation("live-shrinks", "cuda_plan.h", "args_.counters && may_shrink_after(args_)", "0", "", "differs at element"),
    Mutation("live-rows-of-each-launch", "cuda_live.h", "num_items * row_bytes_", "num_items * 0", "", "differs at"),
    Mutation(
        "live-overrun",
        "cuda_live.cu",
        "  if (i >= launch.header.num_items) return;\n",
        "",
        ADDRESS,
        "AddressSanitizer",
    ),
    Mutation(
        "no-barrier-before-sums",
        "cuda_survey.cu",
        "  __syncthreads();\n  if (lane != 0",
        "  if (lane != 0",
        THREAD,
        "data race",
        command="measures",
    ),
    Mutation(
        "no-barrier-in-the-tree",
        "cuda_survey.cu",
        "      __syncthreads();\n      if (thread < half)",
        "      if (thread < half)",
        THREAD,
        "data race",
        command="measures",
    ),
    Mutation(
        "survey-beyond-the-end",
        "cuda_survey.cu",
        "tensor.numel - begin < kSurveyBlock ? tensor.numel : begin + kSurveyBlock",
        "begin + kSurveyBlock",
        ADDRESS,
        "heap-buffer-overflow",
        command="measures",
    ),
    Mutation(
        "lanes-backwards",
        "cuda_survey.cu",
        "sums[thread + k])",
        "sums[thread + 15 - k])",
        "",
        "measure",
        command="measures",
    ),
    Mutation(
        "tree-backwards",
        "cuda_survey.cu",
        "running_part(launch.parts + begin, end - begin, thread)",
        "running_part(launch.parts + begin, end - begin, 255 - thread)",
        "",
        "measure",
        command="measures",
    ),
    Mutation(
        "survey-parts-of-each-launch",
        "cuda_survey.h",
        "header.parts += header.num_blocks;",
        "",
        "",
        "measure",
        CUT,
        "measures",
    ),
    Mutation(
        "not-relative",
        "cuda_survey.cu",
        "Power{static_cast<double>(scale), header.q}",
        "Power{1.0, header.q}",
        "",
        "measure",
        command="measures",
    ),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutations_are_caught(builder, tmp_path, mutation):
    """Negative controls: the checks above can fail, and for the right reason."""
    need(mutation.sanitizer)
    engine = tmp_path / "engine"
    engine.mkdir()
    for source in (CSRC / "engine").glob("cuda*"):
        text = source.read_text()
        if source.name == mutation.file:
            assert text.count(mutation.old) == 1, f"{mutation.file} no longer has {mutation.old!r} once"
            text = text.replace(mutation.old, mutation.new)
        (engine / source.name).write_text(text)
    program = builder.program(mutation.defines, mutation.sanitizer, tmp_path)
    size = (30, 5000) if mutation.command == "lists" else (60, 30000)
    done = run(program, mutation.command, 4, *size, sanitizer=mutation.sanitizer)
    assert done.returncode != 0
    assert mutation.evidence in done.stderr, done.stderr


# One launch holds (32764 - 48) // 48 = 681 slots of 48 bytes, or (32764 - 48) // 56 = 584 of 56 bytes with AMSGrad, and
# a slot holds a tensor or a row of scalars.
@pytest.mark.parametrize(
    ("tensors", "numel", "rows", "amsgrad", "launches"),
    [
        (5, 0, 1, 0, 0),
        (680, 16, 1, 0, 1),
        (681, 16, 1, 0, 2),
        (583, 16, 1, 1, 1),
        (584, 16, 1, 1, 2),
        (10_000, 16, 1, 0, 15),
        (340, 16, 340, 0, 1),
        (341, 16, 341, 0, 2),
        (292, 16, 292, 1, 1),
        (293, 16, 293, 1, 2),
        # A grid has at most 2^31 - 1 tiles of 4096 elements.
        (1, (2**31 - 1) * 4096, 1, 0, 1),
        (1, (2**31 - 1) * 4096 + 1, 1, 0, 2),
        (3, 2**45, 1, 0, 13),
    ],
)
def test_number_of_launches(builder, tensors, numel, rows, amsgrad, launches):
    assert result(run(builder.program(), "launches", tensors, numel, rows, amsgrad)) == {"launches": launches}


def test_more_than_2_to_32_elements_in_one_tensor(builder):
    outcome = result(run(builder.program(SMALL), "far", 128))
    if "skip" in outcome:
        pytest.skip(outcome["skip"])
    assert outcome == {"checked": 257}


def test_devices_streams_and_refused_launches(builder):
    result(run(builder.program(SMALL), "devices"))
