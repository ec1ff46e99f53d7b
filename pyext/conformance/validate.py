"""python -m steepest validate: op x backend x dtype x case, each ok, FAIL, unsupported or skipped with a reason."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from steepest.conformance import aot, difference, page, report
from steepest.conformance.registry import COLUMNS, DTYPES, coverage, registered_ops
from steepest.conformance.runner import FAIL, Result, select
from steepest.conformance.subjects import LIBRARIES
from steepest.conformance.worker import run_everywhere, runs_in_worker, serve


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m steepest validate",
        description="Run every op's cases on every backend that this machine has, against a float64 oracle and derived "
        "error bounds. Exit status 1 when anything FAILs.",
    )
    p.add_argument("--op", default="", metavar="REGEX", help="ops, or op/case, to run")
    p.add_argument("--backend", action="append", choices=COLUMNS, help="may be repeated; default: all")
    p.add_argument("--dtype", action="append", choices=list(DTYPES), help="may be repeated; default: all")
    p.add_argument("--quick", action="store_true", help="the quick cases only: under a minute on two cores")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", metavar="FILE", help="also write a report ('-': to stdout, instead of the table)")
    p.add_argument("--cases", action="store_true", help="one row per case")
    p.add_argument("--list", action="store_true", help="name ops, bounds, backends and cases, run nothing")
    p.add_argument("--coverage", action="store_true", help="name what no case covers, run nothing; status 1 if any")
    p.add_argument("--html", metavar="FILE", help="also write a page with verdicts, plots and all figures")
    p.add_argument("--from", dest="source", metavar="REPORT", help="with --html: from this report, run nothing")
    p.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="what changed from one report to another, run nothing"
    )
    p.add_argument(
        "--aot", metavar="ARCHS", help="compile for sm_80,sm_90,... without a GPU: registers, spills, widths"
    )
    p.add_argument(
        "--subject",
        action="append",
        metavar="NAME",
        help=f"put another library beside ours: {', '.join(LIBRARIES)}, all; may be repeated; its FAILs are findings "
        "and do not change the exit status",
    )
    p.add_argument("--list-subjects", action="store_true", help="name them and what is installed, run nothing")
    p.add_argument("--markdown", action="store_true", help="with --subject: tables and findings with their commands")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # see worker.py
    return p


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if options.worker:
        return serve(options.seed)
    if options.coverage:
        return print_coverage()
    if options.compare:
        return difference.main(*options.compare)
    if options.aot:
        return aot.main(options.aot, options.json)
    if options.list_subjects or options.subject:
        from steepest.conformance.subjects import command

        return command.print_list() if options.list_subjects else command.main(options)
    if options.source:
        return page.main(options.html, options.source)
    try:
        cells = select(options.op, options.backend, options.dtype, options.quick)
    except re.error as error:
        print(f"validate: --op {options.op!r} is not a regular expression: {error}", file=sys.stderr)
        return 2
    if not cells:
        print("validate: no case matches; --list names them all", file=sys.stderr)
        return 2
    if options.list:
        return print_list(cells)
    begin = time.perf_counter()
    results = collect(cells, options.seed)
    written = report.to_json(results, seed=options.seed, quick=options.quick, seconds=time.perf_counter() - begin)
    if options.json == "-":
        print(report.json_text(written), end="")
    else:
        report.print_table(results, by_case=options.cases)
        if options.json:
            Path(options.json).write_text(report.json_text(written))
    if options.html:
        Path(options.html).write_text(page.render(written))
    return int(any(r.status == FAIL for r in results))


def collect(cells, seed: int) -> list[Result]:
    """All results, in the order of the cells, with progress on stderr when a person is watching."""
    place = {(c.op.name, c.backend.name, c.dtype, c.case.id): i for i, c in enumerate(cells)}
    results = list(watched(run_everywhere(cells, seed), len(cells)))
    return sorted(results, key=lambda r: place[r.op, r.backend, r.dtype, r.case])


def watched(results, total: int):
    """The same results, with a progress bar on stderr when a person is watching."""
    if not sys.stderr.isatty():
        yield from results
        return
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        for i, result in enumerate(results, 1):
            print(f"\r{i}/{total}", end="" if i < total else "\n", file=sys.stderr, flush=True)
            yield result
    else:
        yield from track(results, "validate", total=total, console=Console(stderr=True), transient=True)


def print_list(cells) -> int:
    ops = registered_ops()
    for name in dict.fromkeys(cell.op.name for cell in cells):
        op = ops[name]
        print(f"{name}\n  source    {op.source}\n  bound     {op.bound}\n  backends")
        for backend in op.backends():
            reason = "" if runs_in_worker(backend) else backend.available()
            print(f"    {backend.name:<18}  {reason or 'available'}")
        chosen = dict.fromkeys(cell.case for cell in cells if cell.op.name == name)
        print(f"  cases     {len(chosen)}")
        for case in chosen:
            print(f"    {case.id}{'' if case.quick else '  (not in --quick)'}")
    return 0


def print_coverage() -> int:
    missing = coverage()
    for line in missing:
        print(line)
    ops = registered_ops()
    cases = sum(len(op.cases) for op in ops.values())
    print(f"{len(ops)} ops, {cases} cases, {len(missing)} missing")
    return int(bool(missing))
