"""README: its generated parts are up to date, its first example runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="runs from a source checkout")


def test_generated_tables_are_up_to_date():
    spec = importlib.util.spec_from_file_location("table", ROOT / "bench" / "table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    assert table.render((ROOT / "README.md").read_text()) == (ROOT / "README.md").read_text(), (
        "run: python bench/table.py write"
    )


def test_quick_start_runs(capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    exec(compile(code, "README.md", "exec"), {})
    assert "tensor" in capsys.readouterr().out
