"""Scratch memory of matrix programs that a thread keeps from call to call."""

from __future__ import annotations

import gc
import math
import threading
import weakref

import pytest
import torch

import steepest
from steepest.matrix import native


def polar(x: torch.Tensor) -> torch.Tensor:
    """By the C library's kernels, also on a machine where torch's products would be taken unasked."""
    return steepest.polar(x, backend="native")


@pytest.fixture(autouse=True)
def nothing_kept():
    """Each test begins as a new thread does."""
    native._kept.__dict__.clear()
    yield
    native._kept.__dict__.clear()


def test_scratch_is_kept_until_more_is_needed():
    small = native._scratch(1000)
    assert len(small) == 1000 and native._scratch(1000) is small and native._scratch(1) is small
    large = native._scratch(1001)
    assert len(large) == 1001 and native._scratch(1000) is large


def test_what_is_beyond_the_limit_serves_one_call(monkeypatch):
    monkeypatch.setattr(native, "KEPT_BYTES", 100)
    kept = native._scratch(100)
    beyond = native._scratch(101)
    assert len(beyond) == 101 and native._scratch(101) is not beyond
    assert native._scratch(100) is kept


def test_what_an_earlier_call_left_behind_changes_nothing():
    x = torch.randn(40, 70, generator=torch.Generator().manual_seed(0))
    expected = polar(x)
    native._kept.memory.fill_(255)  # NaN in either dtype
    assert torch.equal(polar(x), expected)
    bad = polar(torch.full((90, 90), math.nan))
    assert bad.isnan().all()
    assert torch.equal(polar(x), expected)


def test_every_thread_has_its_own_and_it_ends_with_the_thread():
    """Several callers at once get what one alone gets."""
    x = torch.randn(3, 60, 60, generator=torch.Generator().manual_seed(0))
    expected, found, kept = polar(x), {}, {}
    mine = native._kept.memory

    def work(number):
        for _ in range(20):
            found[number] = polar(x)
            assert torch.equal(found[number], expected)
        kept[number] = weakref.ref(native._kept.memory.untyped_storage())
        assert native._kept.memory.data_ptr() != mine.data_ptr()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1, 2] and all(torch.equal(y, expected) for y in found.values())
    gc.collect()
    assert len(kept) == 3 and all(storage() is None for storage in kept.values())
