"""The ops as subjects see them: the registered cases, their columns beside ours, and how each column is judged."""

from __future__ import annotations

from dataclasses import replace
from typing import Callable

import torch

from steepest.conformance.cases import adamw, polar
from steepest.conformance.registry import Backend, Figure, Op, Problem
from steepest.conformance.subjects import adamw_judge, polar_judge
from steepest.conformance.subjects.base import Subject

OURS = ("cpu", "triton", "cuda")  # columns beside a subject's; our reference and interpreter add nothing there
LARGEST = 40_000  # elements: a CPU without bfloat16 units multiplies it at 1 GFLOP/s


def ours(op: Op) -> list[Backend]:
    """Those of our columns that run on this machine."""
    return [b for b in op.backends() if b.name in OURS and not b.available()]


def adamw_op(subjects: list[Subject]) -> Op:
    return replace(
        adamw.OP, backends=lambda: (*ours(adamw.OP), *subjects), judge=_judged_by(adamw.judge, adamw_judge.judge)
    )


def _judged_by(ours: Callable, theirs: Callable) -> Callable:
    def judge(problem: Problem, outputs: dict[str, torch.Tensor], backend: Backend) -> list[Figure]:
        return (theirs if isinstance(backend, Subject) else ours)(problem, outputs, backend)

    return judge


def polar_op(subjects: list[Subject]) -> Op:
    """All cases that leave the schedule open, with the one schedule that these subjects use."""
    schedule = subjects[0].function.schedule
    default = polar.PolarCase("").schedule
    cases = tuple(
        replace(case, schedule=schedule, steps=schedule.steps)
        for case in polar.CASES
        if (case.schedule, case.steps, case.tol, case.norm) == (default, polar.PolarCase("").steps, None, "auto")
        and case.m * case.n <= LARGEST
    )
    return replace(
        polar.OP,
        name=f"polar, {schedule.name}",
        cases=cases,
        backends=lambda: (*ours(polar.OP), *subjects),
        judge=_judged_by(polar.judge, polar_judge.judge),
    )


def ops_of(subjects: list[Subject]) -> dict[str, Op]:
    """By name: "adamw", and "polar, SCHEDULE" for each schedule that a subject uses."""
    found = {}
    if chosen := [s for s in subjects if s.op == "adamw"]:
        found["adamw"] = adamw_op(chosen)
    polars = [s for s in subjects if s.op == "polar"]
    for schedule in dict.fromkeys(s.function.schedule for s in polars):
        op = polar_op([s for s in polars if s.function.schedule == schedule])
        found[op.name] = op
    return found
