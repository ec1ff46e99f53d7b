"""A library in a process of its own, started again after a crash: a subject may print, overwrite memory, hang or die.

python -m steepest.conformance.subjects.isolate LIBRARY writes one line of JSON that describes the library, then answers
each line of JSON on stdin that names a cell with its result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass

from steepest.conformance.registry import Op
from steepest.conformance.runner import FAIL, Cell, Result, run_cell
from steepest.conformance.subjects import LIBRARIES
from steepest.conformance.subjects.base import Subject
from steepest.schedules import Schedule

# Against hanging only: the slowest cell of torch takes 1.1 s, its import 2 s on two busy cores.
SECONDS = 120


class LibraryUnusable(Exception):
    """It is installed but cannot be imported, or has not what its adapter needs."""


@dataclass(frozen=True)
class Remote:
    """Stands for an adapter that lives in the other process."""

    schedule: Schedule | None


class RemoteLibrary:
    """`subjects` has the columns' descriptions; `run` a cell's result, a FAIL when the process died of it or gave none
    within SECONDS.  A library that does not start again afterwards FAILs what is left."""

    def __init__(self, name: str):
        self.name, self.lost = name, ""
        self._start()

    def _start(self) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.late = False
        described = self._answer()
        if described is None:
            raise LibraryUnusable(f"{self.name}: {self._last_words()}")
        self.subjects = [_placed(**entry) for entry in described]

    def run(self, cell: Cell, seed: int) -> Result:
        request = dict(op=cell.op.name, column=cell.backend.name, dtype=cell.dtype, case=cell.case.id, seed=seed)
        words = self.lost
        if not words:
            try:
                self.process.stdin.write(json.dumps(request) + "\n")
                self.process.stdin.flush()
                answer = self._answer()
            except BrokenPipeError:
                answer = None
            if answer is not None:
                return Result.from_json(answer)
            words = self._last_words()
            try:
                self._start()
            except LibraryUnusable as error:
                self.lost = f"not run, for it did not start again after a crash: {error}"
        return Result(cell.op.name, cell.backend.name, cell.dtype, cell.case.id, FAIL, words, seed=seed)

    def _answer(self):
        """What the process answers; None when it ended, or was ended because it took too long."""
        watchdog = threading.Timer(SECONDS, self._end_late)
        watchdog.start()
        line = self.process.stdout.readline()
        watchdog.cancel()
        return json.loads(line) if line.endswith("\n") else None

    def _end_late(self) -> None:
        self.late = True
        self.process.kill()

    def _last_words(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        ended = f"ended with signal {-code}" if code < 0 else f"ended with status {code}"
        ended = f"gave no answer within {SECONDS} s" if self.late else ended
        text = f"its process {ended}: {self.errors.read()[-400:].strip()}"
        self.close()
        return text

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            with suppress(BrokenPipeError):  # a request that a dead process did not take
                stream.close()
        self.process.wait()


def _described(subject: Subject) -> dict:
    schedule = getattr(subject.function, "schedule", None)
    return dict(
        name=subject.name,
        op=subject.op,
        device=subject.device,
        note=subject.note,
        schedule=schedule
        and dict(coefficients=schedule.coefficients, lower=schedule.lower, upper=schedule.upper, name=schedule.name),
    )


def _placed(schedule: dict | None, **rest) -> Subject:
    if schedule is not None:
        rows = tuple(tuple(row) for row in schedule.pop("coefficients"))
        schedule = Schedule(rows, 2, **schedule)
    return Subject(function=Remote(schedule), **rest)


def serve(name: str) -> int:
    """The other side.  Results go to the real stdout; what the library prints, also from C, goes to stderr."""
    from steepest.conformance.subjects.ops import ops_of

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    subjects = LIBRARIES[name].implementations()
    print(json.dumps([_described(s) for s in subjects]), file=out, flush=True)
    ops = ops_of(subjects)
    for line in sys.stdin:
        request = json.loads(line)
        seed = request.pop("seed")
        result = run_cell(cell_named(ops, **request), seed)
        print(json.dumps(result.to_json()), file=out, flush=True)
    return 0


def cell_named(ops: dict[str, Op], *, op: str, column: str, dtype: str, case: str) -> Cell:
    found = ops[op]
    backend = next(b for b in found.backends() if b.name == column)
    return Cell(found, backend, dtype, next(c for c in found.cases if c.id == case))


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1]))
