"""Corners of the references where a mutant went unnoticed."""

from __future__ import annotations

import numpy as np
import torch

from steepest.reference import normalize, storage


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


def test_path_normalisation_of_small_gradients():
    p = torch.tensor([3.0, -1.0])
    norm = normalize.path_normalize_([p], [torch.tensor([0.25, 0.0])])
    assert norm == 0.25 and p.tolist() == [12.0, -4.0]
    assert normalize.path_normalize_([p], [torch.zeros(2)]) == 0 and p.tolist() == [12.0, -4.0]
