"""python -m steepest bench: the benchmarks of the source tree, run by pytest, as one table."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

HEADER = (
    "case",
    "ours, ms",
    "fastest peer",
    "its ms",
    "ratio (quartiles)",
    "in a loop, ms",
    "rate",
    "of measured peak",
)


def main(argv: list[str] | None = None) -> int:
    from steepest.info import checkout

    options = parse(argv)
    root = checkout()
    if root is None or not (root / "bench").is_dir():
        print("bench: the benchmarks are in the source tree (bench/), not in the installed package;", file=sys.stderr)
        print("       clone the repository, `pip install -e .[dev]` there, and run this again.", file=sys.stderr)
        return 2
    try:
        import pytest  # noqa: F401
        import pytest_benchmark  # noqa: F401
    except ImportError as error:
        print(f"bench: {error.name} is not installed: pip install pytest pytest-benchmark", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        file = Path(options.json or Path(folder) / "bench.json").resolve()
        status = run(root, file, options)
        if file.exists() and file.stat().st_size:
            print_table(root, file)
    return status


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m steepest bench",
        description="Run bench/ of the source tree: ours and the peers in turn, correctness first. Further options are "
        "those of `pytest bench`.",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: under a minute on two idle cores")
    parser.add_argument(
        "--separate",
        action="store_true",
        help="each benchmark in a process of its own: where others have used the heap before, the objects of many "
        "tensors lie scattered, and take longer to visit than those of a training that has just begun",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: all there are")
    parser.add_argument("--seconds", type=float, help="of timing per benchmark; at least 7 rounds are run")
    parser.add_argument("--json", metavar="FILE", help="keep pytest-benchmark's file, for compare.py and table.py")
    parser.add_argument("-k", metavar="EXPRESSION", default="", help="run what matches, as in pytest -k")
    return parser.parse_args(argv)


def run(root: Path, file: Path, options: argparse.Namespace) -> int:
    """The exit status of pytest, whose output is kept back unless something fails."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)  # of an earlier run, which would be shown as this one's
    arguments = ["--rootdir", str(root), "-c", str(root / "pyproject.toml"), "-q", "-p", "no:cacheprovider"]
    arguments += ["--scale", "quick" if options.quick else "full", "--device", options.device]
    arguments += [] if options.seconds is None else ["--seconds", str(options.seconds)]
    chosen = [*arguments, "-k", options.k, str(root / "bench")]
    # pytest takes over the descriptors of stdout and stderr; progress goes to a copy of the latter.
    with os.fdopen(os.dup(2), "w") as screen, progress(screen) as watch:
        if options.separate:
            status, output = run_separately(root, file, arguments, chosen, watch)
        else:
            status, output = run_here([*chosen, f"--benchmark-json={file}"], watch)
    if status == NO_TESTS_COLLECTED:
        print(f"bench: no benchmark matches -k {options.k!r}", file=sys.stderr)
    elif status:
        print(output, file=sys.stderr)
    else:
        print("\n".join(line for line in output.splitlines() if line.startswith("SKIPPED")))
    return status


NO_TESTS_COLLECTED = 5  # pytest.ExitCode's, without importing pytest


def run_here(arguments: list[str], *plugins) -> tuple[int, str]:
    """pytest in this process: exit status and output."""
    import pytest

    kept = io.StringIO()
    with redirect_stdout(kept), redirect_stderr(kept):
        status = int(pytest.main(arguments, plugins=list(plugins)))
    return status, kept.getvalue()


class Names:
    """pytest plugin: the tests that were collected."""

    def pytest_collection_finish(self, session):
        self.found = [item.nodeid for item in session.items]


def run_separately(root: Path, file: Path, arguments: list[str], chosen: list[str], watch: Watch) -> tuple[int, str]:
    """The same with a process for each benchmark; goes on after a failure, whose status it returns."""
    names = Names()
    status, output = run_here([*chosen, "--collect-only"], names)
    if status:
        return status, output
    parts, outputs = [], []
    with tempfile.TemporaryDirectory() as folder:
        for k, name in enumerate(names.found):
            watch.show(k, len(names.found), name.split("::")[-1])
            part = Path(folder) / f"{k}.json"
            command = [sys.executable, "-m", "pytest", *arguments, f"--benchmark-json={part}", name]
            done = subprocess.run(command, cwd=root, capture_output=True, text=True)
            status = status or done.returncode
            outputs.append(done.stdout + done.stderr)
            if part.exists() and part.stat().st_size:  # empty where it was skipped
                parts.append(json.loads(part.read_text()))
                file.write_text(json.dumps(joined(parts)))  # each time, for a run that is cut short
    return status, "\n".join(outputs)


def joined(parts: list[dict]) -> dict:
    """One file of pytest-benchmark's kind; what the machine can do is the median over the processes."""
    machine = dict(parts[0]["machine_info"])
    for rate in ("copy_GB_per_s", "matmul_GFLOP_per_s"):
        machine[rate] = statistics.median(part["machine_info"][rate] for part in parts)
    machine["separate"] = True
    benchmarks = [benchmark for part in parts for benchmark in part["benchmarks"]]
    return {**parts[0], "machine_info": machine, "benchmarks": benchmarks}


class Watch:
    """pytest plugin: calls `show(done, total, name)` before each benchmark and after the last one."""

    def __init__(self, show):
        self.show, self.done, self.total = show, 0, 0

    def pytest_collection_finish(self, session):
        self.total = len(session.items)

    def pytest_runtest_logstart(self, nodeid, location):
        self.show(self.done, self.total, nodeid.split("::")[-1])

    def pytest_runtest_logfinish(self, nodeid, location):
        self.done += 1
        self.show(self.done, self.total, "")


@contextmanager
def progress(screen):
    """A Watch that draws a bar where a person is watching; drawn between benchmarks only, never during one."""
    if not screen.isatty():
        yield Watch(lambda done, total, name: None)
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield Watch(lambda done, total, name: name and print(f"{done + 1}/{total} {name}", file=screen, flush=True))
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(file=screen), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("collecting", total=None)

        def show(done, total, name):
            bar.update(task, completed=done, total=total, description=name, refresh=True)

        yield Watch(show)


def print_table(root: Path, file: Path) -> None:
    """One line per benchmark, by bench/table.py, which also renders README's."""
    spec = importlib.util.spec_from_file_location("steepest_bench_table", root / "bench" / "table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    content = table.read(file)
    rows = [table.row(entry["figures"]) for entry in content["benchmarks"] if table.in_table(entry["figures"])]
    if rows:
        print_rows(rows)
    print("\n".join(table.scaling_sentences(content)))
    print(f"copy {content['copy_GB_per_s']:.1f} GB/s, matmul {content['matmul_GFLOP_per_s']:.0f} GFLOP/s, measured")


def print_rows(rows: list) -> None:
    cells = [
        (
            r.case,
            f"{r.ours_ms:.4g}",
            r.peer,
            "–" if r.peer_ms is None else f"{r.peer_ms:.4g}",
            r.ratio_text,
            r.loop_text,
            r.rate,
            r.peak,
        )
        for r in rows
    ]
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        for line in (HEADER, *cells):
            print("  ".join(line))
    else:
        view = Table(show_edge=False, pad_edge=False)
        for i, name in enumerate(HEADER):
            view.add_column(name, justify="left" if i in (0, 2) else "right")
        for cell, r in zip(cells, rows):
            style = (
                "" if r.ratio is None or r.quartiles[0] <= 1 <= r.quartiles[1] else "green" if r.ratio > 1 else "red"
            )
            view.add_row(*(Text(text, style=style if i == 4 else "") for i, text in enumerate(cell)))
        Console(width=None if sys.stdout.isatty() else 160).print(view)
