"""Mutants of CUDA sources that nobody can notice where they run on the host (see mutation_equivalents.py)."""

from __future__ import annotations

import re

ASSERTION = "an assertion about the source computes nothing: it holds, or the source does not compile"
ZERO = "0 either way"
# `make mutants` leaves test_sanitizers_are_silent out, which takes minutes for each.
SANITIZER = "what it computes is the same: test_sanitizers_are_silent fails with it, which was tried"

PATTERNS: dict[str, tuple[tuple[str, re.Pattern], ...]] = {
    file: ((ASSERTION, re.compile(r"^static_assert\(|<= (kArgumentBytes|STEEPEST_DEVICE_ROW_BYTES)(,$| &&$)")),)
    for file in (f"csrc/engine/cuda_{name}.h" for name in ("plan", "live", "survey"))
}

EQUIVALENT: dict[str, dict[str, tuple[str, ...]]] = {
    "csrc/engine/cuda_plan.h": {
        "any number below 0 says that there is no row": ("return -2;",),
        "set by a launch's first tensor before it is read": (
            "int64_t first_ = 1;  // tensor of this launch, where scalars are derived on the device",
        ),
        "the parameter itself is at a boundary: its shift is what it is away from it": (
            "for (int role = 1; role < kRoles; ++role)",
        ),
    },
    "csrc/engine/cuda_live.cu": {
        "one more block, whose threads have no tensor": (
            "const unsigned blocks = (launch.header.num_items + kBlock + 1) / kBlock;",
            "const unsigned blocks = (launch.header.num_items + kBlock) / kBlock;",
        ),
    },
    "csrc/engine/cuda.cu": {
        ZERO: (
            "const int first = begin <= 0 ? static_cast<int>(-begin) : 0;",
            "const int first = begin < 1 ? static_cast<int>(-begin) : 0;",
        ),
        "a whole tile either way": ("const int end = left <= kTile ? static_cast<int>(left) : kTile;",),
        "any one thread of the block": ("if (threadIdx.x == 1) work.fetch(launch);",),
        SANITIZER: (
            "if (threadIdx.x != 0) work.fetch(launch);",
            "for (int i = 0; i < kWords; ++i) { => for (int i = 0; i <= kWords; ++i) {",
        ),
    },
}


def pattern_reason(file: str, before: str) -> str:
    return next((why for why, pattern in PATTERNS.get(file, ()) if pattern.search(before)), "")
