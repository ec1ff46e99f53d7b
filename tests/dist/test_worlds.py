"""Runs every check of checks_*.py in worlds of 1, 2 and 4 gloo ranks, each world started once."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import worlds  # noqa: E402

MODULES = sorted(path.stem for path in Path(__file__).parent.glob("checks_*.py"))
CHECKS = worlds.checks(MODULES)


@functools.cache
def outcome(world: int) -> dict[str, dict[int, str]]:
    return worlds.run(world, [(module, name) for module, name, size in CHECKS if size == world])


@pytest.mark.parametrize(("module", "name", "world"), CHECKS, ids=[f"{name}-{world}" for _, name, world in CHECKS])
def test_world(module, name, world):
    wrong = worlds.verdict(outcome(world)[name], world)
    assert not wrong, wrong
