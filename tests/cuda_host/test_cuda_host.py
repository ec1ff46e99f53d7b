"""The CUDA engine's own source, compiled with g++ and run on the host (see shim/cuda_shim.h), against the CPU engine.

Both engines round every operation once to float32 and in the same order, so their results must be equal bit for bit:
no tolerance appears here. NaN equals NaN whatever its payload, since compilers choose which operand's survives.
"""

from __future__ import annotations

import pytest
from cuda_build import ADDRESS, CUT, SMALL, THREAD, need, needs_compiler, result, run

pytestmark = needs_compiler


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
