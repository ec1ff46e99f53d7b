"""gram-newton-schulz: its torch code, not compiled, which works in float16; its CUDA kernels are not run here."""

from __future__ import annotations

import torch
from gram_newton_schulz import POLAR_EXPRESS_COEFFICIENTS, GramNewtonSchulz, StandardNewtonSchulz
from torch import Tensor

from steepest.conformance.subjects import polar_judge
from steepest.conformance.subjects.base import PolarAdapter, Subject
from steepest.schedules import Schedule

# Its default: Polar Express with a safety factor of 1.05 on all five steps.
SCHEDULE = Schedule(tuple(map(tuple, POLAR_EXPRESS_COEFFICIENTS)), 2, 1e-6, 1.0, "polar-express / 1.05")


class Orthogonalizer(PolarAdapter):
    def __init__(self, make):
        super().__init__(SCHEDULE)
        self.make = make(ns_use_kernels=False, compile_kwargs=None)

    def polar(self, x: Tensor) -> Tensor:
        return self.make(x)


def _gram_unless_square(x, verbs, schedule):
    square = x.shape[-2] == x.shape[-1]
    return (polar_judge.newton_schulz if square else polar_judge.gram_newton_schulz)(x, verbs, schedule)


def implementations() -> list[Subject]:
    subjects = []
    for make, algorithm in ((GramNewtonSchulz, _gram_unless_square), (StandardNewtonSchulz, polar_judge.newton_schulz)):
        how = polar_judge.Arithmetic(torch.float16, algorithm, norm_dtype=torch.float32, added=1e-7)
        note = f"gram_newton_schulz.{make.__name__}(ns_use_kernels=False, compile_kwargs=None)"
        subjects.append(Subject(make.__name__, Orthogonalizer(make), op="polar", arithmetic=how, note=note))
    return subjects
