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


@dataclass
class Finding:
    """A case that a subject FAILs, with the first dtype's figures and the command that shows it."""

    subject: str
    op: str
    case: str
    dtypes: list[str]
    reason: str
    command: str

    @property
    def title(self) -> str:
        return f"{self.subject} · {self.op} · {self.case} ({', '.join(self.dtypes)})"


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
    """One per subject, op and case."""
    found: dict[tuple[str, str, str], Finding] = {}
    for r in outcome.results:
        if r.status != FAIL or r.backend not in outcome.columns:
            continue
        key = (r.backend, r.op, r.case)
        if key in found:
            found[key].dtypes.append(r.dtype)
        else:
            command = command_for(outcome.library.name, r.op, case=r.case, dtype=r.dtype, seed=r.seed)
            found[key] = Finding(*key, [r.dtype], r.reason, command)
    return list(found.values())


def errors(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """Header and rows: per op, dtype and figure "worst (median)" of each column, over the cases that all columns pass."""
    columns = list(dict.fromkeys(r.backend for r in outcome.results))
    table = []
    for op, dtype in dict.fromkeys((r.op, r.dtype) for r in outcome.results):
        by_column = {}
        for column in columns:
            passed = (r for r in outcome.results if (r.op, r.dtype, r.backend, r.status) == (op, dtype, column, OK))
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
                table.append([op, dtype, name, str(len(cases)), *texts])
    return ["op", "dtype", "error, worst (median)", "cases", *columns], table


def _worst_and_median(values: list[float]) -> str:
    return f"{max(values):.2g} ({statistics.median(values):.2g})"


def print_outcome(outcome: Outcome, options, file=None) -> None:
    """For people at a terminal."""
    file = sys.stdout if file is None else file
    print(f"\n{outcome.library.name} {outcome.library.version}\n", file=file)
    report.print_grid(*report.rows(outcome.results, options.cases), file)
    print(file=file)
    for name, note in outcome.columns.items():
        print(f"{name}: {note}", file=file)
    header, table = errors(outcome)
    if table:
        print("\nerrors, over the cases that all columns pass\n", file=file)
        report.print_grid(header, [[(text, OK) for text in row] for row in table], file)
    found = findings(outcome)
    print(f"\nfindings about {outcome.library.name}: {len(found) or 'none'}\n", file=file)
    for finding in found:
        print(f"  {finding.title}\n      {finding.reason}\n      {finding.command}", file=file)
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


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    def line(cells):
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def print_markdown(outcome: Outcome, options, file=None) -> None:
    """For publication: every row and every finding has its command."""
    from steepest.info import info

    about, name = info(), outcome.library.name
    header, table = report.rows(outcome.results, options.cases)
    last = header.index("dtype")
    rows = []
    for row in table:
        texts = [text for text, _ in row]
        where = dict(case=texts[1] if options.cases else "", dtype=texts[last], seed=options.seed, quick=options.quick)
        rows.append([*texts, f"`{command_for(name, texts[0], **where)}`"])
    errors_header, errors_table = errors(outcome)
    found = findings(outcome)
    parts = [
        f"## {name} {outcome.library.version}",
        f"steepest {about['version']}, torch {about['torch']['version']}, {about['cpu']['model']}."
        + "".join(f"\n- {column}: `{note}`" for column, note in outcome.columns.items()),
        _markdown_table([*header, "command"], rows),
    ]
    if errors_table:
        parts += ["Errors over the cases that all columns pass:", _markdown_table(errors_header, errors_table)]
    parts.append(f"Findings: {len(found) or 'none'}")
    parts += [f"- **{f.title}**: {f.reason}  \n  `{f.command}`" for f in found]
    if rest := _not_run(outcome):
        parts.append("\n".join(f"- {line}" for line in rest))
    print("\n\n".join(parts) + "\n", file=file or sys.stdout)
