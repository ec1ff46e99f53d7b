"""`validate --subject NAME`: another library's implementations beside ours, as tables, findings, JSON or markdown."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from steepest.conformance import page, report
from steepest.conformance.runner import FAIL, Result, run_cell, select
from steepest.conformance.subjects import LIBRARIES, Library, tables
from steepest.conformance.subjects.base import Subject
from steepest.conformance.subjects.isolate import LibraryUnusable, RemoteLibrary
from steepest.conformance.subjects.ops import ops_of
from steepest.conformance.subjects.tables import Outcome


def resolve(names: list[str]) -> tuple[list[Library], list[str]]:
    """(libraries, what is missing from "all").  ValueError for a name that is unknown or not installed."""
    everything = "all" in names
    unknown = [name for name in names if name != "all" and name not in LIBRARIES]
    if unknown:
        raise ValueError(f"subject {unknown[0]!r} is unknown; known: {', '.join(LIBRARIES)}, all")
    wanted = LIBRARIES if everything else dict.fromkeys(names)
    missing = {name: reason for name in wanted if (reason := LIBRARIES[name].missing())}
    for name in names:
        if name in missing:
            raise ValueError(missing[name])
    return [LIBRARIES[name] for name in wanted if name not in missing], list(missing.values())


def main(options) -> int:
    """`options` as validate's parser makes them.  1 when an implementation of ours FAILs; theirs change nothing."""
    from steepest.conformance.validate import watched

    try:
        libraries, missing = resolve(options.subject)
        if options.op:
            re.compile(options.op)
    except (ValueError, re.error) as error:
        print(f"validate: {error}", file=sys.stderr)
        return 2
    begin, outcomes, known = time.perf_counter(), [], {}
    for library in libraries:
        try:
            remote = RemoteLibrary(library.name)
        except LibraryUnusable as error:
            missing.append(str(error))
            continue
        try:
            outcomes.append(examine(library, remote, options, known, watched))
        finally:
            remote.close()
    for line in missing:
        print(f"not run: {line}", file=sys.stderr)
    if not any(outcome.results for outcome in outcomes):
        print("validate: nothing was run; --list-subjects names what can be", file=sys.stderr)
        return 2
    results = list({key_of(r): r for outcome in outcomes for r in outcome.results}.values())
    if options.json or options.html:
        write(options, outcomes, results, time.perf_counter() - begin)
    if options.json != "-":
        show = tables.print_markdown if options.markdown else tables.print_outcome
        for outcome in outcomes:
            show(outcome, options)
    names = {subject.name for outcome in outcomes for subject in outcome.subjects}
    return int(any(r.status == FAIL and r.backend not in names for r in results))


def key_of(result: Result) -> tuple[str, str, str, str]:
    return result.op, result.backend, result.dtype, result.case


def examine(library: Library, remote: RemoteLibrary, options, known: dict, watched) -> Outcome:
    """All cells of a library's ops: ours here, theirs there.  `known` keeps ours for the next library."""
    ops = ops_of(remote.subjects)
    cells = select(options.op, None, options.dtype, options.quick, ops=ops)
    if options.backend:
        cells = [c for c in cells if isinstance(c.backend, Subject) or c.backend.name in options.backend]

    def results():
        for cell in cells:
            if isinstance(cell.backend, Subject):
                yield remote.run(cell, options.seed)
            else:
                key = (cell.op.name, cell.backend.name, cell.dtype, cell.case.id)
                known[key] = known[key] if key in known else run_cell(cell, options.seed)
                yield known[key]

    cases: dict[str, dict] = {}
    for cell in cells:
        cases.setdefault(cell.op.name, {})[cell.case.id] = cell.case.parameters()
    return Outcome(library, remote.subjects, list(watched(results(), len(cells))), cases)


def write(options, outcomes: list[Outcome], results: list[Result], seconds: float) -> None:
    """The report of `validate --json` with the subjects' columns, and what each of them is."""
    written = report.to_json(results, seed=options.seed, quick=options.quick, seconds=seconds)
    written["cases"] = {op: cases for outcome in outcomes for op, cases in outcome.cases.items()}
    written["subjects"] = {
        outcome.library.name: {
            "version": outcome.library.version,
            "columns": {subject.name: subject.note for subject in outcome.subjects},
        }
        for outcome in outcomes
    }
    if options.json == "-":
        print(report.json_text(written), end="")
    elif options.json:
        Path(options.json).write_text(report.json_text(written))
    if options.html:
        Path(options.html).write_text(page.render(written))


def print_list() -> int:
    for library in LIBRARIES.values():
        state = library.missing().partition(": ")[2] or library.version
        print(f"{library.name:<20}  {library.summary}\n{'':<20}  {state}")
    return 0
