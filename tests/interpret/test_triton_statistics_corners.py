"""Corners of Shampoo's kernels where a mutant went unnoticed."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from steepest.kernels import statistics

pytestmark = pytest.mark.interpret


def test_of_a_zero_statistic_dimension_and_rank_are_zero():
    zero, one = torch.zeros(2), torch.ones(2)
    summary = statistics.Summary(zero, zero, zero)
    assert torch.equal(summary.effective_dimension, zero) and torch.equal(summary.stable_rank, zero)
    summary = statistics.Summary(3 * one, 4.5 * one, 1.5 * one)
    assert torch.equal(summary.effective_dimension, 2 * one) and torch.equal(summary.stable_rank, 2 * one)


def test_tiles_in_vectors_only_where_everything_is_a_multiple_of_them():
    def unit(x, sizes=(8, 16), others=()):
        return statistics.tile_options(x, sizes, "ieee", others, statistics.BF16X3)["UNIT"]

    memory = torch.zeros(9)
    assert memory.data_ptr() % 16 == 0
    aligned, shifted = memory[:8], memory[1:]
    assert unit(aligned) == 4 and unit(aligned, others=(aligned, aligned)) == 4
    assert unit(shifted) == 1 and unit(aligned, others=(aligned, shifted)) == 1
    assert unit(aligned, sizes=(8, 6)) == 1 and unit(aligned, sizes=(7, 8)) == 1
    assert unit(aligned.bfloat16(), sizes=(8, 16)) == 8 and unit(aligned.bfloat16(), sizes=(8, 12)) == 1


def test_blocks_without_elements_have_statistics_of_zero():
    g, left, right = torch.zeros(3, 0, 4), torch.zeros(3, 0, 0), torch.zeros(3, 4, 4)
    for side in statistics.update_statistics(g, left, right, torch.ones(3), torch.ones(3)):
        assert all(torch.equal(x, torch.zeros(3)) for x in side)
