"""That plain calls access memory 16 bytes at a time wherever vectors fit: counted, since results would not tell."""

from __future__ import annotations

from cuda_build import SMALL, needs_compiler, result, run

pytestmark = needs_compiler


def test_whole_vectors_are_accessed_as_such(builder):
    assert result(run(builder.program(SMALL), "vectors"))["checked"] == 15 * 2 * (4 + 4 + 8 + 8 + 8 + 8)
