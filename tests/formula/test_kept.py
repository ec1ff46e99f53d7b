"""Random numbers, powers, and ways of keeping numbers, bit for bit against what they are written down as elsewhere:
pyext/reference/storage.py in 64-bit integers, and float64 in numpy."""

from __future__ import annotations

import ctypes
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from steepest.reference import storage

CSRC = Path(__file__).parents[2] / "csrc"
FLAGS = ["-std=gnu++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
BLOCK = 128
# Of float32: zeros, subnormals, around 1, the largest bfloat16 and float32, inf, NaNs; both signs.
EDGES = np.array(
    [
        *(0, 1, 0x8000, 0xFFFF, 0x7FFFFF, 0x800000, 0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x3F807FFF, 0x3F808000),
        *(0x7F7EFFFF, 0x7F7F0000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF),
    ],
    np.uint32,
)
EDGES = np.concatenate([EDGES, EDGES | np.uint32(1 << 31)])


@pytest.fixture(scope="module")
def cpp(tmp_path_factory):
    out = tmp_path_factory.mktemp("kept") / "kept.so"
    source = Path(__file__).parent / "kept.cpp"
    command = ["g++", *FLAGS, "-shared", "-fPIC", f"-I{CSRC}", f"-I{CSRC}/include", source, "-o", out]
    subprocess.run([str(part) for part in command], check=True)
    return ctypes.CDLL(str(out))


def call(function, *arguments):
    """Arrays as pointers; Python ints as int32, numpy's and floats as what they are."""
    kinds = {np.uint64: ctypes.c_uint64, np.int64: ctypes.c_int64, np.uint32: ctypes.c_uint32}
    function(
        *(
            ctypes.c_void_p(a.ctypes.data)
            if isinstance(a, np.ndarray)
            else ctypes.c_double(a)
            if isinstance(a, float)
            else kinds.get(type(a), ctypes.c_int32)(int(a))
            for a in arguments
        )
    )


def floats(seed: int, n: int = 1 << 16) -> np.ndarray:
    """Any bits, and all edges."""
    return np.concatenate([EDGES, np.random.default_rng(seed).integers(0, 1 << 32, n, dtype=np.uint32)]).view(
        np.float32
    )


def words_of(seed: int, n: int) -> np.ndarray:
    some = np.random.default_rng(seed).integers(0, 1 << 32, n, dtype=np.uint32)
    some[:4] = 0, 0xFFFF, 0x10000, 0xFFFFFFFF
    return some


def tensor(array: np.ndarray) -> torch.Tensor:
    """Bits as numbers: int64."""
    return torch.from_numpy(array.astype(np.int64))


def same(got: np.ndarray, expected: np.ndarray) -> bool:
    unsigned = f"u{got.itemsize}"
    nan = np.isnan(got) & np.isnan(expected) if got.dtype.kind == "f" else False
    return got.dtype == expected.dtype and bool(((got.view(unsigned) == expected.view(unsigned)) | nan).all())


@pytest.mark.parametrize("step", [0, 1, 3, (1 << 24) - 1, 1 << 24, (7 << 24) + 5, (1 << 40) + 12345])
@pytest.mark.parametrize("purpose", [storage.ROUNDING, storage.NOISE])
def test_random_words_of_far_elements_and_late_steps(cpp, step, purpose):
    index = np.array([*range(70), *((1 << k) + d for k in (16, 31, 32, 33, 36, 39) for d in (-1, 0, 1, 2))], np.uint64)
    for seed in (0, 1, 0x123456789ABCDEF0):
        a, b = (np.zeros(index.size, np.uint32) for _ in range(2))
        call(cpp.words, np.uint64(seed), np.int64(step), purpose, index, a, b, np.int64(index.size))
        expected = storage.random_words(tensor(index), seed=seed, step=step, purpose=purpose)
        assert same(a, expected[0].numpy().astype(np.uint32)) and same(b, expected[1].numpy().astype(np.uint32))


def test_normals(cpp):
    """A million words, and all in the tails: |x| > 0.9966, the last 2^14 of 2^23."""
    ends = np.arange(0, 1 << 14, dtype=np.uint32) << 9
    near = [ends, ~ends, (np.uint32(1) << 31) + ends, (np.uint32(1) << 31) - ends, words_of(0, 1 << 20)]
    word = np.concatenate(near).astype(np.uint32)
    out = np.zeros(word.size, np.float32)
    call(cpp.normals, word, out, np.int64(word.size))
    assert same(out, storage.normal(tensor(word)).numpy())
    assert np.abs(out).max() <= 5.4 and np.abs(out[-(1 << 20) :].std() - 1) < 0.003  # 4 / sqrt(2 * 2^20)


def test_logarithms_in_single_precision(cpp):
    x = np.random.default_rng(1).integers(0x00800000, 0x3F800001, 1 << 20, dtype=np.uint32).view(np.float32)
    x[:3] = 1.0, 2.0**-126, np.float32(0.5**0.5)
    out = np.zeros_like(x)
    call(cpp.logs, x, out, np.int64(x.size))
    assert same(out, storage.log_of(torch.from_numpy(x)).numpy())
    # The series' first term left out, and a rounding of each of the eight operations.
    assert np.abs(out - np.log(x.astype(np.float64))).max() <= 88 * 2**-23


@pytest.mark.parametrize("count", [0, 1, 2, 3, 100, 255, 256, 257, 258, 1000])
def test_blocks_are_added_in_256_sums_and_a_tree(cpp, count):
    rng = np.random.default_rng(count)
    sums, largest = rng.random(count), rng.integers(0, 1 << 20, count, dtype=np.uint32)
    out, most = np.zeros(1), np.zeros(1, np.uint32)
    for bits in (largest, np.zeros_like(largest)):
        call(cpp.total, sums, bits, np.int64(count), out, most)
        running = [0.0] * min(count, 256)
        for i, x in enumerate(sums):
            running[i % 256] += x
        half = 128
        while half:
            for i in range(half):
                if i + half < len(running):
                    running[i] += running[i + half]
            half //= 2
        assert out[0] == (running[0] if count else 0.0) and most[0] == (bits.max() if count else 0)


def logarithm(x: np.ndarray) -> np.ndarray:
    """log2 as power.h describes it, in numpy's float64."""
    m, e = np.frexp(x)
    m, e = np.where(m < 0.5**0.5, 2 * m, m), np.where(m < 0.5**0.5, e - 1, e)
    s = (m - 1) / (m + 1)
    series = np.full_like(x, 1 / 21)
    for k in range(19, 0, -2):
        series = series * (s * s) + 1 / k
    return e + 2.885390081777926814 * (s * series)


def exponential(y: np.ndarray) -> np.ndarray:
    kept = np.maximum(y, -1000.0)
    z = (kept - np.rint(kept)) * 0.693147180559945309
    series = np.full_like(y, 1 / math.factorial(13))
    for k in range(12, -1, -1):
        series = series * z + 1 / math.factorial(k)
    return np.where(y > -1000, np.ldexp(series, np.rint(kept).astype(int)), 0.0)


def test_powers_of_two_and_their_logarithms(cpp):
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.random(1 << 16), 2.0 ** rng.uniform(-1020, 0, 1 << 16), [1.0, 0.5**0.5, 2.0**-1022, 0.5]])
    out = np.zeros_like(x)
    call(cpp.logs2, x, out, np.int64(x.size))
    assert same(out, logarithm(x))
    exact = np.log2(x.astype(np.longdouble))
    assert (np.abs(out - exact) <= 2.0**-50 * np.maximum(np.abs(exact), 1)).all()
    y = np.concatenate(
        [-(rng.random(1 << 16) * 3), -(rng.random(1 << 16) * 1100), [0.0, -0.5, -999.5, -1000.0, -1e300]]
    )
    out = np.zeros_like(y)
    call(cpp.powers2, y, out, np.int64(y.size))
    assert same(out, exponential(y))
    exact = np.where(y > -1000, np.exp2(y.astype(np.longdouble)), 0)
    assert (np.abs(out - exact) <= 2.0**-50 * exact).all()


@pytest.mark.parametrize("a", [1e-3, 0.25, 0.5, 1.0, 2.0, 7.5, math.inf])
def test_powers_of_numbers_up_to_1(cpp, a):
    rng = np.random.default_rng(3)
    x = np.concatenate([rng.random(1 << 14), 2.0 ** rng.uniform(-1020, 0, 1 << 14)])
    x = np.concatenate([x, [0.0, 5e-324, 2.2e-308, 2.3e-308, 2.4e-308, 1.0 - 2.0**-53, 1.0, math.nan]])
    out = np.zeros_like(x)
    call(cpp.powers, x, a, out, np.int64(x.size))
    with np.errstate(invalid="ignore"):
        usual = np.where(x < 1, exponential(a * logarithm(np.where(x > 2.3e-308, x, 1.0))), 1.0)
        assert same(out, np.where(x > 2.3e-308, usual, x * 0.0))
        if math.isfinite(a):
            exact = np.where(x > 2.3e-308, x.astype(np.longdouble) ** np.longdouble(a), 0)
            exact = np.where(a * np.log2(np.where(x > 2.3e-308, x, 1.0)) > -1000, exact, 0)
            bound = 2.0**-48 * (1 + a * np.abs(np.log2(np.where(x > 2.3e-308, x, 1.0)))) * exact
            assert (np.abs(out - exact)[:-1] <= bound[:-1]).all() and np.isnan(out[-1])


def test_stochastic_rounding(cpp):
    x = floats(4)
    random = words_of(5, x.size)
    for word in (random, np.zeros_like(random), np.full_like(random, 0xFFFF), np.full_like(random, 0x10000)):
        out = np.zeros(x.size, np.uint16)
        call(cpp.stochastic, x, word, out, np.int64(x.size))
        expected = storage.round_stochastic(torch.from_numpy(x), tensor(word)).float().numpy()
        got = torch.from_numpy(out.view(np.int16)).view(torch.bfloat16).float().numpy()
        assert same(got, expected)


@pytest.mark.parametrize("width", [8, 16])
def test_splitting_and_joining(cpp, width):
    dtype = torch.int8 if width == 8 else torch.int16
    x = floats(6)
    high, residual, back = np.zeros(x.size, np.uint16), np.zeros(x.size, np.int32), np.zeros(x.size, np.float32)
    call(cpp.split, x, width, high, residual, np.int64(x.size))
    expected = storage.split(torch.from_numpy(x), dtype)
    assert same(torch.from_numpy(high.view(np.int16)).view(torch.bfloat16).float().numpy(), expected[0].float().numpy())
    number = ~np.isnan(x)
    assert np.array_equal(residual[number], expected[1].numpy()[number])
    assert -(1 << (width - 1)) <= residual.min() and residual.max() < 1 << (width - 1)
    # All pairs that there may be, also those that splitting never makes: a parameter was set to 0, or to -0.
    high = np.concatenate([high, np.zeros(512, np.uint16), np.full(512, 0x8000, np.uint16), np.ones(512, np.uint16)])
    residual = np.concatenate([residual, np.tile(np.arange(-256, 256) % (1 << width) - (1 << (width - 1)), 3)])
    residual = np.clip(residual, -(1 << (width - 1)), (1 << (width - 1)) - 1).astype(np.int32)
    back = np.zeros(high.size, np.float32)
    call(cpp.join, high, residual, width, back, np.int64(high.size))
    expected = storage.join(
        torch.from_numpy(high.view(np.int16)).view(torch.bfloat16), torch.from_numpy(residual).to(dtype)
    )
    assert same(back, expected.numpy())
    if width == 16:
        assert same(back[: x.size], x)


@pytest.mark.parametrize("magnitude", [False, True])
def test_blocks(cpp, magnitude):
    signed = int(not magnitude)
    largest = np.abs(floats(7)).view(np.uint32)
    powers = np.arange(1, 256, dtype=np.uint32) << 23
    largest = np.concatenate([largest, powers, powers + 1, powers - 0xFFFFF, powers - 0x100000, [0, 1]]).astype(
        np.uint32
    )
    got = np.zeros(largest.size, np.uint32)
    call(cpp.block_exponent, largest, signed, got, np.int64(largest.size))
    ones = torch.from_numpy(np.repeat(largest, BLOCK).view(np.float32))
    expected = storage.block8_exponents(ones, torch.arange(ones.numel()), magnitude)
    assert np.array_equal(got, expected.numpy())

    rng, index = np.random.default_rng(8), torch.arange(256 * BLOCK)
    all_codes = np.tile(np.arange(256, dtype=np.uint8), BLOCK)
    for exponent in (17, 33, 34, 100, 127, 200, 254, 255):
        if exponent < 33 and magnitude:
            continue
        exponents = torch.full((256,), exponent, dtype=torch.uint8)
        out = np.zeros(all_codes.size, np.float32)
        call(cpp.block_decode, all_codes, np.uint32(exponent), signed, out, np.int64(all_codes.size))
        assert same(out, storage.block8_decode(torch.from_numpy(all_codes), exponents, index, magnitude).numpy())
        # Around every code, with all kinds of random numbers: 128 bits patterns between neighbours and beyond the ends.
        base = max(exponent - (31 if magnitude else 15), 0) << 23
        most = min((exponent << 23) + 0x7FFFFF, 0x7F7FFFFF)
        u = np.clip(
            (base + (rng.integers(-4, 262, index.numel()) << 20) + rng.integers(-9, 10, index.numel())), 0, most
        )
        u[::3] = np.clip(rng.integers(0, base + (2 << 20), u[::3].size), 0, most)
        u[:300] = [0, 1, base, base + (1 << 20), base + (1 << 20) - 1] * 60
        x = (u.astype(np.uint32) | (rng.integers(0, 2, u.size).astype(np.uint32) << np.uint32(31))).view(np.float32)
        word = words_of(exponent, x.size)
        word[4:1000] &= np.uint32(0x1FFFF)
        word[1000:6000], word[6000:11000] = 0xFFFF, 0  # what is half of a code's last bit away from the next
        codes = np.zeros(x.size, np.uint8)
        call(cpp.block_encode, x, np.uint32(exponent), word, signed, codes, np.int64(x.size))
        expected = storage.block8_encode(torch.from_numpy(x), exponents, index, magnitude, tensor(word))
        assert np.array_equal(codes, expected.numpy())
