"""Corners of the references where a mutant went unnoticed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steepest.reference import normalize, roots, storage


def test_random_words_of_elements_beyond_32_bits():
    """The element's number has 40 bits, the step 24; beyond those it makes another key."""
    index = torch.tensor([3, 2**32 + 3, 2**33 - 1, 2**40 - 1, 5 * 2**32])
    for step in (1, 2**24 - 1, 2**24 + 7):
        key = storage.stream_key(11, step, 1)
        found = storage.random_words(index, seed=11, step=step, purpose=1)
        for i, number in enumerate(index.tolist()):
            low, high = number % 2**32, number // 2**32 + (step % 2**24) * 256
            expected = storage.philox(np.array([low], np.uint64), np.array([high], np.uint64), key)
            assert [int(word[i]) for word in found] == [int(word[0]) for word in expected]


def test_memory_index_of_sides_of_any_length():
    for shape in ((2, 3), (3, 2), (2, 2, 5), (1, 2, 4)):
        flat = torch.arange(torch.Size(shape).numel())
        for order in (lambda t: t, lambda t: t.mT, lambda t: t.transpose(0, -1)):
            p = order(flat.view(shape))
            assert torch.equal(storage.memory_index(p), p), (shape, p.stride())


def test_a_parameter_and_residual_of_zero_are_zero():
    for dtype in (torch.int8, torch.int16):
        high = torch.tensor([0.0, -0.0, 1.0], dtype=torch.bfloat16)
        assert storage.join(high, torch.zeros(3, dtype=dtype)).tolist() == [0.0, 0.0, 1.0]


def test_exponents_of_blocks_at_their_borders():
    """The largest magnitude has to fit with a code above it: 1.875 does, what comes after it goes to the next power."""
    after = 1.875 + 2.0**-23
    blocks = torch.zeros(6, storage.BLOCK)
    blocks[:, 5] = torch.tensor([1.875, after, 0.0, 2.0**-140, 3.4028235e38, torch.inf])
    index = torch.arange(blocks.numel()).view(blocks.shape)
    for magnitude, least in ((True, 33), (False, 17)):
        found = storage.block8_exponents(blocks, index, magnitude).tolist()
        assert found == [127, 128, least, least, 254, 255]


def test_codes_of_zeros_and_of_blocks_that_are_not_finite():
    index, codes = torch.arange(3), torch.tensor([0, 0x80, 0x7F], dtype=torch.uint8)
    for magnitude in (True, False):
        bad = torch.tensor([255], dtype=torch.uint8)
        assert storage.block8_decode(codes, bad, index, magnitude).isnan().all()
        assert not storage.block8_encode(torch.ones(3), bad, index, magnitude, torch.zeros_like(index)).any()
    found = storage.block8_decode(codes, torch.tensor([127], dtype=torch.uint8), index, False)
    assert found.tolist() == [0.0, 0.0, 1.875] and torch.signbit(found).tolist() == [False, True, False]


@pytest.mark.parametrize("magnitude", [True, False])
def test_codes_of_the_smallest_numbers(magnitude):
    """Below the smallest code's number a magnitude is never rounded to 0, a signed number with its probability."""
    exponent = torch.tensor([127], dtype=torch.uint8)
    smallest = storage.block8_decode(torch.tensor([1], dtype=torch.uint8), exponent, torch.tensor([0]), magnitude)
    assert smallest.item() == 1.125 * 2.0 ** (-31 if magnitude else -15)

    def codes(values, random):
        index = torch.arange(len(values))
        return storage.block8_encode(
            torch.tensor(values), exponent, index, magnitude, torch.full_like(index, random)
        ).tolist()

    for random in (0, 0x7FFF, 0x8000, 0xFFFF):
        some = 1 if magnitude or random < 0x8000 else 0
        assert codes([0.0, smallest.item() / 2, smallest.item()], random) == [0, some, 1]
        top = 0xFF if magnitude else 0x7F
        assert codes([1.875, 3.0, torch.inf], random) == [top] * 3
    if not magnitude:
        assert codes([-1.875, -0.0, -1.0, 1.0], 0) == [0xFF, 0x80, 0xF8, 0x78]
    for random in (0, 0x1234, 0xFFFF):  # what carries is 2^20 - 8 at least, with sixteen times the random number
        last = ((127 - (31 if magnitude else 15)) << 23) + (5 << 20) + ((0xFFFF7 - 16 * random) & 0xFFFFF)
        number = storage.from_bits(torch.tensor([last, last + 1])).tolist()
        below, above = codes(number, random)
        assert above == below + 1
    assert codes([1.0625], 0x7FFE) == codes([1.0], 0) and codes([1.0625], 0x8000) == codes([1.125], 0)


def test_path_normalisation_of_small_gradients():
    p = torch.tensor([3.0, -1.0])
    norm = normalize.path_normalize_([p], [torch.tensor([0.25, 0.0])])
    assert norm == 0.25 and p.tolist() == [12.0, -4.0]
    assert normalize.path_normalize_([p], [torch.zeros(2)]) == 0 and p.tolist() == [12.0, -4.0]


def test_coupled_newton_goes_on_while_the_error_stays():
    """The identity is its own root: every error is 0, and none is larger than the one before."""
    x, products = roots.coupled_newton(torch.eye(1, dtype=torch.float64), 1, ridge=0.0, tolerance=-1.0, iterations=3)
    assert x.item() == 1.0 and products == 6
