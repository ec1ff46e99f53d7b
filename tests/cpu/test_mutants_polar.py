"""Wrong polar factors given to the conformance cases as a backend: every one must FAIL."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from steepest import reference
from steepest.conformance import Backend, Cell, registered_ops, run_cell
from steepest.conformance.runner import FAIL, OK
from steepest.schedules import NORM_MARGIN, minimax, named

OP = registered_ops()["polar"]


def product(a, b, mutation):
    if mutation == "TF32 products":  # operands cut to 10 explicit bits, sums in float32
        a, b = (((x.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for x in (a, b))
    return a @ b


def variant(x, *, schedule, steps, lower, tol, norm="auto", mutation=""):
    """The plain form written once more, with switches for the mistakes that people make."""
    if mutation in ("result not written", "last row not written"):
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        if mutation == "last row not written":
            y[..., :-1, :] = variant(x, schedule=schedule, steps=steps, lower=lower, tol=tol)[..., :-1, :]
        return y
    chosen = minimax(2, lower**2, tol=tol) if tol else named(schedule, steps) if schedule != "minimax" else None
    rows = (chosen or minimax(2, lower**2, steps=steps)).coefficients
    if mutation == "sign of a coefficient":
        rows = [*rows[:-1], (rows[-1][0], -rows[-1][1], rows[-1][2])]
    rows = rows[: -1 if mutation == "last step dropped" else None]
    rows = rows[::-1] if mutation == "steps in reverse" else rows

    dtype, tall = x.dtype, x.shape[-2] > x.shape[-1]
    y = (x.mT if tall and mutation != "wide only" else x).float()
    if mutation != "squares may overflow":
        largest = y.abs().amax((-2, -1), keepdim=True)
        y = y / largest.where(largest != 0, 1)
    norm = torch.linalg.matrix_norm(y, keepdim=True)
    if mutation == "one norm for the batch":
        norm = norm.square().sum().sqrt()
    if mutation == "largest element for norm":
        norm = y.abs().amax((-2, -1), keepdim=True)
    if mutation != "zero divided by zero":
        norm = norm.where(norm != 0, 1)
    y = y / (norm * (1 + NORM_MARGIN))
    for a, b, c in rows:
        gram = product(y, y.mT, mutation)
        if mutation == "upper triangle stale":
            gram = gram.tril()
        square = product(gram, gram, mutation)
        y = a * y + product(b * gram + c * square, y, mutation)
    y = y.mT if tall and mutation != "wide only" else y
    if mutation == "transposed" and y.shape[-1] == y.shape[-2]:
        y = y.mT
    if mutation == "negated":
        y = -y
    if mutation == "input changed":
        x.mul_(1)[..., :1, :1] += 1
    return y.contiguous() if mutation == "float32 result" else y.to(dtype).contiguous()


def run(mutation: str, dtype: str, case: str):
    def function(x, **options):
        return variant(x, mutation=mutation, **options)

    chosen = next(c for c in OP.cases if c.id == case)
    # Called a reference because it is planned like one: in the plain form.
    return run_cell(Cell(OP, Backend("reference", function), dtype, chosen))


PASSING = ["gaussian, 48 x 48", "huge, 48 x 48", "zero, 48 x 48", "33 x 65", "65 x 33", "1 x 17", "batch",
           "NaN in one of three", "minimax, 6 steps, from 1e-4", "tol 1e-5", "layout transposed"]  # fmt: skip


@pytest.mark.parametrize("case", PASSING)
def test_without_a_mutation_cases_pass(case):
    result = run("", "float32", case)
    assert (result.status, result.reason) == (OK, "")


MUTANTS = [
    ("sign of a coefficient", "float32", "gaussian, 48 x 48", "rounding"),
    ("sign of a coefficient", "bfloat16", "gaussian, 48 x 48, 16 bit", "rounding"),
    ("last step dropped", "float32", "gaussian, 48 x 48", "rounding"),
    ("last step dropped", "float16", "48 x 160", "rounding"),
    ("last step dropped", "float32", "polar-express, 8 steps", "rounding"),
    ("steps in reverse", "float32", "gaussian, 48 x 48", "rounding"),
    ("transposed", "float32", "gaussian, 48 x 48", "asymmetry"),
    ("transposed", "bfloat16", "exponential, 48 x 48, 16 bit", "method"),
    ("negated", "float32", "gaussian, 48 x 48", "negative part"),
    ("negated", "float32", "1 x 1", "dual gap"),
    ("TF32 products", "float32", "gaussian, 48 x 48", "rounding"),
    ("TF32 products", "float32", "33 x 65", "rounding"),
    ("one norm for the batch", "float32", "batch", "rounding"),
    ("one norm for the batch", "float32", "NaN in one of three", "non-finite"),
    ("largest element for norm", "float32", "orthogonal, 48 x 48", "non-finite"),
    ("squares may overflow", "float32", "huge, 48 x 48", "rounding"),
    ("squares may overflow", "float32", "tiny, 48 x 48", "rounding"),
    ("zero divided by zero", "float32", "zero, 48 x 48", "non-finite"),
    ("upper triangle stale", "float32", "gaussian, 48 x 48", "rounding"),
    ("result not written", "float32", "33 x 65", "non-finite"),
    ("last row not written", "float32", "65 x 33", "non-finite"),
    ("input changed", "float32", "gaussian, 48 x 48", "input unchanged"),
    ("float32 result", "bfloat16", "gaussian, 48 x 48, 16 bit", "shape and dtype"),
]


@pytest.mark.parametrize("mutation, dtype, case, figure", MUTANTS)
def test_a_mutant_fails_in_the_figure_that_should_see_it(mutation, dtype, case, figure):
    result = run(mutation, dtype, case)
    assert result.status == FAIL
    assert figure in [f.name for f in result.figures if not f.ok]


def test_a_matrix_that_depends_on_its_neighbours_fails():
    def neighbours(x, **options):
        y = reference.polar(x, **options)
        return y + 1e-7 * y.nanmean()

    case = next(c for c in OP.cases if c.id == "batch")
    result = run_cell(Cell(OP, Backend("cpu", neighbours), "float32", case))
    assert "neighbours" in [f.name for f in result.figures if not f.ok]


def test_half_precision_that_blows_up_fails_although_its_rounding_is_as_expected():
    """Rounding bounds follow the plan that is executed; the limit of 2 on singular values does not."""
    case = next(c for c in OP.cases if c.id == "gaussian, 48 x 48")

    def scaled(x, **options):
        return 2.5 * reference.polar(x, **options)

    result = run_cell(Cell(OP, Backend("reference", scaled), "float32", case))
    assert "overshoot" in [f.name for f in result.figures if not f.ok]


def test_cost_counts_reads_writes_and_the_cheaper_form():
    case = dataclasses.replace(OP.cases[0], m=256, n=1024)
    assert OP.bytes(case, torch.bfloat16) == 2 * 2 * 256 * 1024
    plain = 5 * (1.5 * 4 + 0.5) * 2 * 256**3  # the docstring of steepest.polar, T = 5, alpha = 4, s = 1/2
    assert OP.flops(case) < plain
