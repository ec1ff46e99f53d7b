"""Perturb and restore: cases, bound, costs.

Bound.  With u = 2^-24, every backend computes e = rho T sign(x) (r c)^(q-1), r = |x| / largest, x = T g, in float32
with one rounding per operation, from float64 sums whose own error (n 2^-53) does not count.  Relative errors to first
order, adaptive in brackets, where x takes 2 u (T, product) and the norm of such x as many:

    r c           3 u (quotient, c, product)          [7 u]
    (r c)^(q-1)   (q - 1) times that, and u           (p = 2: no power;  p = inf: 1;  p = 1: c = 1/count, u)
    e             that, and 2 u (rho, product)        [4 u]

and 2^-10 of all this for higher orders.  What lies below float32's normal range is off by 2^-149.  Then
w + e is rounded once in float32 and once to the parameter's type: (u + u_p) (|w| + |e|).  The norms of e and its inner
product with g are within the same distances, by the triangle inequality: ‖error‖_p and Σ |g| error.

A case with p = 1 makes no claim where the two largest |x| are closer than their rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from steepest import reference
from steepest.conformance.backends import native_cuda_missing
from steepest.conformance.cases.adamw import MATRICES
from steepest.conformance.compare import bits_figure
from steepest.conformance.memory import Guarded
from steepest.conformance.registry import Backend, Case, Figure, Op, Problem, register
from steepest.reference.sam import ascent, dual, norm

UNIT = 2.0**-24


@dataclass(frozen=True)
class PerturbCase(Case):
    p: float | str = 2.0  # "inf" is a word in reports, which know finite numbers only
    adaptive: bool = False
    eta: float = 0.01
    rho: float = 0.5
    shapes: tuple[tuple[int, ...], ...] = ((33, 9), (), (0, 3), (257,), (5,))
    layouts: tuple[str, ...] = ("contiguous",)  # of params, grads, backups; the last one is used for the rest
    values: str = "usual"  # "usual" | "huge" | "tiny" | "zero" | "ties" | "inf" | "nan": of the gradients

    def options(self) -> dict:
        return {"rho": self.rho, "p": self.order, "adaptive": self.adaptive, "eta": self.eta}

    @property
    def order(self) -> float:
        return float(self.p)


NORMS = (1.0, 1.5, 2.0, 3.0, "inf")
TAILS = tuple((n,) for n in (*range(1, 20), 31, 33, 63, 65, 127, 129))
CASES = (
    *(
        PerturbCase(f"p {float(p):g}{', adaptive' if adaptive else ''}, {v}", p=p, adaptive=adaptive, values=v)
        for p in NORMS
        for adaptive in (False, True)
        for v in ("usual", "huge", "zero")
    ),
    *(PerturbCase(f"p {float(p):g}, {v}", p=p, values=v) for p in NORMS for v in ("tiny", "inf", "nan")),
    PerturbCase("p 1, ties", p=1.0, values="ties"),
    PerturbCase("p 1.05", p=1.05),
    PerturbCase("p 20, adaptive", p=20.0, adaptive=True, eta=0.0),
    PerturbCase("tails", shapes=TAILS),
    PerturbCase("tails, p 3", shapes=TAILS, p=3.0),
    PerturbCase("several tiles and threads", shapes=((200_003,),)),
    PerturbCase("layout: all different", shapes=MATRICES, layouts=("transposed", "contiguous", "gaps"), adaptive=True),
    PerturbCase("layout: channels_last", shapes=MATRICES, layouts=("channels_last",)),
    PerturbCase("p 2, adaptive, rho 0.3", adaptive=True, rho=0.3),  # by a rho that is no power of two products round
)  # fmt: skip


def gradients(case: PerturbCase, dtype: torch.dtype, generator) -> list[torch.Tensor]:
    """Magnitudes over four decades; the first tensor's are those that the case is about, the fourth's are zero."""
    grads = [torch.randn(s, generator=generator) * 10 ** (-4 * torch.rand(s, generator=generator)) for s in case.shapes]
    if len(grads) > 3:
        grads[3] = torch.zeros_like(grads[3])
    largest = {torch.float16: 6e4}.get(dtype, 1e37)
    first = grads[0]
    if case.values == "huge":
        first *= largest / first.abs().max()
    if case.values == "tiny":
        grads = [g * (1e-5 if dtype == torch.float16 else 1e-36) for g in grads]
    if case.values == "zero":
        grads = [torch.zeros_like(g) for g in grads]
    if case.values == "ties":
        first.view(-1)[:3] = torch.tensor([5.0, -5.0, 5.0])
    if case.values in ("inf", "nan"):
        first.view(-1)[1] = float(case.values)
    return [g.to(dtype) for g in grads]


def build(case: PerturbCase, dtype: torch.dtype, seed: int, device: str = "cpu") -> Problem:
    generator = torch.Generator().manual_seed(seed)
    params = [(0.5 * torch.randn(shape, generator=generator)).to(dtype) for shape in case.shapes]
    lists = {"params": params, "grads": gradients(case, dtype, generator)}
    lists["backups"] = [torch.full_like(p, 7.0) for p in params]
    tensors, guards = {}, []
    for i, (role, values) in enumerate(lists.items()):
        layout = case.layouts[min(i, len(case.layouts) - 1)]
        placed = [Guarded(x, layout=layout, device=device) for x in values]
        tensors[role] = [g.view for g in placed]
        guards += placed
    return Problem(case, dtype, tensors, lists, guards)


def run_perturb(function, problem: Problem) -> dict[str, torch.Tensor]:
    t = problem.tensors
    function(t["params"], t["grads"], t["backups"], **problem.case.options())
    return {f"{role}[{i}]": x for role in ("params", "backups") for i, x in enumerate(t[role])}


def roundings(case: PerturbCase) -> float:
    """Relative error of e in units of u."""
    q, weight = dual(case.order), 2 if case.adaptive else 0
    scaled = 3 + 2 * weight
    direction = {1.0: 0, 2.0: scaled, math.inf: 1}.get(q, (q - 1) * scaled + 1)
    return (direction + 2 + weight) * (1 + 2**-10)


def element_bound(case: PerturbCase, p: torch.Tensor, g: torch.Tensor, e: torch.Tensor, largest: float) -> torch.Tensor:
    """How far w + e may be from exact."""
    q, stored = dual(case.order), torch.finfo(p.dtype)
    weight = p.double().abs() + case.eta if case.adaptive else torch.ones_like(p, dtype=torch.float64)
    # Where x or r c is in float32's subnormals, it is off by 2^-149.
    x = weight * g.double().abs()
    tiny = (x > 0) & ((x < 2.0**-125) & case.adaptive | (x < 2.0**-100 * largest))
    small = 2.0**-149 * (1 + (1 / largest if case.adaptive and largest > 0 else 0))
    lost = torch.where(tiny, 0.0 if q in (1.0, math.inf) else small ** min(1.0, q - 1), 0.0)
    inside = roundings(case) * UNIT * e.abs() + case.rho * weight * lost
    rounding = (UNIT + (stored.eps / 2 if p.dtype != torch.float32 else 0)) * (p.double().abs() + e.abs() + inside)
    return inside + rounding + stored.smallest_normal * stored.eps


def bits(problem: Problem, outputs: dict[str, torch.Tensor]) -> Figure:
    """Parameters that are not the reference's to the bit.

    Another power function is not the reference's to the last bit of float64, which shows in few floats.
    """
    params, backups = ([x.clone() for x in problem.expected["params"]] for _ in range(2))
    reference.perturb_(params, problem.expected["grads"], backups, **problem.case.options())
    figure = bits_figure("bits", ((outputs[f"params[{i}]"], p) for i, p in enumerate(params)), "against the reference")
    power = dual(problem.case.order) not in (1.0, 2.0, math.inf)
    return replace(figure, bound=len(params)) if power else figure


def judge_perturb(problem: Problem, outputs: dict[str, torch.Tensor], backend: Backend) -> list[Figure]:
    case, q = problem.case, dual(problem.case.order)
    start = {role: [x.double() for x in problem.expected[role]] for role in ("params", "grads")}
    exact = ascent(start["params"], start["grads"], **case.options())
    weights = [w.abs() + case.eta if case.adaptive else torch.ones_like(w) for w in start["params"]]
    x = [w * g for w, g in zip(weights, start["grads"])]
    largest = float(norm(x, math.inf))
    worst, found, errors = 0.0, [], []
    for i, (p, g, e) in enumerate(zip(problem.expected["params"], problem.expected["grads"], exact)):
        result = outputs[f"params[{i}]"].cpu().double()
        bound = element_bound(case, p, g, e, largest)
        errors.append(bound)
        found.append(result - p.double())
        if p.numel():
            distance = (result - p.double() - e).abs()
            worst = max(worst, float((distance / bound).max())) if bool(distance.isfinite().all()) else math.inf
    figures = [Figure("params error/bound", worst, 1.0, "of bound")]
    size = float(norm(x, q))
    if 0 < size < math.inf:  # the two properties that define e, of the result itself
        unweighted = [e / w for e, w in zip(found, weights)]
        slack = float(norm([b / w for b, w in zip(errors, weights)], case.order))
        figures.append(Figure("norm of e", abs(float(norm(unweighted, case.order)) / case.rho - 1), slack / case.rho))
        gain = sum(float((e * g / size).sum()) for e, g in zip(found, start["grads"]))
        slack = sum(float((b * g.abs() / size).sum()) for b, g in zip(errors, start["grads"]))
        figures.append(Figure("<g, e> / norm of g", abs(gain / case.rho - 1), slack / case.rho + 1e-12))
    else:
        same = (
            (outputs[f"params[{i}]"], p + e.to(p)) for i, (p, e) in enumerate(zip(problem.expected["params"], exact))
        )
        if q != 1:
            figures.append(bits_figure("params", same, "nothing moves"))
    if backend.exact:
        figures.append(bits(problem, outputs))
    kept = ((outputs[f"backups[{i}]"], p) for i, p in enumerate(problem.expected["params"]))
    return [*figures, bits_figure("backups", kept, "the parameters before")]


@dataclass(frozen=True)
class RestoreCase(Case):
    shapes: tuple[tuple[int, ...], ...] = ((33, 9), (), (0, 3), (200_003,))
    layouts: tuple[str, ...] = ("contiguous",)
    master: bool = False  # float32 copies of what is now params' dtype


RESTORE_CASES = (
    RestoreCase("backup"),
    RestoreCase("float32 master", master=True),
    RestoreCase("tails", shapes=TAILS),
    RestoreCase("layout: all different", shapes=MATRICES, layouts=("transposed", "gaps")),
)


def build_restore(case: RestoreCase, dtype: torch.dtype, seed: int, device: str = "cpu") -> Problem:
    generator = torch.Generator().manual_seed(seed)
    copies = [torch.randn(s, generator=generator).to(torch.float32 if case.master else dtype) for s in case.shapes]
    lists = {"params": [torch.zeros_like(x, dtype=dtype) for x in copies], "backups": copies}
    tensors, guards = {}, []
    for i, (role, values) in enumerate(lists.items()):
        placed = [Guarded(x, layout=case.layouts[min(i, len(case.layouts) - 1)], device=device) for x in values]
        tensors[role] = [g.view for g in placed]
        guards += placed
    return Problem(case, dtype, tensors, lists, guards)


def run_restore(function, problem: Problem) -> dict[str, torch.Tensor]:
    function(problem.tensors["params"], problem.tensors["backups"])
    return {f"params[{i}]": x for i, x in enumerate(problem.tensors["params"])}


def judge_restore(problem: Problem, outputs: dict[str, torch.Tensor], backend: Backend) -> list[Figure]:
    copies = enumerate(problem.expected["backups"])
    return [bits_figure("params", ((outputs[f"params[{i}]"], x.to(problem.dtype)) for i, x in copies), "the copies")]


def elements(case) -> int:
    return sum(math.prod(shape) for shape in case.shapes)


def perturb_bytes(case: PerturbCase, dtype: torch.dtype) -> int:
    """Read parameter and gradient, write parameter and backup; the norm reads x's ingredients again."""
    q = dual(case.order)
    reads = 0 if q == 1 else (2 if case.adaptive else 1) * (1 if q == 2 else 2)
    return elements(case) * dtype.itemsize * (4 + reads)


def _backends(name: str):
    def through(backend):
        def function(*args, **kwargs):
            from steepest import sam_ops

            return getattr(sam_ops, name)(*args, backend=backend, **kwargs)

        return function

    def no_triton() -> str:
        return "no Triton kernel for this rule; CUDA C++ has one"

    return lambda: (
        Backend("reference", getattr(reference, name), exact=False),
        Backend("cpu", through("cpu")),
        Backend("triton-interpreted", through("triton"), available=no_triton, exists=False),
        Backend("triton", through("triton"), "cuda", no_triton, exists=False),
        Backend("cuda", through("cuda"), "cuda", native_cuda_missing, exact=False),
    )


PERTURB = register(
    Op(
        name="perturb",
        public=("perturb_",),
        # Every third in --quick, which has a minute for all ops.
        cases=tuple(replace(case, quick=i % 3 == 0) for i, case in enumerate(CASES)),
        backends=_backends("perturb_"),
        build=build,
        run=run_perturb,
        judge=judge_perturb,
        bytes=perturb_bytes,
        flops=lambda case: 10 * elements(case),
        bound="roundings of the formula, per element; the backup's bits; on CPUs the reference's",
        source="Foret et al. 2021; Kwon et al. 2021 (adaptive)",
    )
)
RESTORE = register(
    Op(
        name="restore",
        public=("restore_",),
        cases=RESTORE_CASES,
        backends=_backends("restore_"),
        build=build_restore,
        run=run_restore,
        judge=judge_restore,
        bytes=lambda case, dtype: elements(case) * (dtype.itemsize + (4 if case.master else dtype.itemsize)),
        flops=lambda case: 0,
        bound="bits",
        source="–",
    )
)
