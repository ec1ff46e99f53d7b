"""How lists of tensors are packed into launches (csrc/engine/cuda_plan.h): checked launch by launch, nothing is run."""

from __future__ import annotations

import pytest
from cuda_build import CUT, SMALL, needs_compiler, result, run

pytestmark = needs_compiler


@pytest.mark.parametrize("defines", [(), SMALL, CUT], ids=["shipped", "small", "cut"])
def test_every_element_lies_in_one_launch_with_its_scalars(builder, defines):
    seen = result(run(builder.plan("step", defines), 1, 300))
    assert seen["lists"] >= 300
    assert min(seen[kind] for kind in ("cut", "shifted", "apart", "several_rows", "live")) >= 1000, seen
    # Grids of five tiles end before an argument is full.
    assert defines == CUT or (seen["full"] >= 50 and seen["far_apart"] >= 10), seen
