"""Runs cells: one op on one backend with one dtype and one case, judged."""

from __future__ import annotations

import math
import re
import time
from dataclasses import asdict, dataclass, field
from typing import Callable

import torch

from steepest.conformance.compare import bits_figure
from steepest.conformance.memory import finite_surroundings, poisoned_memory, threads
from steepest.conformance.registry import (
    COLUMNS,
    DTYPES,
    INTERPRETED,
    Backend,
    Case,
    Figure,
    Op,
    Problem,
    registered_ops,
)

OK, FAIL, UNSUPPORTED, SKIPPED = "ok", "FAIL", "unsupported", "skipped"


@dataclass(frozen=True)
class Cell:
    op: Op
    backend: Backend
    dtype: str
    case: Case

    @property
    def id(self) -> str:
        return f"{self.op.name} · {self.backend.name} · {self.dtype} · {self.case.id}"


@dataclass
class Result:
    op: str
    backend: str
    dtype: str
    case: str
    status: str
    reason: str = ""
    figures: list[Figure] = field(default_factory=list)
    seed: int = 0
    ms: float = 0.0

    @property
    def share(self) -> float:
        """Largest part of any bound used."""
        return max((f.share for f in self.figures if f.share is not None), default=0.0)

    def to_json(self) -> dict:
        """Plain JSON: numbers that JSON cannot write (inf, nan) become strings."""
        entry = {**asdict(self), "share": _json_number(self.share)}
        for figure in entry["figures"]:
            figure["value"] = _json_number(figure["value"])
        return entry

    @classmethod
    def from_json(cls, entry: dict) -> Result:
        figures = [Figure(**{**f, "value": float(f["value"])}) for f in entry["figures"]]
        return cls(**{**{k: v for k, v in entry.items() if k != "share"}, "figures": figures})


def _json_number(x: float):
    return x if math.isfinite(x) else str(x)


def select(
    op: str = "",
    backends: list[str] | None = None,
    dtypes: list[str] | None = None,
    quick: bool = False,
    ops: dict[str, Op] | None = None,
) -> list[Cell]:
    """The cells asked for.  `op` is a regular expression, searched in the op's name and in "op/case"."""
    cells = []
    for entry in (registered_ops() if ops is None else ops).values():
        for case in entry.cases:
            if op and not (re.search(op, entry.name) or re.search(op, f"{entry.name}/{case.id}")):
                continue
            if quick and not case.quick:
                continue
            for backend in entry.backends():
                if backends and backend.name not in backends:
                    continue
                if quick and backend.name == INTERPRETED and case.interpreted != "quick":
                    continue
                cells += [Cell(entry, backend, dtype, case) for dtype in case.dtypes if not dtypes or dtype in dtypes]
    order = {name: i for i, name in enumerate(COLUMNS)}
    return sorted(cells, key=lambda cell: (cell.op.name, order.get(cell.backend.name, len(order))))


def run_cell(cell: Cell, seed: int = 0) -> Result:
    """Never raises: an exception of the op is a FAIL with its message, NotImplementedError is "unsupported"."""
    result = Result(cell.op.name, cell.backend.name, cell.dtype, cell.case.id, OK, seed=seed)
    reason = cell.backend.available()
    if cell.backend.name == INTERPRETED and cell.case.interpreted == "never":
        reason = reason or "takes minutes in the interpreter"
    if reason:
        result.status, result.reason = SKIPPED, reason
        return result
    begin = time.perf_counter()
    try:
        result.figures = measure(cell, seed)
        broken = [f for f in result.figures if not f.ok]
        if broken:
            result.status = FAIL
            result.reason = "; ".join(f"{f.name} {f.value:.4g} > {f.bound:g} {f.unit}".rstrip() for f in broken)
    except NotImplementedError as error:
        result.status, result.reason = UNSUPPORTED, str(error)
    except Exception as error:  # whatever the op raises is its verdict
        result.status, result.reason = FAIL, f"{type(error).__name__}: {error}"
    result.ms = (time.perf_counter() - begin) * 1e3
    return result


def measure(cell: Cell, seed: int) -> list[Figure]:
    """The op's own figures, and those that every op owes: guard bands, repeat runs, thread count, graph replay."""
    op, backend, dtype = cell.op, cell.backend, DTYPES[cell.dtype]

    def outputs(problem):
        return op.run(backend.function, problem)

    problem = op.build(cell.case, dtype, seed, backend.device)
    with poisoned_memory():
        first = {name: x.detach().clone() for name, x in outputs(problem).items()}
    with threads(1):  # many small operations: on a busy machine waiting for a second thread took 100 times as long
        figures = list(op.judge(problem, first, backend))
    guards = list(problem.guards)

    def again(name, note):
        # Not poisoned, and other numbers around the tensors: a result that depends on either differs.
        with finite_surroundings():
            other = op.build(cell.case, dtype, seed, backend.device)
        guards.extend(other.guards)
        results = outputs(other)
        return bits_figure(name, ((first[key], results[key]) for key in first), note)

    if backend.name not in ("reference", INTERPRETED):  # these are plain torch and numpy, one thing after another
        figures.append(again("repeat", "same input, second run"))
    if backend.name == "cpu" and "threads" in op.promises:
        with threads(2 if torch.get_num_threads() == 1 else 1):
            figures.append(again("threads", "other thread count"))
    if backend.name == "cuda":  # Triton's AdamW copies tables from the host at every call, which a graph does not
        figure, captured = graph_replay(cell, seed, first, CudaGraph())
        figures.append(figure)
        guards.extend(captured.guards)
    figures.append(Figure("guards", sum(g.overwritten() for g in guards), 0, "elements", "written outside"))
    return figures


class CudaGraph:
    """Calls on the current CUDA device, captured and replayed."""

    def __init__(self):
        self.graph = torch.cuda.CUDAGraph()

    def capture(self, function: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What `function` returns: tensors that get their values by `replay`."""
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            return function()

    def replay(self) -> None:
        self.graph.replay()
        torch.cuda.synchronize()


def graph_replay(cell: Cell, seed: int, first: dict[str, torch.Tensor], graph) -> tuple[Figure, Problem]:
    """Elements in which the op, captured and replayed, differs from the eager run `first`; and the problem it ran on.

    Captured over zeros, which the input replaces before the replay: what an op computes already at capture, or reads on
    the host, is wrong then.
    """
    op, backend = cell.op, cell.backend
    captured, fresh = (op.build(cell.case, DTYPES[cell.dtype], seed, backend.device) for _ in range(2))
    for guarded in captured.guards:
        guarded.view.zero_()
    results = graph.capture(lambda: op.run(backend.function, captured))
    for guarded, given in zip(captured.guards, fresh.guards):
        guarded.view.copy_(given.view)
    graph.replay()
    pairs = ((first[name], results[name]) for name in first)
    return bits_figure("graph", pairs, "captured in a CUDA graph and replayed"), captured
