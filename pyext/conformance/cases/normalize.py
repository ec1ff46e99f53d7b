"""Weight normalisation (with its gradient) and path normalisation: cases, bounds, costs.

Bound of w = (g / ‖v‖) v, relative to |w|: the kernel's sums are float64, so that only the factor and the product are
rounded, 2.1 u.  Where the sum of n squares is taken in float32 or rounded to the tensors' dtype on the way (reference,
torch's kernel), squares, norm, factor and product are rounded once each and the sum n times in float32: 5 u + n 2^-24.

Bound of dv = f (dw - s v), relative to f (|dw| + 2 |s v|): five roundings of numbers no larger than that, and those of
f, s and ‖v‖: 6 u with float64 sums; else 12 u + 3 n 2^-24.  Path normalisation: norm, factor and product, 3.1 u.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from steepest import reference
from steepest.conformance.memory import Guarded
from steepest.conformance.registry import Backend, Case, Figure, Op, Problem, register


@dataclass(frozen=True)
class NormalizeCase(Case):
    shape: tuple[int, ...] = (7, 33)
    dim: int | None = 0
    layout: str = "contiguous"
    zero: bool = False  # a slice of zeros


CASES = (
    NormalizeCase("rows"),
    NormalizeCase("columns", dim=1),
    NormalizeCase("whole", dim=None),
    NormalizeCase("convolution", shape=(6, 3, 5, 5)),
    NormalizeCase("convolution, second dimension", shape=(6, 3, 5, 5), dim=1),
    NormalizeCase("several threads", shape=(301, 257)),
    NormalizeCase("transposed", layout="transposed"),
    NormalizeCase("gaps", layout="gaps"),
    NormalizeCase("a row of zeros", zero=True, dtypes=("float32",)),
    NormalizeCase("empty", shape=(0, 5)),
)


def build(case: NormalizeCase, dtype: torch.dtype, seed: int, device: str = "cpu") -> Problem:
    generator = torch.Generator().manual_seed(seed)
    v, upstream = (torch.randn(case.shape, generator=generator).to(dtype) for _ in range(2))
    if case.zero:
        v[0] = 0
    shape = [n if d == case.dim else 1 for d, n in enumerate(case.shape)]
    g = torch.randn(shape, generator=generator).to(dtype)
    values = {"v": v, "g": g, "upstream": upstream}
    placed = {name: Guarded(x, layout=case.layout, device=device) for name, x in values.items()}
    return Problem(case, dtype, {name: p.view for name, p in placed.items()}, values, list(placed.values()))


def run(function, problem: Problem) -> dict[str, torch.Tensor]:
    t = problem.tensors
    # Asked of the case, not of the tensors: a CUDA graph that is captured cannot wait for their values.
    if problem.case.zero and t["v"].is_cuda:
        raise NotImplementedError("torch's kernel, which CUDA takes, gives NaN for a slice of zeros")
    v, g = t["v"].detach().requires_grad_(), t["g"].detach().requires_grad_()
    w = function(v, g, problem.case.dim)
    w.backward(t["upstream"])
    return {"w": w.detach(), "grad_v": v.grad, "grad_g": g.grad}


def judge(problem: Problem, outputs: dict[str, torch.Tensor], backend: Backend) -> list[Figure]:
    case, given = problem.case, problem.expected
    exact = {name: x.double().requires_grad_() for name, x in given.items() if name != "upstream"}
    upstream = given["upstream"].double()
    w = reference.weight_norm(exact["v"], exact["g"], case.dim)
    w.backward(upstream)
    v, g, dv = exact["v"].detach(), exact["g"].detach(), exact["v"].grad
    others = [d for d in range(v.dim()) if d != case.dim]
    norm = v.square().sum(others, keepdim=True).sqrt()
    factor = torch.where(norm > 0, g.abs() / norm, 0.0)
    share = torch.where(norm > 0, (v * upstream).sum(others, keepdim=True) / norm.square(), 0.0)
    count = v.numel() // max(g.numel(), 1)
    unit = torch.finfo(problem.dtype).eps / 2
    wide = backend.name == "cpu" and problem.dtype == torch.float32  # sums in float64
    tiny = torch.finfo(problem.dtype).smallest_normal
    w_bound = (2.1 * unit if wide else 5 * unit + count * 2.0**-24) * w.detach().abs()
    size = factor * (upstream.abs() + 2 * (share * v).abs())
    dv_bound = (6 * unit if wide else 12 * unit + 3 * count * 2.0**-24) * size
    figures = []
    for name, wanted, bound in (("w", w.detach(), w_bound), ("grad_v", dv, dv_bound)):
        distance = (outputs[name].cpu().double() - wanted).abs()
        worst = float((distance / (bound + tiny)).max()) if distance.numel() else 0.0
        figures.append(Figure(f"{name} error/bound", worst, 1.0, "of bound"))
    return figures


@dataclass(frozen=True)
class PathCase(Case):
    shapes: tuple[tuple[int, ...], ...] = ((5, 7), (), (0,), (300, 400))
    zero: bool = False  # gradients


PATH_CASES = (PathCase("four tensors"), PathCase("zero gradients", zero=True))


def build_path(case: PathCase, dtype: torch.dtype, seed: int, device: str = "cpu") -> Problem:
    generator = torch.Generator().manual_seed(seed)
    params, grads = ([torch.randn(s, generator=generator).to(dtype) for s in case.shapes] for _ in range(2))
    grads = [torch.zeros_like(g) for g in grads] if case.zero else grads
    values = {"params": params, "grads": grads}
    placed = {name: [Guarded(x, device=device) for x in tensors] for name, tensors in values.items()}
    tensors = {name: [g.view for g in guards] for name, guards in placed.items()}
    guards = [guard for role in placed.values() for guard in role]
    return Problem(case, dtype, tensors, values, guards)


def run_path(function, problem: Problem) -> dict[str, torch.Tensor]:
    norm = function(problem.tensors["params"], problem.tensors["grads"])
    return {"norm": norm, **{f"params[{i}]": p for i, p in enumerate(problem.tensors["params"])}}


def judge_path(problem: Problem, outputs: dict[str, torch.Tensor], backend: Backend) -> list[Figure]:
    worst, unit = 0.0, torch.finfo(problem.dtype).eps / 2
    total = math.fsum(float(g.double().square().sum()) for g in problem.expected["grads"]) ** 0.5
    for i, p in enumerate(problem.expected["params"]):
        exact = p.double() / total if total else p.double()
        # Half precision keeps numbers below its smallest normal one with less.
        bound = (unit + 3.1 * 2.0**-24) * exact.abs() + torch.finfo(problem.dtype).smallest_normal * 2 * unit
        distance = (outputs[f"params[{i}]"].cpu().double() - exact).abs()
        worst = max(worst, float((distance / bound).max()) if p.numel() else 0.0)
    return [Figure("params error/bound", worst, 1.0, "of bound")]


def public(name: str):
    def function(*args, **kwargs):
        from steepest import normalize

        return getattr(normalize, name)(*args, **kwargs)

    return function


def backends(name: str, missing: str):
    return (
        Backend("reference", getattr(reference, name), exact=False),
        Backend("cpu", public(name), exact=False),
        Backend("triton-interpreted", public(name), available=lambda: missing, exists=False),
        Backend("triton", public(name), "cuda", lambda: missing, exists=False),
        Backend("cuda", public(name), "cuda", no_gpu, exact=False),
    )


def no_gpu() -> str:
    return "" if torch.cuda.is_available() else "no CUDA device"


WEIGHT_NORM = register(
    Op(
        name="weight_norm",
        public=("weight_norm",),
        cases=CASES,
        backends=lambda: backends("weight_norm", "on CUDA it takes torch's kernel"),
        build=build,
        run=run,
        judge=judge,
        bytes=lambda case, dtype: 20 * math.prod(case.shape),
        flops=lambda case: 9 * math.prod(case.shape),
        bound="roundings of factor, products and difference, per element; sums in float64",
        source="Salimans & Kingma 2016",
    )
)
PATH = register(
    Op(
        name="path_normalize",
        public=("path_normalize_",),
        cases=PATH_CASES,
        backends=lambda: backends("path_normalize_", "a survey and torch's foreach multiplication"),
        build=build_path,
        run=run_path,
        judge=judge_path,
        bytes=lambda case, dtype: 3 * dtype.itemsize * sum(math.prod(s) for s in case.shapes),
        flops=lambda case: 3 * sum(math.prod(s) for s in case.shapes),
        bound="roundings of norm, factor and product, per element",
        source="path normalisation: w / sqrt(sum of squared gradient norms)",
    )
)
