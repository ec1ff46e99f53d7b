"""Results inside a report: small, lossless up to digits that nobody reads, one line per cell.

    {"figures": [["params error/bound", "of bound", ""], ...],         each kind of figure once: name, unit, note
     "results": [{"op": ..., "backend": ..., "dtype": ..., "case": ..., "status": "ok", "ms": 1.2,
                  "figures": [[0, 0.31, 1], ...]}, ...]}               index into the above, value, bound

Empty reasons and empty lists of figures are left out.  JSON has no inf and nan: they are strings.
"""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from steepest.conformance.registry import Figure
from steepest.conformance.runner import Result

SCHEMA = 2
KIND = "steepest-validate"
DIGITS = 4  # shares and errors are compared by percents


def pack(results: list[Result]) -> dict[str, list]:
    """The entries "figures" and "results" of a report."""
    kinds: dict[tuple[str, str, str], int] = {}
    rows = []
    for result in results:
        row: dict[str, Any] = {name: getattr(result, name) for name in identity_names(Result)}
        row["status"] = result.status
        if result.reason:
            row["reason"] = result.reason
        if result.ms:
            row["ms"] = number(result.ms)
        if result.figures:
            row["figures"] = [
                [kinds.setdefault((f.name, f.unit, f.note), len(kinds)), number(f.value), f.bound and number(f.bound)]
                for f in result.figures
            ]
        rows.append(row)
    return {"figures": [list(kind) for kind in kinds], "results": rows}


def unpack(report: dict[str, Any]) -> list[Result]:
    """The results of a report, as they were packed."""
    kinds = report["figures"]
    results = []
    for row in report["results"]:
        figures = []
        for index, value, bound in row.get("figures", ()):
            name, unit, note = kinds[index]
            figures.append(Figure(name, float(value), None if bound is None else float(bound), unit, note))
        plain = {name: value for name, value in row.items() if name != "figures"}
        results.append(Result(**plain, figures=figures, seed=report["seed"]))
    return results


def identity_names(result_type) -> list[str]:
    """The fields that say which cell a result belongs to: all that come before its status."""
    names = [field.name for field in fields(result_type)]
    return names[: names.index("status")]


def number(x: float) -> float | int | str:
    if not math.isfinite(x):
        return str(x)
    short = float(f"{x:.{DIGITS}g}")
    return int(short) if short == int(short) and abs(short) < 10**DIGITS else short


def read(path: str | Path) -> dict[str, Any]:
    """A report from a file.  OSError where there is none, ValueError for anything that is not such a report."""
    try:
        report = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(report, dict) or report.get("kind") != KIND:
        raise ValueError(f"{path} is not a report of `steepest validate --json`")
    if report.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {report.get('schema')}, this version reads {SCHEMA}")
    return report
