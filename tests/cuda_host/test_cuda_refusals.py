"""Live values that the CUDA engine cannot read, on the host: refused by name before anything is stepped."""

from __future__ import annotations

from cuda_build import needs_compiler, result, run

pytestmark = needs_compiler


def test_live_values_that_cannot_be_read_are_refused(builder):
    assert result(run(builder.program(), "refusals"))["checked"] == 15
