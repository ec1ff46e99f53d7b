"""Random lists of shapes, layouts, offsets and dtypes through every rule, in guarded memory, against the reference.

A sample by default; `make fuzz` runs 10,000 examples (STEEPEST_FUZZ is their number).
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steepest.conformance import Backend, Cell, registered_ops, run_cell
from steepest.conformance.cases.rules import RULES, RuleCase
from steepest.conformance.memory import LAYOUTS
from steepest.conformance.registry import DTYPES
from steepest.conformance.runner import OK

EXAMPLES = int(os.environ.get("STEEPEST_FUZZ", "150"))
dimensions = st.one_of(st.integers(0, 5), st.integers(6, 40))
shapes = st.lists(dimensions, max_size=4).filter(lambda shape: len(shape) < 2 or _size(shape) < 5000).map(tuple)


def _size(shape) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


@st.composite
def cells(draw):
    rule = draw(st.sampled_from(sorted(RULES)))
    op = registered_ops()[rule]
    model = draw(st.sampled_from([case for case in op.cases if case.values == "usual"]))
    roles = 2 + len(model.states)
    case = RuleCase(
        "fuzz",
        states=model.states,
        hyper=model.hyper,
        shapes=tuple(draw(st.lists(shapes, min_size=1, max_size=6))),
        layouts=tuple(draw(st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=1, max_size=roles))),
        offsets=tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=roles))),
        steps=draw(st.integers(1, 2)),
        first_step=draw(st.sampled_from([1, 2, 10, 100_000])),
        grad_scale=draw(st.sampled_from([None, 1.0, 3.0, 65536.0])),
        clip_coefficient=draw(st.sampled_from([None, 1.0, 0.37])),
        found_inf=draw(st.sampled_from([None, 0.0, 1.0])),
        grad_dtype=draw(st.sampled_from([None, *DTYPES])),
        state_dtype=draw(st.sampled_from([None, *DTYPES])),
    )
    cpu = next(backend for backend in op.backends() if backend.name == "cpu")
    return Cell(op, Backend("cpu", cpu.function), draw(st.sampled_from(sorted(DTYPES))), case)


@settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=EXAMPLES < 1000
)
@given(cells())
def test_any_list_equals_the_reference(cell):
    result = run_cell(cell)
    assert (result.status, result.reason) == (OK, ""), result
