"""What a library's results look like: the table of verdicts, errors side by side, findings with their commands."""

from __future__ import annotations

import shlex
import statistics
import sys
from collections import Counter
from dataclasses import dataclass, field

from steepest.conformance import report
from steepest.conformance.runner import FAIL, OK, SKIPPED, UNSUPPORTED, Result
from steepest.conformance.subjects import Library
from steepest.conformance.subjects.base import Subject

# Figures that mean the same for every implementation, whatever bound it is judged by.
ERRORS = ("params ulp", "exp_avgs ulp", "exp_avg_sqs ulp", "max_exp_avg_sqs ulp", "rounding", "method", "orthogonality")
ERRORS_TITLE = "worst error (median), over the cases that all columns pass"


@dataclass
class Outcome:
    """What came of one library.  `cases`: op -> case -> its parameters."""

    library: Library
    subjects: list[Subject]
    results: list[Result]
    cases: dict[str, dict] = field(default_factory=dict)

    @property
    def columns(self) -> dict[str, str]:
        """The subjects that ran, and how the library was called."""
        run = {r.backend for r in self.results}
        return {s.name: s.note for s in self.subjects if s.name in run}

    def by_op(self) -> list[list[Result]]:
        """Ops have different columns, so each gets a table of its own."""
        return [[r for r in self.results if r.op == op] for op in dict.fromkeys(r.op for r in self.results)]


@dataclass
class Finding:
    """Cells that a subject FAILs in the same figures; `first` is shown, with the command that repeats it."""

    first: Result
    command: str
    cells: dict[str, list[str]]  # case -> dtypes

    @property
    def title(self) -> str:
        return f"{self.first.backend} · {self.first.op} · {self.first.case} · {self.first.dtype}"

    @property
    def others(self) -> str:
        """The other cells, for people."""
        first, *rest = ((case, dtypes) for case, dtypes in self.cells.items())
        rest = [*([(first[0], first[1][1:])] if first[1][1:] else []), *rest]
        return "; ".join(f"{case} ({', '.join(dtypes)})" for case, dtypes in rest)


def command_for(library: str, op: str, *, case: str = "", dtype: str = "", seed: int = 0, quick: bool = False) -> str:
    """The command that shows one row or one finding."""
    text = f"{op}/{case}" if case else f"{op}/"
    pattern = "".join(f"\\{c}" if c in r".^$*+?{}[]\|()" else c for c in text)
    words = ["python", "-m", "steepest", "validate", "--subject", library, "--op", f"^{pattern}{'$' if case else ''}"]
    words += ["--dtype", dtype] if dtype else []
    words += ["--seed", str(seed)] if seed else []
    words += ["--quick"] if quick else []
    return shlex.join(words)


def findings(outcome: Outcome) -> list[Finding]:
    """One per subject, op and set of figures that fail."""
    found: dict[tuple, Finding] = {}
    for r in outcome.results:
        if r.status != FAIL or r.backend not in outcome.columns:
            continue
        key = (r.backend, r.op, frozenset(f.name for f in r.figures if not f.ok) or r.reason)
        if key not in found:
            command = command_for(outcome.library.name, r.op, case=r.case, dtype=r.dtype, seed=r.seed)
            found[key] = Finding(r, command, {})
        found[key].cells.setdefault(r.case, []).append(r.dtype)
    return list(found.values())


def errors(results: list[Result]) -> tuple[list[str], list[list[str]]]:
    """Of one op: header and rows, per dtype and figure "worst (median)" of each column over the cases that all pass."""
    columns = list(dict.fromkeys(r.backend for r in results))
    table = []
    for dtype in dict.fromkeys(r.dtype for r in results):
        by_column = {}
        for column in columns:
            passed = (r for r in results if (r.dtype, r.backend, r.status) == (dtype, column, OK))
            by_column[column] = {r.case: {f.name: f.value for f in r.figures} for r in passed}
        present = [column for column in columns if by_column[column]]
        if not present:
            continue
        common = set.intersection(*(set(by_column[column]) for column in present))
        for name in ERRORS:
            cases = [c for c in common if all(name in by_column[column][c] for column in present)]
            if cases:
                values = {column: [by_column[column][c][name] for c in cases] for column in present}
                texts = (_worst_and_median(values[c]) if c in values else "" for c in columns)
                table.append([dtype, name, str(len(cases)), *texts])
    return ["dtype", "error", "cases", *columns], table


def _worst_and_median(values: list[float]) -> str:
    return f"{max(values):.2g} ({statistics.median(values):.2g})"


def print_outcome(outcome: Outcome, options, file=None) -> None:
    """For people at a terminal."""
    file = sys.stdout if file is None else file
    print(f"\n{outcome.library.name} {outcome.library.version}\n", file=file)
    for results in outcome.by_op():
        report.print_grid(*report.rows(results, options.cases), file)
        header, table = errors(results)
        if table:
            print(f"\n{results[0].op}: {ERRORS_TITLE}\n", file=file)
            report.print_grid(header, [[(text, OK) for text in row] for row in table], file)
        print(file=file)
    for name, note in outcome.columns.items():
        print(f"{name}: {note}", file=file)
    found = findings(outcome)
    print(f"\nfindings about {outcome.library.name}: {len(found) or 'none'}\n", file=file)
    for finding in found:
        print(f"  {finding.title}\n      {finding.first.reason}", file=file)
        if finding.others:
            print(f"      also: {finding.others}", file=file)
        print(f"      {finding.command}", file=file)
    _print_rest(outcome, file)


def _print_rest(outcome: Outcome, file) -> None:
    """FAILs of ours, what did not run, totals."""
    print(file=file)
    for r in outcome.results:
        if r.status == FAIL and r.backend not in outcome.columns:
            print(f"FAIL  {r.op} · {r.backend} · {r.dtype} · {r.case} (seed {r.seed}): {r.reason}", file=file)
    for line in _not_run(outcome):
        print(line, file=file)
    for name, ours in (("steepest", True), (outcome.library.name, False)):
        count = Counter(r.status for r in outcome.results if (r.backend not in outcome.columns) == ours)
        print(f"{name}: {', '.join(f'{count[s]} {s}' for s in (OK, FAIL, UNSUPPORTED, SKIPPED))}", file=file)


def _not_run(outcome: Outcome) -> list[str]:
    reasons = Counter((r.backend, r.status, r.reason) for r in outcome.results if r.status in (UNSUPPORTED, SKIPPED))
    return [f"{status}  {name}, {count} cells: {reason}" for (name, status, reason), count in reasons.items()]


def print_markdown(outcome: Outcome, options, file=None) -> None:
    """For publication: every row and every finding has its command."""
    from steepest.info import info

    about, name = info(), outcome.library.name
    parts = [
        f"## {name} {outcome.library.version}",
        f"steepest {about['steepest']} ({about['commit']}), torch {about['torch']}, CPU {about['cpu']['model']}.",
        "\n".join(f"- {column}: `{note}`" for column, note in outcome.columns.items()),
    ]
    for results in outcome.by_op():
        parts.append(_markdown_table(*_with_commands(name, results, options)))
        header, table = errors(results)
        if table:
            parts += [f"{results[0].op}: {ERRORS_TITLE}.", _markdown_table(header, table)]
    found = findings(outcome)
    parts.append(f"Findings: {len(found) or 'none'}")
    for f in found:
        also = f"Also: {f.others}.  \n  " if f.others else ""
        parts.append(f"- **{f.title}**: {f.first.reason}  \n  {also}`{f.command}`")
    parts.append("\n".join(f"- {line}" for line in _not_run(outcome)))
    print("\n\n".join(part for part in parts if part) + "\n", file=file or sys.stdout)


def _with_commands(library: str, results: list[Result], options) -> tuple[list[str], list[list[str]]]:
    header, table = report.rows(results, options.cases)
    rows = []
    for row in table:
        texts = [text for text, _ in row]
        case, dtype = texts[1] if options.cases else "", texts[header.index("dtype")]
        command = command_for(library, texts[0], case=case, dtype=dtype, seed=options.seed, quick=options.quick)
        rows.append([*texts, f"`{command}`"])
    return [*header, "command"], rows


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    def line(cells):
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])
