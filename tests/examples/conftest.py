"""The scripts of examples/ import each other as scripts do; an sdist without examples/ has nothing to test."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
collect_ignore = [] if EXAMPLES.is_dir() else ["test_examples.py"]
