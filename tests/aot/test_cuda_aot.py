"""What nvcc makes of the CUDA engine, on a machine without a GPU: registers, memory accesses, rounding, size."""

from __future__ import annotations

import ctypes
import dataclasses
import re

import pytest

from steepest.conformance.aot import cuda

ARCHITECTURES = ("80", "90", "100", "120")
ARGUMENT_BYTES = 32764  # limit on kernel arguments since CUDA 12.1, sm_70 and later

pytestmark = pytest.mark.skipif(cuda.find_nvcc() is None, reason="no nvcc: set CUDACXX or put it on PATH")


@pytest.fixture(scope="session")
def build(tmp_path_factory) -> cuda.Build:
    """The engine for all architectures, as the library is built."""
    return cuda.compile_engine(tmp_path_factory.mktemp("cuda_aot"), ARCHITECTURES)


@pytest.fixture(scope="session")
def machine_code(build) -> dict:
    if cuda.find_cuobjdump() is None:
        pytest.skip("no cuobjdump: install the CUDA toolkit's or the triton wheel")
    cuda.disassemble(build)
    return build.kernels


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_and_spills(build, architecture):
    kernels = build.kernels[architecture]
    assert set(kernels) == cuda.expected_kernels()
    assert [cuda.resource_faults(name, kernel) for name, kernel in kernels.items()] == [[]] * len(kernels)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_main_loop_moves_16_bytes_at_a_time(machine_code, architecture):
    kernels = machine_code[architecture]
    assert [cuda.access_faults(name, kernel) for name, kernel in kernels.items()] == [[]] * len(kernels)


def test_faults_are_found(machine_code):
    """Negative controls on a real kernel's code."""
    name = cuda.TYPES["fff"], "Adam<false>"
    good = machine_code["90"][name]
    narrow = [(at, text.replace(".128", ".64", 1) if "LDG" in text else text) for at, text in good.code]
    straight = [(at, text) for at, text in good.code if "BRA" not in text]
    loads, stores = good.accesses("LDG"), good.accesses("STG")
    moved = [(max(stores) + 1 if at == loads[0] else at, text) for at, text in good.code]
    for code, fault in ((narrow, "0 loads"), (straight, "no loop"), (moved, "waits for a store")):
        found = cuda.access_faults(name, dataclasses.replace(good, code=code))
        assert any(fault in text for text in found), (fault, found)
    assert "72 registers; 4 blocks per SM have 64" in cuda.resource_faults(
        name, dataclasses.replace(good, registers=72)
    )
    assert cuda.resource_faults((name[0], "Adam<true>"), dataclasses.replace(good, registers=72)) == []
    assert "8 bytes spilled" in cuda.resource_faults(name, dataclasses.replace(good, spills=8))[0]
    of_survey = cuda.GENERAL, "survey_kernel<float32>"
    survey = machine_code["90"][of_survey]
    serial = [pair for at, text in survey.code for pair in ((at, text), (at, "DADD R0, R0, R1"))]
    assert "0 loops" in cuda.access_faults(of_survey, dataclasses.replace(survey, code=serial))[0]


@pytest.fixture(scope="session")
def ptx(tmp_path_factory) -> str:
    folder, text = tmp_path_factory.mktemp("cuda_ptx"), ""
    for name in cuda.SOURCES:
        target = folder / f"{name}.ptx"
        cuda.nvcc("-ptx", "-arch=compute_80", cuda.CSRC / "engine" / name, "-o", target)
        text += target.read_text()
    return text


def test_every_operation_rounds_once_to_nearest(ptx):
    """ptxas contracts `mul.f32` and `add.f32` unless they say `.rn`; divisions and roots are IEEE 754's with `.rn`.

    (In machine code they become sequences with FFMA in them, so the check has to be made here.)
    """
    arithmetic = set(re.findall(r"^\s+(?:@\S+ )?([a-z0-9_.]+\.f32)\s", ptx, re.MULTILINE))
    used = {name for name in arithmetic if re.match(r"(add|sub|mul|div|sqrt|fma|mad|rcp|rsqrt)\b", name)}
    # rcp.rn is 1 / x, of the clip coefficient.
    assert used == {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f32", "rcp.rn.f32"}
    assert ".ftz" not in ptx and ".approx" not in ptx


def test_kernel_arguments_fit(ptx):
    sizes = {int(size) for size in re.findall(r"\.param \S+ \S+ \.b8 \S*step_kernel\S*_param_0\[(\d+)\]", ptx)}
    # A slot holds a tensor with its states, 0 to 3, or a row of scalars.
    assert sizes == {48 + (ARGUMENT_BYTES - 48) // slot * slot for slot in (32, 40, 48, 56)}
    general = {int(size) for size in re.findall(r"\.param \S+ \S+ \.b8 \S*general_kernel\S*_param_0\[(\d+)\]", ptx)}
    assert 0.99 * ARGUMENT_BYTES <= min(general) <= max(sizes | general) <= ARGUMENT_BYTES


def test_compile_time_and_size(build):
    # The whole build has 2 minutes on 2 cores and 8 MB for the library; CPU time does not depend on what else runs.
    assert build.cpu_seconds < 120
    assert sum(file.stat().st_size for file in build.object_files) < 4e6


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
          steepest_hyper hyper = {};
          hyper.lr = 1e-3, hyper.step = 1;
          steepest_step_args args = {};
          args.rule = STEEPEST_ADAM;
          args.num_tensors = 1, args.numel = &numel, args.num_hyper = 1, args.hyper = &hyper;
          args.params = args.states[0] = args.states[1] = address, args.grads = address;
          steepest_exec exec = {};
          exec.device = STEEPEST_CUDA;
          AdamScalars scalars = Adam<false>::scalars(hyper, 0);
          const steepest_status status = cuda::step({&exec, &args, &scalars, nullptr});
          std::printf("%d %d %s", status, x[0] == 1, steepest_last_error());
        }
        """
    )
    executable = tmp_path / "program"
    sources = [program, cuda.CSRC / "engine" / "status.cpp", *build.object_files]
    cuda.nvcc("-cudart=static", *sources, "-o", executable)
    status, unchanged, message = cuda.run(executable).stdout.split(" ", 2)
    assert (int(status), int(unchanged)) == (4, 1)
    assert message.startswith("steepest_step: device 0 cannot be used: "), message
    assert "driver" in message or "no CUDA-capable device" in message, message
