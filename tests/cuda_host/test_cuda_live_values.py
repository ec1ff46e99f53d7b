"""Live values of the CUDA engine on the host: each is read, and those that cannot be are refused by name."""

from __future__ import annotations

from cuda_build import needs_compiler, result, run

pytestmark = needs_compiler


def test_each_live_field_is_read_as_when_the_host_knows_it(builder):
    assert result(run(builder.program(), "live-fields"))["checked"] == 4 * 10


def test_live_values_that_cannot_be_read_are_refused(builder):
    assert result(run(builder.program(), "refusals"))["checked"] == 15
