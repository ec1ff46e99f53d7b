"""The CUDA engine on the host, where random lists do not come: many lists and blocks, and tiles of several chunks."""

from __future__ import annotations

from cuda_build import ADDRESS, CUT_PAIRS, SMALL, TWO_CHUNKS, need, needs_compiler, result, run

pytestmark = needs_compiler


def test_measures_by_several_blocks_of_the_shipped_size(builder):
    seen = result(run(builder.program(), "measures", 3, 3, 30000))
    assert seen["most_blocks"] > 500, seen  # of elements: 16 to a block of threads


def test_a_measure_of_as_many_lists_as_there_may_be(builder):
    result(run(builder.program(SMALL), "many-lists", 1, 1, 100))


def test_sanitizers_are_silent_in_tiles_of_two_chunks(builder):
    need(ADDRESS)
    program = builder.program(TWO_CHUNKS, ADDRESS)
    result(run(program, "lists", 4, 30, 5000, sanitizer=ADDRESS))
    result(run(program, "many-lists", 1, 1, 100, sanitizer=ADDRESS))


def test_grids_end_where_blocks_of_threads_survey_two_blocks_of_elements(builder):
    seen = result(run(builder.plan("survey", CUT_PAIRS), 1, 300))
    assert seen["lists"] == 300 and min(seen["cut"], seen["weighed"]) >= 1000, seen
