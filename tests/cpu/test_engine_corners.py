"""Corners of the CPU engine where a mutant went unnoticed."""

from __future__ import annotations

import pytest
import torch
from test_page_ends import Edge

import steepest


@pytest.mark.parametrize("n", [128, 512, 1024])
def test_whole_blocks_have_as_many_exponents(n):
    """An exponent too many would be written where memory ends."""
    edge, blocks = Edge(), n // 128
    p, g = torch.rand(n), torch.rand(n)
    codes = [torch.randint(0, 100, (n,), dtype=torch.uint8) for _ in range(2)]
    exponents = [torch.full((blocks,), 120, dtype=torch.uint8) for _ in range(2)]
    lists = [p, g, *codes, *exponents]
    expected, found = [t.clone() for t in lists], [edge.put(t) for t in lists]
    for p, g, m, v, m_exponents, v_exponents in (expected, found):
        steepest.adamw_([p], [g], [m], [v], lr=0.1, step=1, state_exponents=[[m_exponents], [v_exponents]], seed=1)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))
