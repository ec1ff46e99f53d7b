"""Shared by all layers: seeding, and skipping with a reason what this machine cannot run."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))
        if "interpret" in item.keywords and os.environ.get("TRITON_INTERPRET") != "1":
            item.add_marker(pytest.mark.skip(reason="TRITON_INTERPRET=1 was not set before start (make test sets it)"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Most matrices in tests are small: a second thread would add nothing but waiting where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
