"""Cells in another process: Triton chooses its interpreter when kernels are decorated, once in a process.

The worker prints one JSON line per result, so that the parent shows progress and loses little if the worker dies.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator

from steepest.conformance.backends import interpreting, triton_installed
from steepest.conformance.registry import INTERPRETED, Backend, registered_ops
from steepest.conformance.runner import FAIL, Cell, Result, run_cell


def runs_in_worker(backend: Backend) -> bool:
    return backend.name == INTERPRETED and triton_installed() and not interpreting()


class Worker:
    """Starts at once and works beside the parent.  One thread, as the parent needs the other core."""

    def __init__(self, cells: list[Cell], seed: int):
        self.cells, self.seed = cells, seed
        self.process = subprocess.Popen(
            [sys.executable, "-m", "steepest", "validate", "--worker", "--seed", str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.errors: deque[str] = deque(maxlen=20)
        self.readers = [threading.Thread(target=target, daemon=True) for target in (self._read, self._read_errors)]
        for reader in self.readers:
            reader.start()
        try:
            with self.process.stdin as pipe:
                json.dump([[c.op.name, c.backend.name, c.dtype, c.case.id] for c in cells], pipe)
        except BrokenPipeError:
            pass  # it died at once; `rest` says so for every cell
        self.arrived_count = 0

    def _read(self):
        for line in self.process.stdout:
            if line.startswith("{"):  # anything else is a library talking
                self.lines.put(line)
        self.lines.put(None)

    def _read_errors(self):
        self.errors.extend(self.process.stderr)

    def arrived(self) -> Iterator[Result]:
        """Results that are there already."""
        while not self.lines.empty():
            line = self.lines.get()
            if line is None:
                self.lines.put(None)
                return
            self.arrived_count += 1
            yield Result.from_json(json.loads(line))

    def rest(self) -> Iterator[Result]:
        """All remaining results; a FAIL for each that a dead worker did not deliver."""
        while (line := self.lines.get()) is not None:
            self.arrived_count += 1
            yield Result.from_json(json.loads(line))
        code = self.process.wait()
        for reader in self.readers:
            reader.join()
        for cell in self.cells[self.arrived_count :]:
            message = f"the worker process ended with status {code}: {' '.join(self.errors)[-400:].strip()}"
            yield Result(cell.op.name, cell.backend.name, cell.dtype, cell.case.id, FAIL, message, seed=self.seed)


def run_everywhere(cells: list[Cell], seed: int) -> Iterator[Result]:
    """Results of all cells as they come: interpreted Triton in a worker, everything else here."""
    there = [cell for cell in cells if runs_in_worker(cell.backend)]
    worker = Worker(there, seed) if there else None
    for cell in cells:
        if not runs_in_worker(cell.backend):
            yield run_cell(cell, seed)
            if worker:
                yield from worker.arrived()
    if worker:
        yield from worker.rest()


def serve(seed: int) -> int:
    """The worker's side: cell names as JSON on stdin, results as JSON lines on stdout."""
    ops = registered_ops()
    for name, backend, dtype, case in json.load(sys.stdin):
        op = ops[name]
        cell = Cell(
            op, next(b for b in op.backends() if b.name == backend), dtype, next(c for c in op.cases if c.id == case)
        )
        print(json.dumps(run_cell(cell, seed).to_json()), flush=True)
    return 0
