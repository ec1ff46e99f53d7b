"""The examples run, at a tiny size."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_singular_values(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    script = runpy.run_path(str(EXAMPLES / "singular_values.py"))
    file = tmp_path / "map.svg"
    script["main"]([str(file), "keller", "you:4", "minimax:1e-2:3", "tuned:schatten8:2"])
    drawn = file.read_text()
    assert drawn.startswith("<?xml") and drawn.count("<path") > 10
    label, schedule = script["parse"]("minimax:1e-2:3")
    assert (label, schedule.steps, schedule.lower) == ("minimax from 1e-2, 3 steps", 3, 1e-4)
    assert script["parse"]("keller")[1].steps == 5
    with pytest.raises(SystemExit):
        script["main"]([str(file), "you:9"])
    assert "asked for 9 steps, it defines 5" in capsys.readouterr().err
