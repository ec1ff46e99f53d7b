"""A report as one HTML page that opens from disk: environment, verdicts, plots, and every figure of every case."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from steepest.conformance import records
from steepest.conformance.difference import flat
from steepest.conformance.page import plots, template
from steepest.conformance.registry import COLUMNS
from steepest.conformance.report import cell_text
from steepest.conformance.runner import FAIL, OK, SKIPPED, UNSUPPORTED, Result


def render(report: dict[str, Any]) -> str:
    """The page of a report as `records.read` returns it."""
    view = View(report)
    return template.PAGE.substitute(
        style=template.STYLE,
        machine=escape(machine(report["info"])),
        run=escape(run_text(report)),
        totals=totals(view.results),
        failures=failures(view.results),
        matrix=view.matrix(),
        reasons=reasons(view.results),
        overview=view.overview(),
        ops="".join(view.op_section(op) for op in view.ops),
        environment=environment(report["info"]),
    )


def main(target: str | None, source: str) -> int:
    """Writes the page of the report in file `source`; 2 when that is not a report."""
    if target is None:
        print("validate: --from needs --html FILE, the page to write", file=sys.stderr)
        return 2
    try:
        Path(target).write_text(render(records.read(source)))
    except (OSError, ValueError) as error:
        print(f"validate --html: {error}", file=sys.stderr)
        return 2
    return 0


def machine(info: dict[str, Any]) -> str:
    cuda, cpu = info.get("cuda"), info.get("cpu")
    devices = cuda.get("devices", []) if isinstance(cuda, dict) else []
    names = [f"{count} × {name}" if count > 1 else name for name, count in Counter(d["name"] for d in devices).items()]
    model = cpu.get("model", "unknown processor") if isinstance(cpu, dict) else "unknown processor"
    return ", ".join([*names, model])


def run_text(report: dict[str, Any]) -> str:
    parts = [report["date"], f"commit {report['info'].get('commit') or 'unknown'}", f"seed {report['seed']}"]
    parts += ["quick cases"] if report["quick"] else []
    return " · ".join([*parts, f"{report['seconds']:.0f} s"])


def totals(results: list[Result]) -> str:
    count = Counter(r.status for r in results)
    return "".join(f'<span class="tag {s}">{count[s]} {s}</span>' for s in (FAIL, OK, UNSUPPORTED, SKIPPED) if count[s])


def failures(results: list[Result]) -> str:
    items = [
        f"<li><b>{escape(' · '.join((r.op, r.backend, r.dtype, r.case)))}</b><br>{escape(r.reason)}</li>"
        for r in results
        if r.status == FAIL
    ]
    return f'<h2>What FAILs</h2><ul class="failures">{"".join(items)}</ul>' if items else ""


def reasons(results: list[Result]) -> str:
    """Why cells did not run, each reason once."""
    count = Counter((r.status, r.backend, r.reason) for r in results if r.status in (UNSUPPORTED, SKIPPED))
    lines = [
        f'<span class="tag {status}">{status}</span> {escape(backend)}, {number} cells: {escape(reason)}'
        for (status, backend, reason), number in count.items()
    ]
    return f'<p class="faint reasons">{"<br>".join(lines)}</p>' if lines else ""


def environment(info: dict[str, Any]) -> str:
    rows = flat({name: value for name, value in info.items() if value not in ({}, None)})
    return "".join(f"<div><b>{escape(name)}</b><span>{escape(str(value))}</span></div>" for name, value in rows.items())


def share_text(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 or share == 0 else f"{share:.1%}" if share >= 1e-3 else "&lt;0.1%"


def anchor(op: str) -> str:
    return f"op-{escape(op, quote=True).replace(' ', '-')}"


class View:
    """The results by op, backend, dtype and case."""

    def __init__(self, report: dict[str, Any]):
        self.report = report
        self.results = records.unpack(report)
        order = {name: i for i, name in enumerate(COLUMNS)}
        named = dict.fromkeys(r.backend for r in self.results)
        self.backends = sorted(named, key=lambda name: order.get(name, len(order)))
        self.dtypes = list(dict.fromkeys(r.dtype for r in self.results))
        self.lanes = [name for name in self.backends if any(r.figures for r in self.results if r.backend == name)]
        self.ops = list(dict.fromkeys(r.op for r in self.results))

    def of(self, **wanted: str) -> list[Result]:
        return [r for r in self.results if all(getattr(r, name) == value for name, value in wanted.items())]

    def shape(self, dtype: str) -> str:
        return plots.SHAPES[self.dtypes.index(dtype) % len(plots.SHAPES)]

    def matrix(self) -> str:
        """One row per op and dtype, one column per backend."""
        head = "".join(f"<th>{escape(name)}</th>" for name in ("op", "dtype", *self.backends))
        rows = []
        for op in self.ops:
            for dtype in dict.fromkeys(r.dtype for r in self.of(op=op)):
                cells = [f'<td class="name"><a href="#{anchor(op)}">{escape(op)}</a></td><td class="name">{dtype}</td>']
                for backend in self.backends:
                    text, status = cell_text(self.of(op=op, dtype=dtype, backend=backend))
                    verdict, _, measured = text.partition(" (")
                    small = f"<small>{escape(measured.replace('),', ',').rstrip(')'))}</small>" if measured else ""
                    cells.append(f'<td class="{status if text else ""}">{escape(verdict)}{small}</td>')
                rows.append(f"<tr>{''.join(cells)}</tr>")
        return f'<table class="matrix"><tr>{head}</tr>{"".join(rows)}</table>'

    def marks(self, results: Iterable[Result], *, by_backend: bool) -> list[plots.Mark]:
        """Of results that were judged by a bound, in a lane of their backend or spread over three."""
        judged = [r for r in results if any(f.share is not None for f in r.figures)]
        marks = []
        for i, r in enumerate(judged):
            backend = self.backends.index(r.backend)
            lane = 3.5 * (self.lanes.index(r.backend) - (len(self.lanes) - 1) / 2) if by_backend else 4.5 * (i % 3 - 1)
            title = f"{r.case} · {r.backend} · {r.dtype}: {r.share:.3g} of the bound"
            marks.append(plots.Mark(r.share, backend, self.shape(r.dtype), title, r.status == FAIL, lane))
        return marks

    def legend(self, results: Sequence[Result]) -> str:
        ran = {r.backend for r in results if r.figures}
        entries = [name if name in ran else f"{name} (did not run)" for name in self.backends]
        return plots.legend(entries, [(dtype, self.shape(dtype)) for dtype in self.dtypes])

    def overview(self) -> str:
        rows = []
        for op in self.ops:
            for backend in self.backends:
                for dtype in self.dtypes:
                    marks = self.marks(self.of(op=op, backend=backend, dtype=dtype), by_backend=False)
                    if marks:
                        rows.append((f"{op} · {backend} · {dtype}", marks))
        plot = plots.scatter(rows, "share of the error bound by op, backend and dtype")
        return self.legend(self.results) + plot

    def op_section(self, op: str) -> str:
        results = self.of(op=op)
        facts = self.report["ops"].get(op, {})
        cases = list(dict.fromkeys(r.case for r in results))
        rows = [(case, self.marks((r for r in results if r.case == case), by_backend=True)) for case in cases]
        plot = plots.scatter([row for row in rows if row[1]], f"share of the error bound of {op} by case")
        return (
            f'<h2 id="{anchor(op)}">{escape(op)}</h2>'
            f"<p>Bound: {escape(facts.get('bound', 'unknown'))}.<br>"
            f'<span class="faint">{escape(facts.get("source", ""))}</span></p>'
            f"<h3>Verdict of each case; open one for its figures</h3>"
            f'<div class="wide">{self.case_list(op, cases, results)}</div>'
            f"<h3>Share of the bound of each case</h3>{self.legend(results)}"
            f'<div class="wide">{plot}</div>'
        )

    def case_list(self, op: str, cases: list[str], results: list[Result]) -> str:
        """One line per case, opening to its figures; one column per backend and dtype that ran."""
        ran = {(r.backend, r.dtype) for r in results if r.status != SKIPPED}
        columns = [(b, d) for b in self.backends for d in self.dtypes if (b, d) in ran]
        grid = f'style="grid-template-columns: minmax(250px, 1fr) repeat({len(columns)}, 78px)"'
        found = {(r.case, r.backend, r.dtype): r for r in results}
        spans = [(backend, sum(b == backend for b, _ in columns)) for backend in dict.fromkeys(b for b, _ in columns)]
        heads = "".join(f'<b style="grid-column: span {n}">{escape(name)}</b>' for name, n in spans)
        dtypes = "".join(f"<span>{escape(dtype)}</span>" for _, dtype in columns)
        lines = [f'<div class="head" {grid}><i></i>{heads}</div><div class="head" {grid}><i>case</i>{dtypes}</div>']
        for case in cases:
            here = [found.get((case, *column)) for column in columns]
            cells = "".join(map(case_cell, here))
            inside = self.inside(op, case, [r for r in here if r])
            lines.append(f"<details><summary {grid}><i>{escape(case)}</i>{cells}</summary>{inside}</details>")
        return f'<div class="cases" style="min-width: {260 + 80 * len(columns)}px">{"".join(lines)}</div>'

    def inside(self, op: str, case: str, results: list[Result]) -> str:
        """A case's parameters, what its cells said, and a table of figures: one row each, one column per cell."""
        parameters = self.report["cases"].get(op, {}).get(case, {})
        text = ", ".join(f"{name} {value}" for name, value in parameters.items() if value is not None)
        said = [f"{r.backend} · {r.dtype}: {r.reason}" for r in results if r.reason]
        paragraphs = "".join(f"<p>{escape(line)}</p>" for line in said) + f'<p class="faint">{escape(text)}</p>'
        shown = [r for r in results if r.figures]
        names = {f.name: f for r in shown for f in r.figures}
        head = "".join(f"<th>{escape(r.backend)}<br>{escape(r.dtype)}</th>" for r in shown)
        rows = []
        for name, example in names.items():
            cells = "".join(figure_cell(next((f for f in r.figures if f.name == name), None)) for r in shown)
            rows.append(
                f'<tr><td title="{escape(example.note)}">{escape(name)}</td>{cells}<td>{escape(example.unit)}</td></tr>'
            )
        table = f"<table><tr><th>figure / bound</th>{head}<th></th></tr>{''.join(rows)}</table>" if rows else ""
        return f'<div class="inside">{paragraphs}<div class="wide">{table}</div></div>'


def case_cell(result: Result | None) -> str:
    if result is None:
        return "<span></span>"
    judged = any(f.share is not None for f in result.figures)
    text = result.status if result.status != UNSUPPORTED else "unsup."
    text += f" {share_text(result.share)}" if judged and result.status == OK else ""
    title = f' title="{escape(result.reason)}"' if result.reason else ""
    return f'<span class="{result.status}"{title}>{text}</span>'


def figure_cell(figure) -> str:
    if figure is None:
        return "<td></td>"
    bound = "" if figure.bound is None else f" / {figure.bound:.3g}"
    return f"<td{'' if figure.ok else ' class=FAIL'}>{figure.value:.3g}{bound}</td>"
