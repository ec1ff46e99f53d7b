"""Inverse roots and the effective dimension: cases, backends, costs; for bounds see conformance.root_bounds."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from steepest import reference
from steepest.conformance import zoo
from steepest.conformance.backends import cuda_missing, interpreter_missing, triton_missing
from steepest.conformance.compare import bits_figure
from steepest.conformance.memory import Guarded
from steepest.conformance.polar_bounds import Measured
from steepest.conformance.registry import INTERPRETED, Backend, Case, Figure, Op, Problem, register
from steepest.conformance.root_bounds import figures, scale_figures
from steepest.matrix.root_plan import RootPlan, plan
from steepest.matrix.roots import RootStatus, effective_dimension, execute, inverse_root


@dataclass(frozen=True)
class RootCase(Case):
    spectrum: str = "exponential"
    n: int = 48
    batch: tuple[int, ...] = ()
    p: int = 4
    ridge: float = 1e-6
    absolute: bool = False
    tol: float = 1e-3
    method: str = "composite"
    layout: str = "contiguous"
    offset: int = 0
    # Blocks of the batch that are replaced: (place, "nan", "inf", "zero" or "indefinite")
    planted: tuple[tuple[int, str], ...] = ()

    def options(self) -> dict:
        names = ("p", "ridge", "absolute", "tol", "method")
        return {name: getattr(self, name) for name in names}

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.batch, self.n, self.n)


FLOAT32, HALF = ("float32",), ("bfloat16", "float16")
SPECTRA = ("orthogonal", "power law", "steep power law", "exponential", "arithmetic", "one large", "one small")
SPECTRA += ("clustered", "log-uniform 1e-3", "log-uniform 1e-6", "log-uniform 1e-12", "rank deficient", "rank one")
SPECTRA += ("huge", "tiny", "statistic")
TELLING = ("log-uniform 1e-6", "rank deficient", "rank one", "statistic")
BAD = ((1, "nan"), (2, "zero"), (3, "indefinite"), (4, "inf"))


CASES = (
    *(RootCase(f"{s}, n 48", spectrum=s, dtypes=FLOAT32, interpreted="quick" if s == "statistic" else "full")
      for s in SPECTRA),
    *(RootCase(f"{s}, ridge {r:g}", spectrum=s, ridge=r, dtypes=FLOAT32, quick=r == 1e-4, interpreted="full")
      for s in TELLING for r in (1e-2, 1e-3, 1e-4, 1e-5)),
    *(RootCase(f"p {p}, ridge {r:g}", spectrum="statistic", n=33, p=p, ridge=r, dtypes=FLOAT32,
               interpreted="quick" if r == 1e-4 and p < 4 else "full")
      for p in (1, 2, 3, 6, 8) for r in (1e-4, 1e-6)),
    *(RootCase(f"n {n}", spectrum="log-uniform 1e-6", n=n, dtypes=FLOAT32, interpreted="quick" if n < 20 else "full")
      for n in (1, 2, 3, 17, 64, 128)),
    *(RootCase(f"{s}, 16 bit", spectrum=s, ridge=0.05, dtypes=HALF) for s in ("clustered", "statistic", "power law")),
    *(RootCase(f"newton, {s}", spectrum=s, method="newton", ridge=1e-4, dtypes=FLOAT32, interpreted="full")
      for s in TELLING),
    *(RootCase(f"eigh, {s}", spectrum=s, method="eigh", dtypes=FLOAT32, interpreted="never") for s in TELLING),
    RootCase("eigh, absolute ridge", method="eigh", ridge=1e-3, absolute=True, dtypes=FLOAT32, interpreted="never"),
    RootCase("automatic, ridge 1e-9", method="auto", ridge=1e-9, dtypes=FLOAT32, interpreted="never"),
    RootCase("tol 1e-6", spectrum="clustered", tol=1e-6, ridge=1e-3, dtypes=FLOAT32, interpreted="full"),
    RootCase("batch", spectrum="statistic", n=20, batch=(3,), dtypes=FLOAT32),
    RootCase("batch of batches", spectrum="clustered", n=16, batch=(2, 2), dtypes=FLOAT32, interpreted="full"),
    RootCase("NaN, zero, indefinite and inf among six", spectrum="clustered", n=24, batch=(6,), planted=BAD, ridge=1e-4,
             dtypes=FLOAT32),
    RootCase("the same by eigh", spectrum="clustered", n=24, batch=(6,), planted=BAD, method="eigh", ridge=1e-4,
             dtypes=FLOAT32, interpreted="never"),
    RootCase("empty", n=0, ridge=0.05),
    RootCase("empty batch", n=4, batch=(0,), ridge=0.05),
    RootCase("layout transposed", n=40, batch=(2,), layout="transposed", dtypes=FLOAT32, interpreted="full"),
    RootCase("layout gaps", n=21, layout="gaps", dtypes=FLOAT32, interpreted="full"),
    *(RootCase(f"misaligned {k}", n=29, offset=k, dtypes=FLOAT32, interpreted="full") for k in (1, 3)),
    RootCase("n 200", spectrum="statistic", n=200, dtypes=FLOAT32, quick=False, interpreted="never"),
    RootCase("n 530", spectrum="log-uniform 1e-6", n=530, dtypes=FLOAT32, quick=False, interpreted="never"),
)  # fmt: skip


def definite(spectrum: str, n: int, *, seed: int = 0, batch: tuple[int, ...] = (), dtype=torch.float32) -> torch.Tensor:
    """Q diag(s) Q^T, (*batch, n, n), eigenvalues from zoo.SPECTRA, or "statistic": the mean of six G G^T with G (n, 3)
    of fading size, what a preconditioner's statistic is early in training.  Built in float64, rounded once."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(batch)
    out = torch.empty(count, n, n, dtype=torch.float64)
    for i in range(count):
        if spectrum == "statistic":
            out[i] = 0
            for k in range(6):
                g = 0.5**k * torch.randn(n, 3, generator=generator, dtype=torch.float64)
                out[i] += g @ g.mT / 6
        else:
            q = zoo._haar(n, n, generator)
            out[i] = (q * zoo.SPECTRA[spectrum](n, 1.0, generator)) @ q.mT
    out = (out + out.mT) / 2
    return out.reshape(*batch, n, n).to(dtype)


def build(case: RootCase, dtype: torch.dtype, seed: int, device: str = "cpu") -> Problem:
    a = definite(case.spectrum, case.n, seed=seed, batch=case.batch, dtype=dtype)
    for place, kind in case.planted:
        plant(a[place], kind)
    guarded = Guarded(a, layout=case.layout, offset=case.offset, device=device)
    return Problem(case, dtype, {"a": guarded.view}, {"a": a}, [guarded])


def plant(block: torch.Tensor, kind: str) -> None:
    if kind == "zero":
        block.zero_()
    elif kind == "indefinite":
        block -= 0.5 * block.diagonal().amax() * torch.eye(len(block), dtype=block.dtype)
    else:
        block[len(block) // 2, len(block) // 3] = float(kind)


def run(function, problem: Problem) -> dict[str, torch.Tensor]:
    a = problem.tensors["a"]
    x, status = function(a, **problem.case.options())
    return {"x": x, "ok": status.ok.float(), "scale": status.scale, "iterations": status.iterations.float(), "a": a,
            "residual": status.residual, "dimension": effective_dimension(a)}  # fmt: skip


def plan_of(backend: Backend, case: RootCase, dtype: torch.dtype, iterations: int) -> RootPlan:
    """What was executed: "auto" chooses by the number of threads, of which there may be fewer now."""
    options = case.options()
    if case.method == "auto":
        options["method"] = "composite" if iterations else "eigh"
    if backend.name == "reference":
        return plan(case.shape, torch.float64, "cpu", **{**options, "method": "eigh"})
    if backend.name == "cpu":
        return plan(case.shape, dtype, "cpu", **options)
    return plan(case.shape, dtype, "cuda", backend="triton" if "triton" in backend.name else "torch", **options)


def judge(problem: Problem, outputs: dict[str, torch.Tensor], backend: Backend) -> list[Figure]:
    case, a = problem.case, problem.expected["a"]
    x, ok, scale, residual = (outputs[name].cpu() for name in ("x", "ok", "scale", "residual"))
    found = [
        Figure("shape and dtype", float(x.shape != a.shape or x.dtype != a.dtype), 0, "wrong"),
        bits_figure("input unchanged", [(outputs["a"], a)]),
    ]
    if found[0].value or not a.numel():
        return found
    kinds = {**dict.fromkeys(range(math.prod(case.batch)), "good"), **dict(case.planted)}
    failing = torch.tensor([kinds[i] in ("nan", "inf", "indefinite") for i in kinds])
    blocks, roots = a.reshape(-1, case.n, case.n), x.reshape(-1, case.n, case.n)
    found.append(
        Figure(
            "status", int((ok.reshape(-1).bool() == failing).sum()), 0, "matrices", "ok for good ones and only these"
        )
    )
    wrong = sum(int((~r.isnan() if bad else ~r.isfinite()).sum()) for r, bad in zip(roots, failing))
    found.append(Figure("non-finite", wrong, 0, "elements", "a failed matrix gives NaN, the others do not"))
    if wrong or found[-2].value:
        return found
    todo = plan_of(backend, case, problem.dtype, int(outputs["iterations"].max()))
    measured = []
    for i, (block, root) in enumerate(zip(blocks, roots)):
        if kinds[i] == "zero":
            exact = case.ridge ** (-1 / case.p) * torch.eye(case.n, dtype=torch.float64)
            unit = torch.finfo(x.dtype).eps * exact.max()
            found.append(Figure("zero", (root.double() - exact).abs().max().item(), unit.item(), "", "I ridge^(-1/p)"))
        elif not failing[i]:
            size, certified = scale.reshape(-1)[i].item(), residual.reshape(-1)[i].item()
            each = figures(block, root, size, case.ridge, case.absolute, todo, certified) + scale_figures(block, size)
            measured.append(Measured((*each, *dimension_figures(block, outputs["dimension"].reshape(-1)[i].item()))))
    found += Measured.worst(measured)
    if case.batch and backend.name not in ("reference", INTERPRETED):
        kept = (with_other_neighbours(problem, backend, place) for place in itertools.product(*map(range, case.batch)))
        found.append(bits_figure("neighbours", zip(x.reshape(-1, case.n, case.n), kept), "whatever the rest is"))
    return found


def dimension_figures(a: torch.Tensor, dimension: float) -> tuple[Figure, ...]:
    """n additions of squares and of diagonal elements, each sum squared or divided once: (n² + 2 n + 4) u, hard limit;
    sums of one sign err by far less than it."""
    exact = reference.effective_dimension(a.double()).item()
    n = a.shape[-1]
    return (Figure("dimension", abs(dimension - exact) / exact, (n * n + 2 * n + 4) * 2.0**-24 + 1e-12, "relative"),)


def with_other_neighbours(problem: Problem, backend: Backend, place: tuple[int, ...]) -> torch.Tensor:
    """The root of the matrix at `place` with NaN in all others, in the same layout."""
    case, a = problem.case, problem.expected["a"]
    alone = torch.full_like(a, torch.nan)
    alone[place] = a[place]
    guarded = Guarded(alone, layout=case.layout, offset=case.offset, device=backend.device)
    return backend.function(guarded.view, **case.options())[0][place]


def least_bytes(case: RootCase, dtype: torch.dtype) -> int:
    """Read a, write the result."""
    return 2 * math.prod(case.shape) * dtype.itemsize


def flops(case: RootCase) -> int:
    """Of the composite chain, with symmetric products at half price."""
    options = {**case.options(), "method": "composite", "absolute": False, "ridge": max(case.ridge, 1e-6)}
    todo = plan(case.shape, torch.float32, "cuda", backend="triton", **options)
    return todo.products * case.n**3 * math.prod(case.batch)


def _reference(a, *, p, ridge, absolute, tol, method):
    wide = a.double()
    finite = wide.isfinite().flatten(-2).all(-1) if a.numel() else torch.ones(a.shape[:-2], dtype=torch.bool)
    clean = torch.where(finite[..., None, None], wide, 0.0)
    w = torch.linalg.eigvalsh((clean + clean.mT) / 2).abs()
    scale = w.amax(-1) if a.shape[-1] else finite.double()
    scale = scale.where(scale != 0, 1)
    x = reference.inverse_root(clean, p, ridge=ridge, absolute=absolute, scale=scale)
    x = torch.where(finite[..., None, None], x, torch.nan)
    ok = ~x.isnan().flatten(-2).any(-1)
    x = torch.where(ok[..., None, None], x, torch.nan).to(a.dtype)
    return x, RootStatus(ok, 0 * ok.int(), 0 * scale, scale)


def _interpreted(a, *, ridge, absolute, **options):
    """As on a CUDA device: its plan, its verbs; `inverse_root` itself sends CPU tensors to torch."""
    from steepest.matrix.triton_verbs import TritonVerbs

    todo = plan(a.shape, a.dtype, "cuda", ridge=ridge, absolute=absolute, backend="triton", **options)
    flat = a.reshape(math.prod(a.shape[:-2]), *a.shape[-2:])
    x, status = execute(flat, todo, ridge, absolute, TritonVerbs(todo.precision))
    return x.to(a.dtype).reshape(a.shape), RootStatus(*(field.reshape(a.shape[:-2]) for field in status))


def backends() -> tuple[Backend, ...]:
    def through(name):
        return lambda a, **options: inverse_root(a, return_status=True, backend=name, **options)

    return (
        Backend("reference", _reference),
        Backend("cpu", through("auto"), note="what a call without backend= takes: the C library's kernels or torch's"),
        Backend("triton-interpreted", _interpreted, available=interpreter_missing, note="planned as for CUDA"),
        Backend("triton", through("triton"), "cuda", triton_missing),
        Backend("cuda", through("torch"), "cuda", cuda_missing, note="torch verbs"),
    )


OP = register(
    Op(
        name="inverse_root",
        public=("inverse_root", "effective_dimension"),
        cases=CASES,
        backends=backends,
        build=build,
        run=run,
        judge=judge,
        bytes=least_bytes,
        flops=flops,
        bound="rounding: stochastic arithmetic on the executed plan; root error: certificate + 3 kappa u / p",
        source="Higham 2008, chapter 7; Guo and Higham 2006; Amsel et al. 2025 (greedy composition)",
        promises=(),  # products of other thread counts round differently
    )
)
