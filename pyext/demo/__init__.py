"""The main job: train one small transformer on real text with several optimizers and compare them."""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """Run ``python -m steepest demo`` with the arguments ``argv``; returns the exit status."""
    from steepest.demo.run import main as run  # here, so that the other commands do not wait for what this one imports

    return run(argv)
