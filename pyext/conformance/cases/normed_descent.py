"""Steepest descent under a norm: cases, bound, costs.

Bound, per tensor, with D the exact direction, s = 1 (normalized) or the dual norm of g, u = 2^-24 and u_p that of the
parameter's dtype.  Decay, product, sum round once each, relative to |p| + lr s; D and s are each within eight roundings
of sums taken in float32 pairwise or float64 (l2, linf), so an element is within

    4 u (|p| + lr s) + 16 u lr s + u_p (|p| + lr s).

"spectral" replaces D by the polynomial of the polar factor's schedule, whose certificate E bounds every |1 - s'| and
with it the spectral norm of the difference: lr s E comes on top.  Not normalized, s = <g, D> is off by as much,
relatively: lr s ((1 + E)^2 - 1).  Inputs are Gaussian matrices with an aspect ratio that keeps their smallest singular
value above the schedule's bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from steepest import reference
from steepest.conformance.backends import native_cuda_missing
from steepest.conformance.memory import Guarded
from steepest.conformance.registry import Backend, Case, Figure, Op, Problem, register
from steepest.matrix.polar import plan
from steepest.reference.normed_descent import as_matrix, direction


@dataclass(frozen=True)
class NormCase(Case):
    norm: str = "l2"
    normalized: bool = True
    shapes: tuple[tuple[int, ...], ...] = ((24, 40), (60, 20), (33,), (4, 5, 6), (), (0, 3))
    lr: float = 0.1
    weight_decay: float = 0.1
    maximize: bool = False
    zero: bool = False  # gradients

    def options(self) -> dict:
        names = ("norm", "normalized", "lr", "weight_decay", "maximize")
        return {name: getattr(self, name) for name in names}


NORMS = ("l2", "linf", "spectral")
CASES = (
    *(NormCase(norm, norm=norm) for norm in NORMS),
    *(NormCase(f"{norm}, not normalized", norm=norm, normalized=False) for norm in NORMS),
    *(NormCase(f"{norm}, maximize", norm=norm, maximize=True) for norm in NORMS),
    *(NormCase(f"{norm}, zero gradients", norm=norm, zero=True) for norm in NORMS),
)


def build(case: NormCase, dtype: torch.dtype, seed: int, device: str = "cpu") -> Problem:
    generator = torch.Generator().manual_seed(seed)
    params, grads = ([torch.randn(shape, generator=generator).to(dtype) for shape in case.shapes] for _ in range(2))
    grads = [torch.zeros_like(g) for g in grads] if case.zero else grads
    placed = {
        name: [Guarded(x, device=device) for x in lists] for name, lists in (("params", params), ("grads", grads))
    }
    tensors = {name: [g.view for g in guards] for name, guards in placed.items()}
    guards = [*placed["params"], *placed["grads"]]
    return Problem(case, dtype, tensors, {"params": params, "grads": grads}, guards)


def run(function, problem: Problem) -> dict[str, torch.Tensor]:
    function(problem.tensors["params"], problem.tensors["grads"], **problem.case.options())
    return {f"params[{i}]": p for i, p in enumerate(problem.tensors["params"])}


def judge(problem: Problem, outputs: dict[str, torch.Tensor], backend: Backend) -> list[Figure]:
    case, worst = problem.case, 0.0
    unit, stored = 2.0**-24, torch.finfo(problem.dtype).eps / 2
    for i, (p, g) in enumerate(zip(problem.expected["params"], problem.expected["grads"])):
        if not p.numel():
            continue
        exact = [p.double()]
        reference.normed_descent_(exact, [g.double()], **case.options())
        size = case.lr * (1.0 if case.normalized else direction(g.double(), case.norm)[1].item())
        bound = (4 * unit + stored) * (p.double().abs() + size) + 16 * unit * size
        if case.norm == "spectral" and backend.name != "reference":
            error = plan(as_matrix(g).shape, torch.float32, g.device).schedule.error
            bound = bound + 1.01 * size * (error if case.normalized else (1 + error) ** 2 - 1)
        distance = (outputs[f"params[{i}]"].cpu().double() - exact[0]).abs()
        worst = max(worst, float((distance / bound).max())) if bool(distance.isfinite().all()) else math.inf
    return [Figure("params error/bound", worst, 1.0, "of bound")]


def elements(case: NormCase) -> int:
    return sum(math.prod(shape) for shape in case.shapes)


def least_bytes(case: NormCase, dtype: torch.dtype) -> int:
    """Read parameter and gradient, write the parameter; l2 and unnormalised forms read the gradient twice."""
    return elements(case) * dtype.itemsize * (3 if case.norm == "linf" and case.normalized else 4)


def flops(case: NormCase) -> int:
    """3 per element; norms 2 more; the polar factor is counted by its own op."""
    return elements(case) * (3 if case.norm == "linf" and case.normalized else 5)


def public(*args, **kwargs):
    from steepest.optim.normed_descent import normed_descent_

    return normed_descent_(*args, **kwargs)


def no_triton() -> str:
    return "no kernel of its own: sign descent is in the elementwise engine, the polar factor an op"


OP = register(
    Op(
        name="normed_descent",
        public=("normed_descent_",),
        cases=CASES,
        backends=lambda: (
            Backend("reference", reference.normed_descent_, exact=False),
            Backend("cpu", public, exact=False),
            Backend("triton-interpreted", public, available=no_triton, exists=False),
            Backend("triton", public, "cuda", no_triton, exists=False),
            Backend("cuda", public, "cuda", native_cuda_missing, exact=False),
        ),
        build=build,
        run=run,
        judge=judge,
        bytes=least_bytes,
        flops=flops,
        bound="roundings of a step, per element; for the spectral norm the schedule's certificate on top",
        source="Bernstein & Newhouse 2024; Pethick et al. 2025",
    )
)
