"""Results inside a report: small, and one line per cell, so that reports can be kept and compared as text.

    "columns": ["op", "backend", "dtype", "case", "status", "reason", "ms", "figures"],
    "figures": [["params error/bound", "of bound", ""], ...],                     each kind once: name, unit, note
    "results": [["adamw", "cpu", "float32", "one step", "ok", "", 1.2, [[0, 0.31, 1], 3, ...]], ...]

A figure is [kind, value, bound], or just its kind where both are 0: asked to be equal, and was.  bound null: shown, not
judged.  JSON has no inf and nan: they are strings.  Numbers keep four digits; statuses were decided before rounding.
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
COLUMNS = [field.name for field in fields(Result) if field.name not in ("figures", "seed")] + ["figures"]


def pack(results: list[Result]) -> dict[str, list]:
    """The entries "columns", "figures" and "results" of a report."""
    kinds: dict[tuple[str, str, str], int] = {}

    def packed(figure: Figure):
        kind = kinds.setdefault((figure.name, figure.unit, figure.note), len(kinds))
        if figure.value == 0 and figure.bound == 0:
            return kind
        return [kind, number(figure.value), None if figure.bound is None else number(figure.bound)]

    rows = [
        [*(short(getattr(result, name)) for name in COLUMNS[:-1]), [packed(f) for f in result.figures]]
        for result in results
    ]
    return {"columns": COLUMNS, "figures": [list(kind) for kind in kinds], "results": rows}


def unpack(report: dict[str, Any]) -> list[Result]:
    """The results of a report."""
    results = []
    for row in report["results"]:
        entry = dict(zip(report["columns"], row))
        figures = []
        for packed in entry.pop("figures"):
            index, value, bound = packed if isinstance(packed, list) else (packed, 0, 0)
            name, unit, note = report["figures"][index]
            figures.append(Figure(name, float(value), None if bound is None else float(bound), unit, note))
        results.append(Result(**entry, figures=figures, seed=report["seed"]))
    return results


def short(x):
    return number(x) if isinstance(x, float) else x


def number(x: float) -> float | int | str:
    if not math.isfinite(x):
        return str(x)
    rounded = float(f"{x:.4g}")
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 1e4 else rounded


def read(path: str | Path) -> dict[str, Any]:
    """A report from a file.  OSError where there is none, ValueError for anything that is not such a report."""
    try:
        report = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(report, dict) or report.get("kind") != KIND:
        raise ValueError(f"{path} is not a report of `steepest validate --json`")
    if report.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {report.get('schema')}, this version reads schema {SCHEMA}")
    return report
