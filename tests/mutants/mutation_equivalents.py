"""Mutants that nobody can notice, and why: file -> reason -> lines as they are after the change."""

from __future__ import annotations

import equivalents_cpp
import equivalents_python

EQUIVALENT = equivalents_cpp.EQUIVALENT | equivalents_python.EQUIVALENT


def reason(file: str, before: str, after: str) -> str:
    """Why nobody can notice this mutant; "" when somebody must."""
    for why, lines in EQUIVALENT.get(file, {}).items():
        if after in lines or f"{before} => {after}" in lines:
            return why
    return ""
