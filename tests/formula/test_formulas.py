"""The C++ formula headers: number formats exhaustively, AdamW against float64, the work plan's partition."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
FLAGS = ["-std=gnu++17", "-fopenmp", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wall", "-Wextra", "-Werror"]
FORMATS = {"bfloat16": (1, torch.bfloat16), "float16": (2, torch.float16)}


def compiled(out, *flags):
    stages = ("stages.cpp", "storage_stages.cpp", "survey_stages.cpp")
    sources = [Path(__file__).parent / "formulas.cpp", *(CSRC / "engine" / name for name in stages)]
    command = ["g++", *FLAGS, *flags, "-shared", "-fPIC", f"-I{CSRC}", f"-I{CSRC}/include", *sources, "-o", out]
    subprocess.run([str(c) for c in command], check=True)
    return ctypes.CDLL(str(out))


@pytest.fixture(scope="module")
def cpp(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("formula") / "formulas.so")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Without F16C and AVX2, as on other processors."""
    without = "-DSTEEPEST_HAS_F16C=0", "-DSTEEPEST_HAS_AVX2=0"
    return compiled(tmp_path_factory.mktemp("elsewhere") / "formulas.so", *without, "-O1")


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


@pytest.mark.parametrize("where", ["cpp", "elsewhere"])
@pytest.mark.parametrize("index", [0, 5, 2**32 - 259, 2**32 - 1, 2**32, 7 * 2**32 - 8, 2**40 - 400])
@pytest.mark.parametrize("n", [1, 7, 8, 23, 512])
def test_random_words_in_lanes_are_those_of_single_elements(request, where, index, n):
    """Also where the lower 32 bits of the element's number wrap; nothing is written beside them."""
    words = np.full((2, 2, n + 16), 77, np.uint32)
    for stage in (0, 1):
        numbers = ctypes.c_uint64(2**63 + 5), ctypes.c_int64(2**24 + 3), ctypes.c_uint64(index), ctypes.c_int64(n)
        request.getfixturevalue(where).random_words(
            ctypes.c_int(stage), *numbers, pointer(words[stage, 0, 8:]), pointer(words[stage, 1, 8:])
        )
    assert (words[0] == words[1]).all()
    assert (words[..., :8] == 77).all() and (words[..., 8 + n :] == 77).all() and (words[..., 8 : 8 + n] != 77).all()


GUARD = 16
LENGTHS = [1, 7, 127, 128, 129, 300, 511, 512]  # around blocks of 128, up to a whole tile


def guarded(n, dtype):
    """(whole array of 7s, its middle of n elements)."""
    whole = np.full(n + 2 * GUARD, 7, dtype)
    return whole, whole[GUARD : GUARD + n]


def assorted(n, seed):
    """Numbers of many magnitudes and all signs, zeros, NaN and inf among them but not in every block."""
    random = np.random.default_rng(seed)
    x = (random.standard_normal(n) * 2.0 ** random.integers(-40, 40, n)).astype(np.float32)
    x[random.integers(0, n, n // 9)] = 0
    if n > 256:
        x[3], x[200] = np.nan, np.inf
    return x


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("kind", [0, 8, 16, -1, 1])
@pytest.mark.parametrize("shift", [0, 16])
def test_what_stages_keep_is_what_formulas_keep(cpp, n, kind, shift):
    """And back; bit for bit, and with nothing written beside it."""
    x = np.abs(assorted(n, n)) if kind == 1 else assorted(n, n)
    random = np.random.default_rng(1).integers(0, 1 << 32, n, dtype=np.uint32)
    wide = kind in (0, 8, 16)
    rest_dtype = {8: np.int8, 16: np.int16}.get(kind, np.uint8)
    found = []
    for stage in (0, 1):
        kept, middle = guarded(n, np.uint16 if wide else np.uint8)
        rest, rest_middle = guarded(n if kind in (8, 16) else -(-n // 128), rest_dtype)
        back, back_middle = guarded(n, np.float32)
        numbers = ctypes.c_int(kind), ctypes.c_int(stage)
        cpp.keep(
            *numbers, pointer(x), ctypes.c_int64(n), pointer(middle), pointer(rest_middle), pointer(random),
            ctypes.c_int(shift),
        )  # fmt: skip
        if kind != 0:
            cpp.recall(*numbers, pointer(middle), pointer(rest_middle), ctypes.c_int64(n), pointer(back_middle))
        for whole in (kept, rest, back):
            assert (whole[:GUARD] == 7).all() and (whole[-GUARD:] == 7).all()
        found.append((kept, rest, back))
    for a, b in zip(*found):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("weight", [0.1, 0.75])
def test_stages_add_the_noise_and_average_as_formulas_do(cpp, n, weight):
    found = []
    for stage in (0, 1):
        (x, x_middle), (y, y_middle) = guarded(n, np.float32), guarded(n, np.float32)
        x_middle[:], y_middle[:] = np.linspace(-1, 1, n), np.linspace(2, -2, n)
        cpp.wander(
            ctypes.c_int(stage), pointer(x_middle), pointer(y_middle), ctypes.c_int64(n), ctypes.c_uint64(3),
            ctypes.c_uint64(2**32 - 5), ctypes.c_float(0.5), ctypes.c_float(weight),
        )  # fmt: skip
        for whole in (x, y):
            assert (whole[:GUARD] == 7).all() and (whole[-GUARD:] == 7).all()
        found.append((x, y))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*found))
    assert n == 1 or 0.2 < (found[0][0][GUARD:-GUARD] - np.linspace(-1, 1, n)).std() < 0.8


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


def test_float16_without_f16c(elsewhere):
    bits = np.arange(65536, dtype=np.uint16)
    out, back = np.full(65536 + 8, 123.0, dtype=np.float32), np.full(65536 + 8, 77, dtype=np.uint16)
    for n in (0, 1, 7, 8, 9, 65536):
        elsewhere.stage_load(ctypes.c_int32(2), pointer(bits), pointer(out), ctypes.c_int64(n))
        elsewhere.stage_store(ctypes.c_int32(2), pointer(out), pointer(back), ctypes.c_int64(n))
        assert same_floats(out[:n], torch.from_numpy(bits.view(np.int16)).view(torch.float16).float().numpy()[:n])
        number = ~np.isnan(out[:n])
        assert np.array_equal(back[:n][number], bits[:n][number])
        assert (out[n:] == 123.0).all() and (back[n:] == 77).all(), "written beyond the end"


def shares(numel, parts):
    """The work plan once more: tensors end to end, each behind a cost of 64; cuts inside fall on multiples of 128."""
    starts, at = [], 0
    for n in numel:
        starts.append(at)
        at += n + 64 if n else 0
    cuts = [at * k // parts for k in range(parts + 1)]
    found = []
    for first, last in zip(cuts, cuts[1:]):
        share = []
        for i, n in enumerate(numel):

            def place(cut, i=i, n=n):
                if cut >= starts[i] + n + 64:
                    return n
                return min(max(cut - starts[i] - 64, 0), n) // 128 * 128

            if n and place(first) < place(last):
                share.append((i, place(first), place(last)))
        found.append(share)
    return found


@pytest.mark.parametrize("parts", [1, 2, 3, 8, 16, 61])
def test_shares_are_those_of_the_plan(cpp, parts):
    rng = np.random.default_rng(parts)
    lists = [
        [],
        [0],
        [0, 0, 5],
        [1] * 40,
        [100_000],
        [64, 0, 128, 256, 1, 10_000, 0, 3],
        [128] * 9,
        [1000, *[16] * 300],
    ]
    lists += [rng.integers(0, 700, rng.integers(1, 40)).tolist() for _ in range(40)]
    for numel in lists:
        sizes, out = np.array(numel, np.int64), np.zeros(3 * (len(numel) + 1), np.int64)
        for part, expected in enumerate(shares(numel, parts)):
            count = cpp.share(
                pointer(sizes), ctypes.c_int64(sizes.size), ctypes.c_int(parts), ctypes.c_int(part), pointer(out)
            )
            assert list(map(tuple, out[: 3 * count].reshape(-1, 3).tolist())) == expected, (numel, part)


def test_threads(cpp):
    def count(allowed, cost):
        return cpp.thread_count(ctypes.c_int(allowed), ctypes.c_int64(cost))

    share = 1 << 14  # less does not pay another thread
    assert [count(4, cost) for cost in (0, 1, share, 2 * share - 1, 2 * share, 3 * share, 99 * share)] == [
        1, 1, 1, 1, 2, 3, 4,
    ]  # fmt: skip
    assert count(1, 99 * share) == 1 and count(0, 0) == 1
    usual = count(0, 10_000 * share)
    assert usual == int(os.environ.get("OMP_NUM_THREADS", usual)) >= 1


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_work_is_called_once_by_every_thread(cpp, threads):
    """In a process of its own: threads that are kept would be in the way of later forks."""
    code = (
        f"import ctypes; largest = ctypes.c_int(); cpp = ctypes.CDLL({cpp._name!r}); "
        f"print(cpp.run_on_threads({threads}, ctypes.byref(largest)), largest.value)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [str(threads), str(threads - 1)], done.stderr


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


# Rule and flags as in steepest.h, with the number of states.
SGD, ADAGRAD, RMSPROP, ADAM, LION, SIGN = range(6)
DECOUPLED, AMSGRAD, NESTEROV, CENTERED, MOMENTUM = 2, 8, 16, 32, 64
RULES = {
    "sgd": (SGD, 0, 0),
    "sgd momentum": (SGD, MOMENTUM, 1),
    "sgd nesterov": (SGD, MOMENTUM | NESTEROV, 1),
    "adagrad": (ADAGRAD, 0, 1),
    "rmsprop": (RMSPROP, 0, 1),
    "rmsprop momentum": (RMSPROP, MOMENTUM, 2),
    "rmsprop centered": (RMSPROP, CENTERED, 2),
    "rmsprop centered momentum": (RMSPROP, CENTERED | MOMENTUM, 3),
    "adam": (ADAM, 0, 2),
    "adamw": (ADAM, DECOUPLED, 2),
    "adamw amsgrad": (ADAM, DECOUPLED | AMSGRAD, 3),
    "lion": (LION, DECOUPLED, 1),
    "sign": (SIGN, DECOUPLED, 0),
}
RESTORE = 7
RULES_AND_RESTORE = RULES | {"restore": (RESTORE, 0, 0)}
FIELDS = ("lr", "weight_decay", "l1", "beta1", "beta2", "eps", "momentum", "dampening", "alpha", "lr_decay")
HYPER = dict(
    lr=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.999, eps=1e-8, momentum=0.9, dampening=0.2, alpha=0.99, lr_decay=0.01
)


def as_stored(x, dtype):
    return x if dtype == 0 else torch.from_numpy(x).to(dict(FORMATS.values())[dtype]).view(torch.int16).numpy()


def state(n, states=2, seed=0):
    """Parameter, gradient, and states in the sizes of a mean, a mean square, and its maximum."""
    rng = np.random.default_rng(seed)
    p, g, m = (rng.standard_normal(n).astype(np.float32) for _ in range(3))
    return [p, g, m, np.abs(rng.standard_normal(n)).astype(np.float32), np.full(n, 0.5, np.float32)][: 2 + states]


def positive_first(arrays, rule):
    """Adagrad's and RMSprop's first state is a sum of squares, above the square of RMSprop's mean."""
    if rule in (ADAGRAD, RMSPROP) and len(arrays) > 2:
        arrays[2] = arrays[2] ** 2 + (arrays[3] ** 2 if len(arrays) > 3 else 0)
    return arrays


def rule_step(cpp, rule, flags, arrays, step, stage, dtype=0, factor=1.0, **changes):
    numbers = np.array([(HYPER | changes).get(name, 0.0) for name in FIELDS])
    pointers = [pointer(array) for array in arrays] + [None] * (5 - len(arrays))
    cpp.rule_step(
        ctypes.c_int32(rule), ctypes.c_uint32(flags), ctypes.c_int32(stage), ctypes.c_int32(dtype),
        ctypes.c_float(factor), *pointers, ctypes.c_int64(arrays[0].size), pointer(numbers), ctypes.c_int64(step),
    )  # fmt: skip


@pytest.mark.parametrize("n", [*range(0, 68, 3), 1023, 4096])
@pytest.mark.parametrize("name", RULES)
def test_vector_body_and_tail_round_like_the_scalar_formula(cpp, n, name):
    rule, flags, states = RULES[name]
    one, two = (positive_first(state(n, states), rule) for _ in range(2))
    before = [array.copy() for array in one]
    rule_step(cpp, rule, flags, one, 3, stage=True)
    rule_step(cpp, rule, flags, two, 3, stage=False)
    assert all(np.array_equal(a.view(np.uint32), b.view(np.uint32)) for a, b in zip(one, two))
    assert np.array_equal(one[1], before[1]) and not (n and np.array_equal(one[0], before[0]))


@pytest.mark.parametrize("factor", [1.0, -1.0, 0.3, -0.3, 1e-30])
@pytest.mark.parametrize("dtype", [0, 1, 2])
@pytest.mark.parametrize("name", RULES_AND_RESTORE)
def test_stages_multiply_and_narrow_like_the_scalar_formula(cpp, name, dtype, factor):
    """In every type, gradients clipped or ascended; a float32 that is restored as it was keeps its bits."""
    rule, flags, states = RULES_AND_RESTORE[name]
    for n in (1, 7, 8, 33, 1027):
        one, two = ([as_stored(x, dtype) for x in positive_first(state(n, states), rule)] for _ in range(2))
        bits = one[0].view(np.uint32 if dtype == 0 else np.uint16).dtype
        if rule == RESTORE and dtype == 0 and factor == 1.0:
            one[1].view(bits)[n // 2] = two[1].view(bits)[n // 2] = 0x7F800001  # a signalling NaN
        rule_step(cpp, rule, flags, one, 3, True, dtype, factor)
        rule_step(cpp, rule, flags, two, 3, False, dtype, factor)
        assert all(np.array_equal(a.view(bits), b.view(bits)) for a, b in zip(one, two)), n
        if rule == RESTORE and factor == 1.0:
            assert np.array_equal(one[0].view(bits), one[1].view(bits))


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.4, 0.5), (0.99, 0.9999)])
@pytest.mark.parametrize("step", [1, 2, 1000, 2**24 + 1])
def test_one_adamw_step_against_float64(cpp, betas, step):
    lr, (b1, b2), eps, wd = 1e-2, betas, 1e-8, 0.1
    p, g, m, v = state(4096, seed=1)
    P, G, M, V = (x.astype(np.float64) for x in (p, g, m, v))
    rule_step(cpp, ADAM, DECOUPLED, [p, g, m, v], step, stage=False, beta1=b1, beta2=b2)
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


def test_shrinking_after_the_rule(cpp):
    inf, nan = np.inf, np.nan
    before = np.array([1, 1, -1, -1, 0, 0, 1, 1e-30, -1e-30, nan], np.float32)
    p = np.array([0.9, 1.1, -0.9, -1.1, 0.1, -0.1, 1, 1e-20, -1e-20, 1], np.float32)
    out = p.copy()
    cpp.shrink(pointer(out), pointer(before), ctypes.c_int64(out.size), pointer(np.array([1, 0, 0.5, 0], np.float32)))
    towards_zero = np.array([1, 0, 1, 0, 1, 1, 1, 0, 0, 0], bool)
    assert np.array_equal(out, np.where(towards_zero, p - np.float32(0.5) * before, p))
    x = np.array([0.3, -0.3, 0.2, -0.2, 0.1, 0.0, inf, -inf, nan], np.float32)
    out = x.copy()
    cpp.shrink(pointer(out), pointer(x), ctypes.c_int64(out.size), pointer(np.array([1, 0, 0, 0.2], np.float32)))
    t = np.float32(0.2)
    expected = np.array([np.float32(0.3) - t, t - np.float32(0.3), 0, 0, 0, 0, inf, -inf, nan], np.float32)
    assert np.array_equal(out, expected, equal_nan=True)


def test_preparing_gradients(cpp):
    g = np.array([1, -2, 8, -8, 0, np.inf, -np.inf, np.nan], np.float32)
    out = np.zeros_like(g)
    cpp.prepare(pointer(g), pointer(out), ctypes.c_int64(g.size), pointer(np.array([-2, 0.5, 1.5], np.float32)))
    assert np.array_equal(out, np.array([-0.25, 0.5, -1.5, 1.5, 0, -1.5, 1.5, np.nan], np.float32), equal_nan=True)


@pytest.mark.parametrize("count", [1, 7, 8])
@pytest.mark.parametrize("n", [16, 48, 100, 4096, 8192])
def test_blocks_surveyed_together_come_out_as_one_by_one(cpp, n, count):
    blocks = np.random.default_rng(n).standard_normal(n * count) * 10.0 ** np.linspace(-8, 8, n * count)
    blocks = blocks.astype(np.float32)
    blocks[n // 3] = np.nan
    if count > 2:
        blocks[n + 5], blocks[3 * n - 1] = -np.inf, -1e30
    found = []
    for together in (0, 1):
        sums, largest = np.full(9, 7.0), np.full(9, 7, np.uint32)
        cpp.survey_of_blocks(
            ctypes.c_int(together), pointer(blocks), ctypes.c_int64(n), ctypes.c_int(count), pointer(sums),
            pointer(largest),
        )  # fmt: skip
        assert (sums[count:] == 7).all() and (largest[count:] == 7).all()
        found.append((sums, largest))
    assert np.array_equal(found[0][0], found[1][0], equal_nan=True) and np.array_equal(found[0][1], found[1][1])
    magnitudes = np.abs(blocks).view(np.uint32).reshape(count, n)
    assert np.array_equal(found[1][1][:count], magnitudes.max(1))
    with np.errstate(invalid="ignore", over="ignore"):
        exact = (blocks.astype(np.float64) ** 2).reshape(count, n).sum(1)
    # Positive terms, each rounded in its square, in n / 16 sums of a lane and in 16 of the lanes; numpy's errs by less.
    np.testing.assert_allclose(found[1][0][:count], exact, rtol=2 * (n / 16 + 17) * 2.0**-53)


def test_whole_powers(cpp):
    x = np.array([0.0, 0.5, 0.9, 0.999, 0.99999, 1.0], dtype=np.float64).repeat(9)
    n = np.tile(np.array([0, 1, 2, 3, 10, 1000, 12345, 1 << 20, (1 << 24) + 1], dtype=np.int64), 6)
    out = np.full(x.size, 7.0)
    call(cpp.whole_powers, x, n, out, x.size)
    exact = x.astype(np.longdouble) ** n.astype(np.longdouble)
    assert (np.abs(out - exact) <= n * 2.0**-53 * exact + np.finfo(np.float64).tiny).all()
    assert (out[n <= 1] == np.where(n == 0, 1.0, x)[n <= 1]).all()


@pytest.mark.parametrize("backwards", [0, 1])
@pytest.mark.parametrize("seed", range(20))
def test_shares_visit_every_element_once_and_evenly(cpp, seed, backwards):
    rng = np.random.default_rng(seed)
    sizes = rng.choice([0, 1, 3, 16, 63, 64, 65, 1000, 20000], rng.integers(1, 200)).astype(np.int64)
    parts = int(rng.integers(1, 17))
    hits = np.zeros(max(1, int(sizes.sum())), dtype=np.int32)
    largest = np.zeros(1, dtype=np.int64)
    list_of_sizes = pointer(sizes), ctypes.c_int64(sizes.size)
    cpp.visits(*list_of_sizes, ctypes.c_int(parts), ctypes.c_int(backwards), pointer(hits), pointer(largest))
    assert (hits[: int(sizes.sum())] == 1).all()
    # A share holds at most its part of the cost, and one rounding of a cut at either end.
    assert largest[0] <= (sizes.sum() + 64 * sizes.size) / parts + 128


@pytest.mark.parametrize("parts", [1, 2, 7, 64])
def test_index_arithmetic_beyond_2_to_the_31(cpp, parts):
    numel = (1 << 40) + 12345
    seen, last = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    cpp.huge(ctypes.c_int64(numel), ctypes.c_int(parts), pointer(seen), pointer(last))
    assert seen[0] == last[0] == numel
