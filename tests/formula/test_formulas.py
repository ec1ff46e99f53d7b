"""The C++ formula headers: number formats exhaustively, AdamW against float64, the work plan's partition."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
FLAGS = ["-std=gnu++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wall", "-Wextra", "-Werror"]
FORMATS = {"bfloat16": (1, torch.bfloat16), "float16": (2, torch.float16)}


@pytest.fixture(scope="module")
def cpp(tmp_path_factory):
    out = tmp_path_factory.mktemp("formula") / "formulas.so"
    sources = [Path(__file__).parent / "formulas.cpp", CSRC / "engine/stages.cpp"]
    command = ["g++", *FLAGS, "-shared", "-fPIC", f"-I{CSRC}", f"-I{CSRC}/include", *sources, "-o", out]
    subprocess.run([str(c) for c in command], check=True)
    return ctypes.CDLL(str(out))


def pointer(array):
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def call(function, *arguments):
    converted = [pointer(a) if isinstance(a, np.ndarray) or a is None else ctypes.c_int64(a) for a in arguments]
    function(*converted)


def same_floats(a, b):
    """Equal bits, NaNs of any payload being equal."""
    nan = np.isnan(a) & np.isnan(b)
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | nan).all())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("stage", [False, True])
def test_all_65536_values_widen_exactly(cpp, name, stage):
    code, dtype = FORMATS[name]
    bits = np.arange(65536, dtype=np.uint16)
    out = np.full(65536, 123.0, dtype=np.float32)
    if stage:
        cpp.stage_load(ctypes.c_int32(code), pointer(bits), pointer(out), ctypes.c_int64(65536))
    else:
        call(getattr(cpp, f"widen_{name}"), bits, out, 65536)
    expected = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    assert same_floats(out, expected)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("stage", [False, True])
def test_narrowing_rounds_to_nearest_even_like_torch(cpp, name, stage):
    code, dtype = FORMATS[name]
    # Every upper half with the lower halves around every tie of either format, and random ones.
    low = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    high = np.arange(65536, dtype=np.uint32) << 16
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    values = np.concatenate([high | np.uint32(x) for x in low] + [random]).view(np.float32)
    out = np.zeros(values.size, dtype=np.uint16)
    if stage:
        cpp.stage_store(ctypes.c_int32(code), pointer(values), pointer(out), ctypes.c_int64(values.size))
    else:
        call(getattr(cpp, f"narrow_{name}"), values, out, values.size)
    got = torch.from_numpy(out.view(np.int16)).view(dtype).float().numpy()
    expected = torch.from_numpy(values).to(dtype).float().numpy()
    assert same_floats(got, expected)
    assert np.array_equal(np.isnan(got), np.isnan(values))


def test_flush_to_zero_does_not_change_float16(cpp):
    bits = np.arange(1, 0x0400, dtype=np.uint16)  # subnormals
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        out = np.zeros(bits.size, dtype=np.float32)
        call(cpp.widen_float16, bits, out, bits.size)
        back = np.zeros(bits.size, dtype=np.uint16)
        call(cpp.narrow_float16, out, back, bits.size)
    finally:
        torch.set_flush_denormal(False)
    assert np.array_equal(out, bits.astype(np.float64) * 2.0**-24) and np.array_equal(back, bits)


HYPER = np.array([1e-2, 0.9, 0.999, 1e-8, 0.1])


def state(n, seed=0):
    rng = np.random.default_rng(seed)
    p, g, m = (rng.standard_normal(n).astype(np.float32) for _ in range(3))
    return p, g, m, np.abs(rng.standard_normal(n)).astype(np.float32)


@pytest.mark.parametrize("n", [*range(0, 68), 1023, 4096])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_vector_body_and_tail_round_like_the_scalar_formula(cpp, n, amsgrad):
    one, two = state(n), state(n)
    vmax = [np.full(n, 0.5, dtype=np.float32) if amsgrad else None for _ in range(2)]
    call(cpp.stage_adamw, *one, vmax[0], n, HYPER, 3)
    call(cpp.scalar_adamw, *two, vmax[1], n, HYPER, 3)
    assert all(np.array_equal(a.view(np.uint32), b.view(np.uint32)) for a, b in zip(one, two))
    assert not amsgrad or np.array_equal(*vmax)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.4, 0.5), (0.99, 0.9999)])
@pytest.mark.parametrize("step", [1, 2, 1000, 2**24 + 1])
def test_one_step_against_float64(cpp, betas, step):
    lr, (b1, b2), eps, wd = 1e-2, betas, 1e-8, 0.1
    p, g, m, v = state(4096, seed=1)
    P, G, M, V = (x.astype(np.float64) for x in (p, g, m, v))
    call(cpp.scalar_adamw, p, g, m, v, None, p.size, np.array([lr, b1, b2, eps, wd]), step)
    M = M + (1 - b1) * (G - M)
    V = b2 * V + (1 - b2) * G * G
    P = P * (1 - lr * wd) - lr / (1 - b1**step) * M / (np.sqrt(V) / np.sqrt(1 - b2**step) + eps)
    u = 2.0**-24
    # Relative roundings: m: scalar 1, difference 1, product 1, sum 1, each at most of size |m| + |g|.
    assert (np.abs(m - M) <= 4 * u * (np.abs(M) + 2 * np.abs(G) + np.abs(m))).all()
    # v: two scalars, three products, one sum, all terms positive.
    assert (np.abs(v - V) <= 6 * u * V).all()
    # p: decay (scalar, product), sum: 3 of size |p|; quotient: m's own error, v's halved by the root, scalars 3,
    # product, root, quotient, sum, quotient: at most 16 of the update's size |M| + |G| over the denominator.
    update = lr / (1 - b1**step) * (np.abs(M) + 2 * np.abs(G)) / (np.sqrt(V) / np.sqrt(1 - b2**step) + eps)
    assert (np.abs(p - P) <= u * (3 * np.abs(P) + 16 * update)).all()
    assert np.abs(p - P).max() > 0


@pytest.mark.parametrize("seed", range(20))
def test_shares_visit_every_element_once_and_evenly(cpp, seed):
    rng = np.random.default_rng(seed)
    sizes = rng.choice([0, 1, 3, 16, 63, 64, 65, 1000, 20000], rng.integers(1, 200)).astype(np.int64)
    parts = int(rng.integers(1, 17))
    hits = np.zeros(max(1, int(sizes.sum())), dtype=np.int32)
    largest = np.zeros(1, dtype=np.int64)
    cpp.visits(pointer(sizes), ctypes.c_int64(sizes.size), ctypes.c_int(parts), pointer(hits), pointer(largest))
    assert (hits[: int(sizes.sum())] == 1).all()
    # A share holds at most its part of the cost, and one rounding of a cut at either end.
    assert largest[0] <= (sizes.sum() + 64 * sizes.size) / parts + 128


@pytest.mark.parametrize("parts", [1, 2, 7, 64])
def test_index_arithmetic_beyond_2_to_the_31(cpp, parts):
    numel = (1 << 40) + 12345
    seen, last = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    cpp.huge(ctypes.c_int64(numel), ctypes.c_int(parts), pointer(seen), pointer(last))
    assert seen[0] == last[0] == numel
