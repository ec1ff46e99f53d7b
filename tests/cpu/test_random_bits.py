"""Which of an element's 64 random bits its parameter and each of its states take: bit for bit as the reference says."""

from __future__ import annotations

import pytest
import torch

import steepest
from steepest import reference

BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("states", [(BF16, BF16, BF16), (F32, F32, F32)])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_rounding_at_random_takes_sixteen_bits_for_each(amsgrad, states):
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(1300, generator=generator).to(BF16) for _ in range(2)]
    start += [torch.rand(1300, generator=generator).to(dtype) for dtype in states[: 2 + amsgrad]]
    ours, theirs = ([x.clone() for x in start] for _ in range(2))
    for module, (p, g, m, v, *vmax) in ((steepest, ours), (reference, theirs)):
        for step in (1, 2):
            kept = {"max_exp_avg_sqs": [vmax[0]]} if amsgrad else {}
            module.adamw_([p], [g], [m], [v], lr=0.01, step=step, seed=3, stochastic_rounding=True, **kept)
    for x, y, before in zip(ours, theirs, start):
        assert torch.equal(x, y) and (x is ours[1] or not torch.equal(x, before))
