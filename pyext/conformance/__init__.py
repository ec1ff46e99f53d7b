"""Conformance: does an op hold its contract here?  Cases, matrix zoo, derived bounds, the validate command.

registry     what an op brings: cases, backends, bound, costs; one file per op under cases/
zoo          seeded matrices with known spectra, and polar metrics that need no SVD;  recorded: gradients as data
bounds       running error analysis: an op's own reference gives its error bound
memory       layouts, guard bands, poisoned allocations
compare      figures from results
runner       one cell: build, run, judge, repeat;  worker: cells that need Triton's interpreter
validate     the command line;  report: table and JSON;  records: results in a report
difference   of two reports;  page: a report as HTML;  aot: what the compilers make of the kernels
subjects     other libraries through the same cases
"""

from __future__ import annotations

from .registry import Backend, Case, Figure, Op, Problem, coverage, register, registered_ops
from .runner import Cell, Result, run_cell, select

__all__ = [
    "Backend",
    "Case",
    "Cell",
    "Figure",
    "Op",
    "Problem",
    "Result",
    "coverage",
    "register",
    "registered_ops",
    "run_cell",
    "select",
]
