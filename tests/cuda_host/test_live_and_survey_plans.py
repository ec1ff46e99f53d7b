"""How counted tensors (csrc/engine/cuda_live.h) and lists that are surveyed (csrc/engine/cuda_survey.h) are packed."""

from __future__ import annotations

import pytest
from cuda_build import CUT, SMALL, needs_compiler, result, run

pytestmark = needs_compiler


def test_every_counted_tensor_has_its_row_and_its_live_values(builder):
    seen = result(run(builder.plan("live"), 1, 300))
    assert seen["lists"] == 300 and min(seen[kind] for kind in ("full", "values", "records")) >= 300, seen


@pytest.mark.parametrize("defines", [(), SMALL, CUT], ids=["shipped", "small", "cut"])
def test_every_block_is_surveyed_into_its_place(builder, defines):
    seen = result(run(builder.plan("survey", defines), 1, 300))
    assert seen["lists"] == 300 and min(seen["cut"], seen["weighed"]) >= 1000, seen
    assert defines == CUT or seen["full"] >= 20, seen  # grids of five blocks end before an argument is full
