"""The conformance library itself: bounds that bound, memory that shows mistakes, a registry without holes."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.conformance import Figure, coverage, registered_ops, registry, run_cell, runner, select, validate
from steepest.conformance.bounds import Tracked, number_format
from steepest.conformance.compare import nonfinite_mismatches, worst_ulp
from steepest.conformance.memory import (
    GUARD,
    LAYOUTS,
    Guarded,
    differing,
    layout_strides,
    poisoned_memory,
    threads,
)
from steepest.conformance.runner import FAIL, OK, Cell, Result

F32 = torch.float32


def tracked(values, dtype=F32):
    return Tracked.exact(torch.tensor(values, dtype=torch.float64), dtype)


# --- running error bounds ---------------------------------------------------------------------------------------------

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=300, deadline=None)
@given(numbers, numbers, numbers, st.sampled_from(["ab+c", "(a-b)*c", "a/b-c", "sqrt(|a|)*b", "max(a*b, c)", "-a+b/c"]))
def test_float32_results_lie_within_the_tracked_bound(a, b, c, formula):
    def evaluate(a, b, c, root, maximum):
        return {
            "ab+c": lambda: a * b + c,
            "(a-b)*c": lambda: (a - b) * c,
            "a/b-c": lambda: a / b - c,
            "sqrt(|a|)*b": lambda: root(a) * b,
            "max(a*b, c)": lambda: maximum(a * b, c),
            "-a+b/c": lambda: -a + b / c,
        }[formula]()

    if formula.startswith("sqrt"):
        a = abs(a)
    with np.errstate(all="ignore"):
        computed = evaluate(np.float32(a), np.float32(b), np.float32(c), np.sqrt, np.maximum)
    bound = evaluate(tracked(a), tracked(b), tracked(c), Tracked.sqrt, Tracked.maximum)
    if bound.error.isfinite():  # else a result may overflow, or a divisor be zero: no claim
        assert abs(float(computed) - bound.value.item()) <= bound.error.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_storing_is_bounded_and_the_bound_is_reached(dtype):
    x = torch.randn(100_000)
    distance = (x.to(dtype).double() - x.double()).abs()
    bound = tracked(x.tolist()).stored(dtype).error
    assert (distance <= bound).all()
    if dtype != F32:
        assert (distance / bound).max() > 0.9  # half an ulp, so hardly wider than needed


def test_overflow_makes_no_claim_and_underflow_is_counted():
    assert tracked(3e38).__mul__(tracked(2.0)).error.isinf()
    assert (tracked(1e-30) * tracked(1e-30)).error >= number_format(F32).tiny / 2


def test_the_formats():
    assert number_format(F32).unit == 2**-24 and number_format(F32).tiny == 2**-149
    assert number_format(torch.bfloat16).unit == 2**-8 and number_format(torch.bfloat16).tiny == 2**-133
    assert number_format(torch.float16).unit == 2**-11 and number_format(torch.float16).tiny == 2**-24


def test_adamw_bounds_are_not_much_wider_than_what_float32_does():
    """A bound that no rounding ever comes near would let mistakes pass."""
    cells = select("adamw/(one step|tails|20 steps|mixed list)", ["reference"], ["float32"])
    shares = [run_cell(cell).share for cell in cells]
    assert len(shares) == 4 and all(0.25 < share <= 1 for share in shares)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_nan_is_a_fail_whatever_the_bound():
    assert not Figure("x", math.nan, 1.0).ok and not Figure("x", 1.5, 1.0).ok and Figure("x", math.nan, None).ok


def test_nonfinite_values_are_compared_by_kind_and_sign():
    exact = torch.tensor([math.nan, math.inf, -math.inf, 1.0, 1.0], dtype=torch.float64)
    assert nonfinite_mismatches(exact.float(), exact) == 0
    wrong = torch.tensor([1.0, -math.inf, math.nan, math.nan, math.inf])
    assert nonfinite_mismatches(wrong, exact) == 5
    error = torch.tensor([0, 0, 0, 0, math.inf], dtype=torch.float64)
    assert nonfinite_mismatches(wrong, exact, error) == 4


def test_ulp_is_counted_in_the_stored_format_and_from_the_scale():
    x = torch.tensor([1.0 + 2**-23, 0.5])
    assert worst_ulp(x, tracked([1.0, 0.5]), 0.0) == 1
    assert worst_ulp(torch.tensor([1e-3 + 2**-27]), tracked([float(torch.tensor(1e-3))]), 0.1) == pytest.approx(
        1, rel=1e-3
    )


def test_bits_tell_signed_zeros_apart_and_nan_payloads_not():
    a = torch.tensor([0.0, math.nan, 1.0])
    b = torch.tensor([-0.0, math.nan, 1.0])
    b.view(torch.int32)[1] |= 7
    assert differing(a, b) == 1


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (4, 6), (2, 3, 4, 5), (3, 0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_guarded_tensors_hold_their_values_and_notice_writes_outside(layout, shape, dtype):
    values = torch.randn(shape).to(dtype)
    for offset in (0, 3):
        guarded = Guarded(values, layout=layout, offset=offset)
        assert torch.equal(guarded.view, values) and guarded.view.stride() == layout_strides(shape, layout)
        assert guarded.view.storage_offset() == GUARD + offset
        guarded.view.mul_(2)
        assert guarded.overwritten() == 0
        guarded.buffer.view(dtype)[GUARD + offset - 1] = math.nan
        guarded.buffer.view(dtype)[-1] = 0
        assert guarded.overwritten() == 2


def test_gaps_between_elements_are_guarded_too():
    guarded = Guarded(torch.randn(5, 3), layout="gaps")
    guarded.buffer.view(F32)[GUARD + 1] = 0
    assert guarded.overwritten() == 1


def test_poisoned_memory_fills_and_restores():
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        assert torch.empty(100).isnan().all() and torch.empty_like(torch.ones(3, 3)).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_threads_restores():
    before = torch.get_num_threads()
    with threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


# --- graph replay, with a graph that runs on the CPU ------------------------------------------------------------------


class Graph:
    """Runs the function at capture, for the results' shapes, and `runs` times at replay."""

    runs = 1

    def capture(self, function):
        self.function, self.results = function, function()
        return self.results

    def replay(self):
        for _ in range(self.runs):
            for name, x in self.function().items():
                self.results[name].copy_(x)


class EmptyGraph(Graph):
    runs = 0


class TwiceReplayed(Graph):
    runs = 2


GRAPH_CELLS = [("adamw", "amsgrad"), ("adamw", "found_inf 1"), ("polar", "batch")]


@pytest.mark.parametrize("name, case", GRAPH_CELLS)
def test_a_replayed_graph_must_give_the_bits_of_the_eager_run(name, case, monkeypatch):
    op = registered_ops()[name]
    column = next(b for b in op.backends() if b.name == "cpu")
    on_cpu = dataclasses.replace(column, name="cuda", exact=False)
    cell = Cell(op, on_cpu, "float32", next(c for c in op.cases if c.id == case))
    found = {}
    for graph in (Graph, EmptyGraph, TwiceReplayed):
        monkeypatch.setattr(runner, "CudaGraph", graph)
        result = run_cell(cell)
        assert {f.name for f in result.figures if not f.ok} <= {"graph"}, result.reason
        found[graph] = next(f.value for f in result.figures if f.name == "graph")
    assert found[Graph] == 0
    if case != "found_inf 1":  # there nothing changes, however often it is run
        assert found[EmptyGraph] > 0
        assert (found[TwiceReplayed] > 0) == (name == "adamw")  # a second step in place


def test_graphs_are_replayed_for_cuda_only():
    cell = select("adamw/one step", ["cpu"], ["float32"])[0]
    assert "graph" not in {figure.name for figure in run_cell(cell).figures}


# --- registry ---------------------------------------------------------------------------------------------------------


def test_every_op_is_covered():
    assert coverage() == []


def test_an_op_without_cases_is_named(monkeypatch, capsys):
    registered_ops()
    empty = dataclasses.replace(registered_ops()["adamw"], name="empty", cases=())
    monkeypatch.setitem(registry._registry, "empty", empty)
    assert coverage() == ["empty: no cases"]
    assert validate.main(["--coverage"]) == 1
    assert "empty: no cases" in capsys.readouterr().out


def test_removing_an_ops_cases_uncovers_its_reference(monkeypatch):
    op = registered_ops()["adamw"]
    monkeypatch.setitem(registry._registry, "adamw", dataclasses.replace(op, cases=()))
    assert "reference.adamw_: no op covers it" in coverage()


def test_an_op_without_a_backend_or_a_dtype_is_named(monkeypatch):
    op = registered_ops()["adamw"]
    part = dataclasses.replace(
        op,
        backends=lambda: op.backends()[1:],
        cases=tuple(dataclasses.replace(case, dtypes=("float32",)) for case in op.cases),
    )
    assert coverage({"adamw": part})[:3] == [
        "adamw: no backend reference",
        "adamw: no case of dtype bfloat16",
        "adamw: no case of dtype float16",
    ]


def test_names_are_registered_once():
    with pytest.raises(ValueError, match="'adamw' is registered already"):
        registry.register(registered_ops()["adamw"])


@pytest.mark.parametrize("name", registered_ops())
def test_cases_are_named_once_and_go_into_json(name):
    op = registered_ops()[name]
    assert len({case.id for case in op.cases}) == len(op.cases)
    for case in op.cases:
        json.dumps(case.parameters(), allow_nan=False)
        assert op.bytes(case, F32) >= 0 and op.flops(case) >= 0


@pytest.mark.parametrize("name", registered_ops())
def test_building_a_case_twice_gives_the_same_bits(name):
    op = registered_ops()[name]
    for case in op.cases[:6]:
        first, second = (op.build(case, F32, 3, "cpu") for _ in range(2))
        pairs = [(a.view, b.view) for a, b in zip(first.guards, second.guards)]
        assert pairs and all(differing(a, b) == 0 for a, b in pairs)


def test_adamw_bytes_are_the_roofline():
    op = registered_ops()["adamw"]
    case = next(c for c in op.cases if c.id == "several tiles and threads")
    n = case.shapes[0][0]
    assert op.bytes(case, F32) == 28 * n and op.bytes(case, torch.bfloat16) == 14 * n
    assert op.bytes(dataclasses.replace(case, amsgrad=True), F32) == 36 * n
    assert op.bytes(dataclasses.replace(case, state_dtype="float32"), torch.bfloat16) == 22 * n


# --- what this machine can run must hold ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", registered_ops())
def test_all_cases_hold(name, backend):
    results = [run_cell(cell) for cell in select(f"^{name}$", [backend])]
    assert results and [r for r in results if r.status != OK] == []


INTERPRETED_OPS = [
    op.name
    for op in registered_ops().values()
    if any(b.exists for b in op.backends() if b.name == "triton-interpreted")
]


@pytest.mark.interpret
@pytest.mark.parametrize("name", INTERPRETED_OPS)
def test_all_quick_cases_hold_in_the_interpreter(name):
    results = [run_cell(cell) for cell in select(f"^{name}$", ["triton-interpreted"], quick=True)]
    assert any(r.status == OK for r in results)
    assert [r for r in results if r.status not in (OK, "unsupported")] == []


def test_results_survive_json():
    cell = select("adamw/one step", ["cpu"], ["float32"])[0]
    result = run_cell(cell)
    result.figures.append(Figure("odd", math.inf, 1.0))
    text = json.dumps(result.to_json(), allow_nan=False)
    assert Result.from_json(json.loads(text)) == result


def test_seeds_change_the_input():
    cell = select("adamw/one step", ["reference"], ["float32"])[0]
    assert run_cell(cell, seed=1).figures != run_cell(cell, seed=2).figures


def test_a_failing_cell_makes_validate_exit_with_1(monkeypatch, capsys):
    op = registered_ops()["adamw"]
    wrong = dataclasses.replace(
        op, backends=lambda: tuple(dataclasses.replace(b, function=lambda *a, **k: None) for b in op.backends())
    )
    monkeypatch.setitem(registry._registry, "adamw", wrong)
    assert validate.main(["--op", "adamw/one step", "--backend", "cpu", "--dtype", "float32"]) == 1
    out = capsys.readouterr().out
    assert FAIL in out and "params error/bound" in out and "(seed 0)" in out
    assert isinstance(Cell(op, op.backends()[0], "float32", op.cases[0]).id, str)
