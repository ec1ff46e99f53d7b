"""Wrong inverse roots given to the conformance cases as a backend: every one must FAIL."""

from __future__ import annotations

import pytest
import torch

from steepest.conformance import Backend, Cell, registered_ops, run_cell
from steepest.conformance.runner import FAIL, OK
from steepest.matrix import roots
from steepest.matrix.root_plan import plan
from steepest.matrix.roots import RootStatus, inverse_root
from steepest.matrix.verbs import TorchVerbs

OP = registered_ops()["inverse_root"]


class Tf32Verbs(TorchVerbs):
    """Operands cut to 10 explicit bits, sums in float32."""

    def symmetric_product(self, a, b, **options):
        if a.dtype == torch.float64:
            return super().symmetric_product(a, b, **options)
        a, b = (((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for x in (a, b))
        return super().symmetric_product(a, b, **options)


def through_verbs(a, verbs, **options):
    todo = plan(a.shape, a.dtype, "cpu", **options)
    flat = a.reshape(-1, *a.shape[-2:])
    x, status = roots.execute(flat, todo, options["ridge"], options["absolute"], verbs)
    return x.to(a.dtype).reshape(a.shape), RootStatus(*(field.reshape(a.shape[:-2]) for field in status))


def variant(mutation):
    def function(a, **options):
        if mutation == "TF32 products":
            return through_verbs(a, Tf32Verbs(), **options)
        if mutation == "ridge halved":
            options["ridge"] /= 2
        if mutation == "ridge ten times":
            options["ridge"] *= 10
        if mutation == "wrong order":
            options["p"] = 2 if options["p"] == 4 else 4
        if mutation == "tolerance 0.1":
            options["tol"] = 0.1
        if mutation == "ridge written into the input":
            a.diagonal(dim1=-2, dim2=-1).add_(1e-3)
        x, status = inverse_root(a, return_status=True, **options)
        ok, iterations, residual, scale = status
        if mutation == "scale four times":
            scale = scale * 4
        if mutation == "everything is ok":
            ok = torch.ones_like(ok)
        if mutation == "nothing is ok":
            ok = torch.zeros_like(ok)
        if mutation == "failed blocks are zero":
            x = x.nan_to_num(0.0)
        if mutation == "one scale for the batch":
            x = x * (scale / scale.nan_to_num(0).mean())[..., None, None] ** (1 / options["p"])
        if mutation == "one triangle":
            x = x.tril()
        if mutation == "last row not written":
            x = x.clone()
            x[..., -1, :] = torch.nan
        if mutation == "float32 result":
            x = x.float()
        if mutation == "1 percent too large":
            x = 1.01 * x
        return x, RootStatus(ok, iterations, residual, scale)

    return function


def run(mutation: str, dtype: str, case: str):
    chosen = next(c for c in OP.cases if c.id == case)
    return run_cell(Cell(OP, Backend("cpu", variant(mutation)), dtype, chosen))


BAD_BLOCKS = "NaN, zero, indefinite and inf among six"


@pytest.mark.parametrize("case", ["clustered, n 48", "statistic, n 48", "batch", BAD_BLOCKS, "huge, n 48", "n 1"])
def test_without_a_mutation_cases_pass(case):
    result = run("", "float32", case)
    assert (result.status, result.reason) == (OK, "")


MUTANTS = [
    ("TF32 products", "float32", "log-uniform 1e-6, ridge 0.001", "rounding"),
    ("ridge halved", "float32", "statistic, ridge 0.001", "root error"),
    ("ridge ten times", "float32", "rank deficient, ridge 0.0001", "root error"),
    ("wrong order", "float32", "clustered, n 48", "root error"),
    ("tolerance 0.1", "float32", "rank one, ridge 0.001", "root error"),
    ("tolerance 0.1", "float32", "tol 1e-6", "rounding"),
    ("ridge written into the input", "float32", "clustered, n 48", "input unchanged"),
    ("scale four times", "float32", "clustered, n 48", "scale too large"),
    ("everything is ok", "float32", BAD_BLOCKS, "status"),
    ("nothing is ok", "float32", "batch", "status"),
    ("failed blocks are zero", "float32", BAD_BLOCKS, "non-finite"),
    ("one scale for the batch", "float32", "batch", "root error"),
    ("one triangle", "float32", "clustered, n 48", "asymmetry"),
    ("last row not written", "float32", "n 17", "non-finite"),
    ("float32 result", "bfloat16", "clustered, 16 bit", "shape and dtype"),
    ("1 percent too large", "float32", "n 64", "rounding"),
]


@pytest.mark.parametrize("mutation, dtype, case, figure", MUTANTS)
def test_a_mutant_fails_in_the_figure_that_should_see_it(mutation, dtype, case, figure):
    result = run(mutation, dtype, case)
    assert result.status == FAIL
    assert figure in [f.name for f in result.figures if not f.ok]


def test_a_root_that_depends_on_its_neighbours_fails():
    def neighbours(a, **options):
        x, status = inverse_root(a, return_status=True, **options)
        return x + 1e-7 * x.nanmean(), status

    case = next(c for c in OP.cases if c.id == "batch")
    result = run_cell(Cell(OP, Backend("cpu", neighbours), "float32", case))
    assert "neighbours" in [f.name for f in result.figures if not f.ok]


def test_costs():
    case = next(c for c in OP.cases if c.id == "clustered, n 48")
    assert OP.bytes(case, torch.float32) == 2 * 4 * 48 * 48
    assert OP.flops(case) == 22 * 48**3  # half of 2 n^3 each
