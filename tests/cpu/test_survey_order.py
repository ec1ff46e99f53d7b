"""Inner products are summed in the order that csrc/formula/survey.h states, whatever the number of threads."""

from __future__ import annotations

import pytest
import torch

from steepest import sam_ops

BLOCK, LANES, SUMS = 8192, 16, 256


def in_order(terms: list[float]) -> float:
    """Sixteen running sums for each block; the blocks' sums in 256 running sums that end in a tree."""
    parts = []
    for begin in range(0, len(terms), BLOCK):
        sums = [0.0] * LANES
        for i, x in enumerate(terms[begin : begin + BLOCK]):
            sums[i % LANES] += x
        part = 0.0
        for x in sums:
            part += x
        parts.append(part)
    sums = [0.0] * SUMS
    for i, part in enumerate(parts):
        sums[i % SUMS] += part
    half = SUMS // 2
    while half > 0:
        sums = [sums[i] + sums[i + half] for i in range(half)]
        half //= 2
    return sums[0]


@pytest.mark.parametrize("numel", [100, BLOCK, 3 * BLOCK + 50, 300 * BLOCK])
def test_inner_product(numel):
    """Of numbers that cancel, so that nothing is left but what the order of additions makes of them."""
    generator = torch.Generator().manual_seed(2)
    powers = torch.randint(-40, 40, (numel // 2,), generator=generator)
    sizes = torch.rand(numel // 2, generator=generator) * 2.0**powers
    x = torch.cat((sizes, -sizes))[torch.randperm(numel, generator=generator)]
    expected = in_order(x.tolist())
    assert expected != 0 and sam_ops.inner([x], [torch.ones(numel)]).item() == expected
