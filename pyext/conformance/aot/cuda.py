"""What nvcc makes of the CUDA engine, on a machine without a GPU, and what is wanted of it.

The kernels are bound by memory bandwidth, so what matters is that enough bytes are in flight (occupancy, 16-byte
accesses) and that no byte is moved twice (no spills).  The numbers are read from the compiler's own output.
"""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc"
TYPES = {
    "fff": ("float32", "float32", "float32"),
    "NS_8bfloat16ES3_S3_": ("bfloat16", "bfloat16", "bfloat16"),
    "NS_7float16ES3_S3_": ("float16", "float16", "float16"),
    "NS_8bfloat16ES3_f": ("bfloat16", "bfloat16", "float32"),
    "NS_7float16ES3_f": ("float16", "float16", "float32"),
    # Restore's alone: a float32 master in the gradient's place.
    "NS_8bfloat16Eff": ("bfloat16", "float32", "float32"),
    "NS_7float16Eff": ("float16", "float32", "float32"),
}
GENERAL = ("any", "any", "any")  # types of the kernels in cuda_general.cu, which ask for them at run time
SOURCES = ("cuda.cu", "cuda_general.cu", "cuda_live.cu", "cuda_survey.cu")
# Kernels of no rule.
SURVEYS = ("survey_kernel<float32>", "survey_kernel<bfloat16>", "survey_kernel<float16>", "survey_any_kernel")
OTHERS = (*SURVEYS, "live_kernel", "finish_kernel")
# Loads that a thread of a survey has on their way before its first sum: 8 of 4 bytes, by 6 blocks of 256 threads, are
# 48 KiB per SM (of 16-bit elements half of it), where an H200 needs 29.
SURVEY_LOADS, SURVEY_BLOCKS = 8, 6
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Largest shared memory of a block in KiB, CUDA C++ Programming Guide, technical specifications per compute capability.
SHARED_KIB = {
    "sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_103": 227, "sm_120": 99,
    "sm_121": 99,
}  # fmt: skip
BLOCK = 256  # threads
REGISTERS_PER_SM = 65536
WIDE = r"\b%s\.E\S*\.128"

# States of each rule, as its C++ type is written.
STATES = {
    "Sgd<false>": 0, "Sgd<true>": 1, "Adagrad": 1, "Rmsprop<false, false>": 1, "Rmsprop<false, true>": 2,
    "Rmsprop<true, false>": 2, "Rmsprop<true, true>": 3, "Adam<false>": 2, "Adam<true>": 3, "Lion": 1, "Sign": 0,
    "Perturb<false, false>": 0, "Perturb<false, true>": 1, "Perturb<true, false>": 0, "Perturb<true, true>": 1,
    "Restore": 0,
}  # fmt: skip
WRITES_ONLY = ("Perturb<false, true>", "Perturb<true, true>")  # their state, the backup, is not read

Name = tuple[tuple[str, str, str], str]  # types of parameter, gradient and state; the rule


@dataclass
class Kernel:
    registers: int
    stack: int
    spills: int  # bytes
    shared: int
    code: list[tuple[int, str]] = field(default_factory=list)  # (address, instruction), once it was disassembled

    def accesses(self, instruction: str) -> list[int]:
        """Addresses of the accesses ("LDG" or "STG") of 16 bytes per thread."""
        return [at for at, text in self.code if re.search(WIDE % instruction, text)]


@dataclass
class Build:
    object_files: list[Path]
    cpu_seconds: float
    kernels: dict[str, dict[Name, Kernel]]  # by architecture, "90"


def find_nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def find_cuobjdump() -> str | None:
    """From the CUDA toolkit or from the triton wheel; triton itself is not imported."""
    triton = importlib.util.find_spec("triton")
    packages = triton.submodule_search_locations if triton else []
    folders = [os.environ.get("PATH", ""), *(f"{package}/backends/nvidia/bin" for package in packages)]
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def missing() -> str:
    """Why the CUDA source cannot be examined here; "" when it can."""
    if not (CSRC / "engine" / "cuda.cu").exists():
        return "the CUDA source is in the source tree, not in the installed package"
    if find_nvcc() is None:
        return "no nvcc: set CUDACXX or put it on PATH"
    return "" if find_cuobjdump() else "no cuobjdump: install the CUDA toolkit's or the triton wheel"


def cmake_list(name: str) -> list[str]:
    """A list of flags as CMakeLists.txt sets it."""
    found = re.search(rf"^set\({name} ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
    if not found:
        raise LookupError(f"CMakeLists.txt does not set {name}")
    return found[1].split()


def run(*command) -> subprocess.CompletedProcess:
    """Raises RuntimeError with what the command said when it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def nvcc(*options) -> str:
    """Compiles as the library is compiled; returns what the compiler says."""
    includes = [f"-I{CSRC}", f"-I{CSRC}/include"]
    done = run(find_nvcc(), "-std=c++17", "-O3", *cmake_list("cuda_numerics"), *includes, *options)
    return done.stdout + done.stderr


def compile_engine(folder: Path, architectures: Sequence[str]) -> Build:
    """All sources for all `architectures`, as the library is built, with PTX of the last."""
    targets = [folder / f"{Path(name).stem}.o" for name in SOURCES]
    *real, last = architectures
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in real]
    codes.append(f"-gencode=arch=compute_{last},code=[sm_{last},compute_{last}]")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    options = ["-Xptxas=-v", "-Xcompiler=-fPIC", "-Xfatbin=-compress-all"]
    log = "".join(nvcc(*options, *codes, "-c", CSRC / "engine" / n, "-o", to) for n, to in zip(SOURCES, targets))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Build(targets, seconds, read_resources(log))


def expected_kernels() -> set[Name]:
    """Every rule in every combination of types, and in general; without states, theirs makes no difference."""

    def exists(types: tuple[str, str, str], rule: str) -> bool:
        param, grad, state = types
        if param != grad:
            return rule == "Restore"
        return grad == state or (STATES[rule] > 0 and rule not in WRITES_ONLY)

    general = {(GENERAL, rule) for rule in STATES} | {(GENERAL, name) for name in OTHERS}
    return general | {(types, rule) for rule in STATES for types in TYPES.values() if exists(types, rule)}


def kernel_name(mangled: str) -> Name:
    other = re.search(r"(survey_any_kernel|survey_kernel|live_kernel|finish_kernel)(?:I(\S*?)EEv)?", mangled)
    if other:
        types = {"f": "float32", "NS_8bfloat16": "bfloat16", "NS_7float16": "float16"}
        kind = next((f"<{name}>" for key, name in types.items() if (other[2] or "").startswith(key)), "")
        return GENERAL, other[1] + kind
    rules = "|".join(sorted({rule.split("<")[0] for rule in STATES}))
    found = re.search(rf"(?:step|general)_kernelI(?:I?)(.*?)NS_\d+({rules})(?:I((?:Lb[01]E)+)E)?E", mangled)
    options = ", ".join({"0": "false", "1": "true"}[digit] for digit in re.findall(r"Lb([01])E", found[3] or ""))
    types = GENERAL if "general_kernel" in mangled else TYPES[found[1]]
    return types, found[2] + (f"<{options}>" if options else "")


def read_resources(log: str) -> dict[str, dict[Name, Kernel]]:
    """From the output of `ptxas -v`."""
    kernels: dict[str, dict[Name, Kernel]] = {}
    pattern = (
        r"Compiling entry function '(\S*_kernel\S*)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    for name, architecture, stack, stores, loads, registers, rest in re.findall(pattern, log, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernel = Kernel(int(registers), int(stack), int(stores) + int(loads), int(shared[1]) if shared else 0)
        kernels.setdefault(architecture, {})[kernel_name(name)] = kernel
    return kernels


def disassemble(build: Build) -> None:
    """Fills in the kernels' code."""
    for architecture, kernels in build.kernels.items():
        objects = [run(find_cuobjdump(), "-sass", "-arch", f"sm_{architecture}", o).stdout for o in build.object_files]
        text = "".join(objects)
        for function in text.split("Function : ")[1:]:
            code = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(\S.*?)\s*;", function)
            kernels[kernel_name(function.split()[0])].code = [(int(at, 16), instruction) for at, instruction in code]


def loop_around(code: list[tuple[int, str]], first: int, last: int) -> bool:
    """Whether a backward branch encloses addresses first..last."""
    jumps = [(address, re.search(r"\bBRA\b.*0x([0-9a-f]+)", instruction)) for address, instruction in code]
    return any(jump and int(jump[1], 16) <= first and address >= last for address, jump in jumps)


def resource_faults(name: Name, kernel: Kernel) -> list[str]:
    """Spills, or more registers than the occupancy that the bandwidth needs allows."""
    # Blocks per SM: 4 x 256 threads have 64 KiB of loads in flight (4 roles of 16 bytes each), where an H200 needs
    # 4.8 TB/s x 0.8 us / 132 SMs = 29 KiB; with 3 states 3 x 256 threads and 5 roles make 60 KiB.
    blocks = SURVEY_BLOCKS if name[1].startswith("survey_kernel") else 3 if STATES.get(name[1]) == 3 else 4
    limit = REGISTERS_PER_SM // (blocks * BLOCK) // 8 * 8
    faults = []
    if kernel.registers > limit:
        faults.append(f"{kernel.registers} registers; {blocks} blocks per SM have {limit}")
    if kernel.stack or kernel.spills:
        faults.append(f"{kernel.stack} bytes of stack, {kernel.spills} bytes spilled")
    return faults


def survey_faults(name: Name, kernel: Kernel) -> list[str]:
    """Each of the three sums must have enough loads on their way before it waits for the first."""
    load = r"\bLDG\.E(?!\S*\.(?:64|128))" + ("" if "float32" in name[1] else r"\.U16")
    runs, length = [], 0
    for _, text in kernel.code:
        if re.search(load, text):
            length += 1
        elif re.search(r"\b(DADD|DFMA|DMUL|BRA|EXIT)\b", text):
            runs.append(length)
            length = 0
    found = sum(run >= SURVEY_LOADS for run in runs)
    return [] if found >= 3 else [f"{found} loops with {SURVEY_LOADS} loads before a sum, expected 3; found {runs}"]


def access_faults(name: Name, kernel: Kernel) -> list[str]:
    """The main loop must move 16 bytes at a time, and have all loads on their way before the first store."""
    if name[1].startswith("survey_kernel"):
        return survey_faults(name, kernel)
    if name[0] == GENERAL:
        return []  # consecutive threads, consecutive elements
    (param, grad, state), rule = name
    # A thread steps as many elements as 16 bytes of parameters hold: one access of them, two of a float32 state
    # beside them.
    states = STATES[rule] * BYTES[state] // BYTES[param]
    read = 0 if rule in WRITES_ONLY else states
    wanted = (1 + BYTES[grad] // BYTES[param] + read, 1 + states)
    loads, stores = kernel.accesses("LDG"), kernel.accesses("STG")
    if (len(loads), len(stores)) != wanted:
        return [f"{len(loads)} loads and {len(stores)} stores of 16 bytes, expected {wanted[0]} and {wanted[1]}"]
    faults = []
    if not loop_around(kernel.code, min(loads), max(stores)):
        faults.append("no loop around the accesses of 16 bytes")
    if max(loads) > min(stores):
        faults.append("a load waits for a store")
    return faults
