"""The modules of bench/ are imported as its scripts import each other; an sdist without bench/ has nothing to test."""

from __future__ import annotations

import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))
collect_ignore = [] if BENCH.is_dir() else ["test_bench.py"]
