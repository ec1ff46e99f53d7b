"""Results as a table for people and as JSON for machines."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable

from steepest.conformance.records import KIND, SCHEMA, pack
from steepest.conformance.registry import COLUMNS, registered_ops
from steepest.conformance.runner import FAIL, OK, SKIPPED, UNSUPPORTED, Result

COLOURS = {OK: "green", FAIL: "bold red", UNSUPPORTED: "yellow", SKIPPED: "dim"}


def to_json(results: list[Result], *, seed: int, quick: bool, seconds: float) -> dict:
    """Schema 2: environment as in `steepest.info()`, totals, bounds, all cases' parameters, results as in `records`."""
    from steepest.info import info

    ops = registered_ops()
    run = {(r.op, r.case) for r in results}
    ops = {name: op for name, op in ops.items() if any(name == ran for ran, _ in run)}
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "info": info(),
        "seed": seed,
        "quick": quick,
        "seconds": round(seconds, 2),
        "totals": dict(Counter(r.status for r in results)),
        "ops": {name: {"bound": op.bound, "source": op.source} for name, op in ops.items()},
        "cases": {
            name: {case.id: case.parameters() for case in op.cases if (name, case.id) in run}
            for name, op in ops.items()
        },
        **pack(results),
    }


def json_text(written: dict) -> str:
    """One line per result and per case: small, and readable in a diff."""

    def line(entry) -> str:
        return json.dumps(entry, separators=(",", ":"), ensure_ascii=False)

    def text(value, depth: int) -> str:
        """A line, or one line per entry for the first `depth` levels."""
        if not depth:
            return line(value)
        indent = "\n" + " " * (3 - depth)
        if isinstance(value, dict):
            return "{" + ",".join(f"{indent}{line(k)}: {text(v, depth - 1)}" for k, v in value.items()) + "}"
        return "[" + ",".join(indent + text(v, depth - 1) for v in value) + "]"

    depths = {"cases": 2, "results": 1, "ops": 1}
    return "{\n" + ",\n".join(f"{line(k)}: {text(v, depths.get(k, 0))}" for k, v in written.items()) + "}\n"


def figure_text(results: Iterable[Result]) -> str:
    """The worst figures of some cells: share of the bound, ulp, and whether equality in bits was asked for and held."""
    figures = [f for r in results for f in r.figures]
    parts = []
    shares = [f.share for f in figures if f.share is not None]
    if shares:
        worst = max(shares)
        parts.append(f"{worst:.0%} of bound" if worst < 10 else f"{worst:.1g} times the bound")
    ulps = [f.value for f in figures if f.unit.startswith("ulp")]
    if ulps:
        parts.append(f"{max(ulps):.2g} ulp")
    if any(f.name == "bits" for f in figures):
        unequal = sum(f.value for f in figures if f.name == "bits")
        parts.append("same bits" if unequal == 0 else f"{unequal:.0f} differ in bits")
    return ", ".join(parts)


def cell_text(results: list[Result]) -> tuple[str, str]:
    """(text, status) of a table cell that stands for several cases."""
    if not results:
        return "", OK
    count = Counter(r.status for r in results)
    for status in (FAIL, OK, UNSUPPORTED, SKIPPED):
        if count[status]:
            break
    text = status
    if status in (OK, FAIL) and len(results) > 1:
        text += f" {count[status]}/{len(results) - count[UNSUPPORTED] - count[SKIPPED]}"
    measured = figure_text(r for r in results if r.status == status)
    if measured:
        text += f" ({measured})"
    if count[UNSUPPORTED] and status != UNSUPPORTED:
        text += f", {count[UNSUPPORTED]} unsupported"
    return text, status


def rows(results: list[Result], by_case: bool) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """Header and rows: one row per op and dtype, or per op, case and dtype; one column per backend that was run."""
    run = dict.fromkeys(r.backend for r in results)
    columns = [*(name for name in COLUMNS if name in run), *(name for name in run if name not in COLUMNS)]
    keys = list(dict.fromkeys((r.op, r.case if by_case else "", r.dtype) for r in results))
    header = ["op", *(["case"] if by_case else []), "dtype", *columns]
    table = []
    for op, case, dtype in keys:
        row = [(text, OK) for text in ([op, case, dtype] if by_case else [op, dtype])]
        for column in columns:
            row.append(
                cell_text(
                    [
                        r
                        for r in results
                        if (r.op, r.dtype, r.backend) == (op, dtype, column) and (not by_case or r.case == case)
                    ]
                )
            )
        table.append(row)
    return header, table


def print_table(results: list[Result], *, by_case: bool = False, file=None) -> None:
    """The table, then every FAIL in full, then each distinct reason for what did not run."""
    file = sys.stdout if file is None else file
    print_grid(*rows(results, by_case), file)
    for r in results:
        if r.status == FAIL:
            print(f"FAIL  {r.op} · {r.backend} · {r.dtype} · {r.case} (seed {r.seed}): {r.reason}", file=file)
    for status in (UNSUPPORTED, SKIPPED):
        reasons = Counter((r.backend, r.reason) for r in results if r.status == status)
        for (backend, reason), count in reasons.items():
            print(f"{status}  {backend}, {count} cells: {reason}", file=file)
    count = Counter(r.status for r in results)
    print(", ".join(f"{count[s]} {s}" for s in (OK, FAIL, UNSUPPORTED, SKIPPED)), file=file)


def print_grid(header, table, file) -> None:
    """`table`: rows of (text, status)."""
    try:
        _rich_table(header, table, file)
    except ImportError:
        _plain_table(header, table, file)


def _rich_table(header, table, file) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    view = Table(show_edge=False, pad_edge=False)
    for name in header:
        view.add_column(name)
    leading = header.index("dtype") + 1
    for row in table:
        cells = [Text(text, style="" if i < leading else COLOURS[status]) for i, (text, status) in enumerate(row)]
        view.add_row(*cells)
    Console(file=file, width=None if file.isatty() else 200).print(view)


def _plain_table(header, table, file) -> None:
    lines = [header, *([text for text, _ in row] for row in table)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip(), file=file)
