"""What changed between two reports of `validate --json`: verdicts, cells, use of the bounds, and the environment."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from steepest.conformance import records
from steepest.conformance.runner import FAIL, OK, Result

# A share of a bound is listed when it grew by a tenth of the bound.  With one seed on one machine nothing moves;
# between two seeds 5 % of the quick figures do (AdamW and polar on the CPU).
GROWTH = 0.1
Cell = tuple[str, ...]


@dataclass
class Difference:
    """`changed`: (before, after) of cells with another status.  `grown`: (cell, figure, share before, share after)."""

    environment: list[tuple[str, Any, Any]] = field(default_factory=list)
    changed: list[tuple[Result, Result]] = field(default_factory=list)
    added: list[Result] = field(default_factory=list)
    removed: list[Result] = field(default_factory=list)
    grown: list[tuple[Cell, str, float, float]] = field(default_factory=list)
    common: int = 0

    @property
    def broken(self) -> list[tuple[Result, Result]]:
        """Was ok, is FAIL."""
        return [(a, b) for a, b in self.changed if a.status == OK and b.status == FAIL]


def cell_of(result: Result) -> Cell:
    return result.op, result.backend, result.dtype, result.case


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"cpu": {"cores": 2}} as {"cpu.cores": 2}."""
    found = {}
    for name, value in data.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def difference(before: dict[str, Any], after: dict[str, Any]) -> Difference:
    """Of two reports as `records.read` returns them."""
    out = Difference()
    settings = [{**flat(report["info"]), **{k: report[k] for k in ("seed", "quick")}} for report in (before, after)]
    for name in dict.fromkeys([*settings[0], *settings[1]]):
        values = [setting.get(name) for setting in settings]
        if values[0] != values[1]:
            out.environment.append((name, *values))
    a, b = ({cell_of(r): r for r in records.unpack(report)} for report in (before, after))
    out.removed = [a[cell] for cell in a if cell not in b]
    out.added = [b[cell] for cell in b if cell not in a]
    both = [cell for cell in a if cell in b]
    out.common = len(both)
    for cell in both:
        if a[cell].status != b[cell].status:
            out.changed.append((a[cell], b[cell]))
        elif a[cell].status == OK:
            out.grown += growth(cell, a[cell], b[cell])
    out.grown.sort(key=lambda entry: entry[2] - entry[3])
    return out


def growth(cell: Cell, before: Result, after: Result) -> list[tuple[Cell, str, float, float]]:
    shares = {figure.name: figure.share for figure in before.figures}
    pairs = [(f.name, shares.get(f.name), f.share) for f in after.figures]
    return [(cell, name, a, b) for name, a, b in pairs if a is not None and b is not None and b - a >= GROWTH]


def name_of(cell: Cell) -> str:
    return " · ".join(cell)


def summary(results: Iterable[Result]) -> str:
    """Counts by op and backend: "polar cpu 3 ok"."""
    counts = Counter((r.op, r.backend, r.status) for r in results)
    return ", ".join(f"{op} {backend} {count} {status}" for (op, backend, status), count in counts.items())


def lines(found: Difference) -> list[tuple[str, str]]:
    """The comparison as (text, style) lines; styles are rich's."""
    out = []

    def section(title: str, rows: list[tuple[str, str]]) -> None:
        if rows:
            out.extend([(title, "bold"), *((f"  {text}", style) for text, style in rows), ("", "")])

    width = max((len(name) for name, *_ in found.environment), default=0)
    section("environment", [(f"{name:<{width}}  {a} -> {b}", "") for name, a, b in found.environment])
    rows = []
    for a, b in sorted(found.changed, key=lambda pair: (pair[1].status != FAIL, pair[0].status != OK)):
        style = "bold red" if b.status == FAIL else "green" if b.status == OK else "yellow"
        reason = f": {b.reason}" if b.reason else ""
        rows.append((f"{a.status} -> {b.status}  {name_of(cell_of(b))}{reason}", style))
    section(f"verdict changed in {len(rows)} cells", rows)
    section(
        f"share of the bound grew by {GROWTH:.0%} of it or more, {len(found.grown)} figures",
        [(f"{a:4.0%} -> {b:4.0%}  {name_of(cell)}, {name}", "yellow") for cell, name, a, b in found.grown],
    )
    for title, results in (("only in the first", found.removed), ("only in the second", found.added)):
        style = "bold red" if any(r.status == FAIL for r in results) else "yellow"
        section(f"{title}, {len(results)} cells", [(summary(results), style)] if results else [])
    if not found.changed and not found.grown and not found.added and not found.removed:
        out.append((f"no difference in {found.common} cells", "green"))
    elif found.broken:
        out.append((f"{len(found.broken)} of {found.common} common cells were ok and FAIL now", "bold red"))
    else:
        out.append((f"nothing that was ok FAILs, of {found.common} common cells", "green"))
    return out


def main(first: str, second: str) -> int:
    """Prints the comparison.  1 when something that was ok is FAIL, 2 when a file is not a report, else 0."""
    try:
        found = difference(records.read(first), records.read(second))
    except (OSError, ValueError) as error:
        print(f"validate --compare: {error}", file=sys.stderr)
        return 2
    try:
        from rich.console import Console
    except ImportError:
        for text, _ in lines(found):
            print(text)
    else:
        console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False, soft_wrap=True)
        for text, style in lines(found):
            console.print(text, style=style or None)
    return int(bool(found.broken))
