"""Calls too large for the caches write past them what they do not read; smaller calls over parts of the same memory
do not, and must leave the same bits: at odd addresses, sizes and thread counts."""

from __future__ import annotations

import pytest
import torch

import steepest

LARGE = (4 << 20) + 4097  # elements, more than csrc/engine/cpu.cpp's kStreams
SHIFTS = (0, 1, 3, 15)  # elements between a cache line's start and each list's: heads and tails of every kind


def column(shift: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(LARGE + shift, generator=generator)[shift:]


def pieces(x: torch.Tensor) -> list[torch.Tensor]:
    return list(x.split(1_000_003))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_climb_and_a_step_from_elsewhere_are_those_of_small_calls(shift, threads):
    generator = torch.Generator().manual_seed(shift)
    p, g = (column(shift, generator) for _ in range(2))
    q = p.clone()
    backups = [torch.full((LARGE + SHIFTS[-1 - k],), torch.nan)[SHIFTS[-1 - k] :] for k in range(2)]
    before = p.clone()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        steepest.perturb_([p], [g], [backups[0]], rho=0.05, p=float("inf"))
        for part in zip(pieces(q), pieces(g), pieces(backups[1])):
            steepest.perturb_(*([x] for x in part), rho=0.05, p=float("inf"))
        assert torch.equal(p, q) and not torch.equal(p, before)
        assert torch.equal(backups[0], before) and torch.equal(backups[1], before)

        states = [[torch.zeros(LARGE) for _ in range(2)] for _ in range(2)]
        # Clipped, which walks the shares backwards.
        options = dict(lr=1e-3, step=1, clip_coefficient=torch.tensor([0.3]))
        steepest.adamw_([p], [g], [states[0][0]], [states[0][1]], sources=[backups[0]], **options)
        for row in zip(pieces(q), pieces(g), pieces(states[1][0]), pieces(states[1][1]), pieces(backups[1])):
            steepest.adamw_(*([x] for x in row[:4]), sources=[row[4]], **options)
    finally:
        torch.set_num_threads(threads_before)
    assert torch.equal(p, q)
    assert all(torch.equal(a, b) for a, b in zip(*states))
    assert torch.equal(backups[0], before)
