"""Mutants that nobody can notice, and why: file -> reason -> lines as they are after the change."""

from __future__ import annotations

import equivalents_cpp
import equivalents_cuda
import equivalents_kernels
import equivalents_matrix
import equivalents_python

PARTS = (
    equivalents_cpp.EQUIVALENT,
    equivalents_cuda.EQUIVALENT,
    equivalents_matrix.EQUIVALENT,
    equivalents_python.EQUIVALENT,
    equivalents_kernels.EQUIVALENT,
)
EQUIVALENT: dict[str, dict[str, tuple[str, ...]]] = {}
for _part in PARTS:
    for _file, _reasons in _part.items():
        EQUIVALENT[_file] = EQUIVALENT.get(_file, {}) | _reasons


def reason(file: str, before: str, after: str) -> str:
    """Why nobody can notice this mutant; "" when somebody must."""
    for why, lines in EQUIVALENT.get(file, {}).items():
        if after in lines or f"{before} => {after}" in lines:
            return why
    return equivalents_kernels.pattern_reason(file, before, after) or equivalents_cuda.pattern_reason(file, before)
