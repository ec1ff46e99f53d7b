"""Surveys add in an order that does not depend on threads or vectors (csrc/formula/survey.h), here written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from steepest._native import lib, reader

LANES, BLOCK, SUMS = 16, 8192, 256
SIZES = (
    [1], [15], [16, 17], [31, 0, 5], [BLOCK], [BLOCK + 1, 3], [3 * BLOCK - 7], [20, BLOCK + 19, 33], [16] * 300,
    [5] * 9, [17] * 9,
)  # fmt: skip


def block_sum(terms: np.ndarray) -> float:
    """Sixteen running sums, added in order."""
    padded = np.zeros(-(-len(terms) // LANES) * LANES)
    padded[: len(terms)] = terms
    lanes = np.zeros(LANES)
    for row in padded.reshape(-1, LANES):
        lanes += row
    total = 0.0
    for lane in lanes:
        total += lane
    return total


def joint_sum(lists: list[np.ndarray]) -> float:
    """Blocks i, i + 256, ... to running sum i; those in a tree."""
    parts = [block_sum(terms[at : at + BLOCK]) for terms in lists for at in range(0, len(terms), BLOCK)]
    sums = [0.0] * SUMS
    for i, part in enumerate(parts):
        sums[i % SUMS] += part
    half = SUMS // 2
    while half:
        sums = [sums[i] + sums[i + half] for i in range(half)]
        half //= 2
    return sums[0]


def draw(sizes: list[int], seed: int) -> list[torch.Tensor]:
    """Values of several magnitudes, in one memory with NaN between the tensors."""
    generator = torch.Generator().manual_seed(seed)
    memory, out, at = torch.full((sum(sizes) + 32 * len(sizes) + 32,), math.nan), [], 32
    for n in sizes:
        out.append(memory[at : at + n])
        out[-1].copy_(torch.randn(n, generator=generator) * 10 ** (4 * torch.rand(n, generator=generator)))
        at += n + 32
    return out


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sums_are_added_in_the_order_that_is_promised(sizes, threads):
    x, w = draw(sizes, 1), draw(sizes, 2)
    wide, other = ([t.double().numpy() for t in tensors] for tensors in (x, w))
    largest = max(float(t.abs().max()) for t in x if t.numel())
    for q, power in ((1.0, np.abs), (2.0, np.square)):
        assert lib.survey(reader, x, q, 1.0, threads) == (joint_sum([power(t) for t in wide]), largest, False)
    # The inner product, which weights of 16 bits have as well.
    for weights in (w, [t.bfloat16() for t in w]):
        other = [t.double().numpy() for t in weights]
        found = lib.survey_weighed(reader, x, weights, 0.0, 1.0, 1.0, 1.0, True, threads)
        assert found == (joint_sum([a * b for a, b in zip(wide, other)]), largest, False)
    # With weights: |x (|w| alpha + eps)|, in float32.
    weighed = [(a * (b.abs() * 0.5 + 0.25)) for a, b in zip(x, w)]
    found = lib.survey_weighed(reader, x, w, 0.5, 0.25, 2.0, 1.0, False, threads)
    assert found[0] == joint_sum([np.square(t.double().numpy()) for t in weighed])
    assert found[1] == max(float(t.abs().max()) for t in weighed if t.numel())


@pytest.mark.parametrize("q, beyond", [(2.0, 1.5), (3.0, 1.0), (1.5, 1.0), (1.0, 2.0)])
def test_powers_relative_to_a_scale(q, beyond):
    """A power is within 2^-48 (1 + q |log2 x|) of itself (power.h), and a sum of n terms within n roundings."""
    x = draw([5, 100, BLOCK + 33], 3)
    scale = beyond * max(float(t.abs().max()) for t in x)
    found = lib.survey(reader, x, q, scale, 2)
    ratios = np.concatenate([t.double().abs().numpy() / scale for t in x])
    terms = ratios**q
    of_powers = 2.0**-48 * (terms * (1 + q * np.abs(np.log2(ratios)))).sum()
    assert abs(found[0] - terms.sum()) <= of_powers + len(terms) * 2.0**-52 * terms.sum()


def test_zeros_have_no_largest():
    for _ in range(2):
        assert lib.survey(reader, [torch.zeros(16)] * 9, 2.0, 1.0, 1) == (0.0, 0.0, False)
