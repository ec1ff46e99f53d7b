"""Checkpoints through torch.distributed.checkpoint: saved by 4 ranks, loaded by 4, 2 and 1; and the loss of a rank."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import worlds  # noqa: E402


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a checkpoint that 4 ranks have written."""
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    said = worlds.run(4, [("resharding", "save")], shared=folder)
    wrong = worlds.verdict(said["save"], 4)
    assert not wrong, wrong
    return folder


@pytest.mark.parametrize("world", [4, 2, 1])
def test_other_worlds_go_on_as_if_nothing_had_happened(saved, world):
    said = worlds.run(world, [("resharding", "go_on")], shared=saved)
    wrong = worlds.verdict(said["go_on"], world)
    assert not wrong, wrong


@pytest.mark.parametrize("kind", ["adamw", "muon", "shampoo"])
def test_the_loss_of_a_rank_is_an_error_in_time_and_the_checkpoint_still_loads(saved, kind):
    start = time.monotonic()
    said = worlds.run(2, [("resharding", f"lose_{kind}")], shared=saved)[f"lose_{kind}"]
    assert said == {0: ""}, said
    # The others hear of it from the connection, long before the timeout.
    assert time.monotonic() - start < worlds.TIMEOUT + 30
    again = worlds.run(1, [("resharding", "go_on")], shared=saved)["go_on"]
    assert again == {0: ""}, again
