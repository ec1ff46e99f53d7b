"""The polar factor: cases, backends, costs; for its bounds see steepest.conformance.polar_bounds."""

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
from steepest.conformance.polar_bounds import Measured, measure
from steepest.conformance.registry import DTYPES, INTERPRETED, Backend, Case, Figure, Op, Problem, register
from steepest.matrix.norm_bounds import initial_size
from steepest.matrix.polar import UNIT_ROUNDOFF, Plan, iterate, normalised, plan, polar


@dataclass(frozen=True)
class PolarCase(Case):
    spectrum: str = "gaussian"
    m: int = 48
    n: int = 48
    batch: tuple[int, ...] = ()
    schedule: str = "polar-express"
    steps: int = 5
    lower: float = 1e-3
    tol: float | None = None
    norm: str = "auto"
    layout: str = "contiguous"
    offset: int = 0
    planted: str | None = None  # "nan" or "-inf", put into one element of the second matrix of the batch
    scale: float = 1.0

    def options(self) -> dict:
        named = {name: getattr(self, name) for name in ("schedule", "steps", "lower", "tol")}
        return named if self.norm == "auto" else {**named, "norm": self.norm}

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.batch, self.m, self.n)


FLOAT32 = ("float32",)
BFLOAT16 = ("bfloat16",)  # float16 is treated like it, and cannot hold 1e30
SPECTRA = zoo.NAMES
# Enough where time is short.
TELLING = ("gaussian", "exponential", "log-uniform 1e-6", "rank deficient", "zero", "recorded up, step 200")
SHAPES = ((1, 1), (1, 17), (17, 1), (2, 130), (33, 65), (65, 33), (48, 160), (160, 48))
# Aspects 1.5, 4 and 16, both ways and with odd sizes; each spectrum meets each of them once in the full run.
ASPECTS = ((40, 60), (63, 41), (21, 84), (92, 23), (13, 208), (176, 11))
SCHEDULES = (("polar-express", 8), ("polar-express-safe", 8), ("keller", 5), ("you", 5), ("cans", 5))
SCHEDULES += (("cubic", 5), ("deepseek-v4", 10))


def _short(chosen: bool) -> str:
    return "quick" if chosen else "full"


CASES = (
    *(
        PolarCase(f"{name}, 48 x 48", spectrum=name, dtypes=FLOAT32, interpreted=_short(name in TELLING))
        for name in SPECTRA
    ),
    *(
        PolarCase(f"{name}, 40 x 130", spectrum=name, m=40, n=130, dtypes=FLOAT32, quick=name in TELLING)
        for name in SPECTRA
    ),
    *(PolarCase(f"{name}, 48 x 48, 16 bit", spectrum=name, dtypes=BFLOAT16, quick=name in TELLING) for name in SPECTRA),
    *(
        PolarCase(f"{m} x {n}", spectrum="log-uniform 1e-3", m=m, n=n, interpreted=_short(m <= n and n < 100))
        for m, n in SHAPES
    ),
    *(
        PolarCase(
            f"{name}, {m} x {n}, batch",
            spectrum=name,
            m=m,
            n=n,
            batch=(2,),
            quick=False,
            interpreted="never",
            dtypes=tuple(DTYPES)[k % 3 : k % 3 + 1],
        )
        for k, (name, (m, n)) in enumerate(itertools.product(SPECTRA, ASPECTS), 1)
    ),
    PolarCase("empty, 0 x 5", m=0, n=5),
    PolarCase("empty, 5 x 0", m=5, n=0),
    PolarCase("empty batch", m=3, n=4, batch=(0,)),
    PolarCase("batch", spectrum="exponential", m=20, n=31, batch=(3,)),
    PolarCase("batch of batches", spectrum="clustered", m=40, n=9, batch=(2, 2), interpreted="full"),
    PolarCase("NaN in one of three", m=24, n=24, batch=(3,), planted="nan"),
    PolarCase("inf in one of three, gram", m=10, n=70, batch=(3,), planted="-inf"),
    *(
        PolarCase(
            f"{s}, {k} steps", spectrum="exponential", schedule=s, steps=k, dtypes=FLOAT32, interpreted=_short(k == 8)
        )
        for s, k in SCHEDULES
    ),
    PolarCase("1 step", steps=1, m=20, n=90, dtypes=FLOAT32),
    PolarCase("minimax, 6 steps, from 1e-4", schedule="minimax", steps=6, lower=1e-4, m=30, n=30, dtypes=FLOAT32),
    PolarCase("tol 1e-5", tol=1e-5, spectrum="arithmetic", m=30, n=90, dtypes=FLOAT32),
    *(
        PolarCase(
            f"{norm}, {s}, {k} steps, {m} x {n}",
            spectrum=spectrum,
            norm=norm,
            schedule=s,
            steps=k,
            m=m,
            n=n,
            dtypes=d,
            interpreted=_short(k == 4),
            quick=spectrum in TELLING,
        )
        for norm, s, k, m, n, spectrum, d in (
            ("schatten4", "tuned", 5, 48, 48, "gaussian", ("float32", "bfloat16")),
            ("schatten4", "tuned", 4, 33, 65, "exponential", ("float32", "float16")),
            ("schatten4", "polar-express", 5, 48, 160, "recorded up, step 200", FLOAT32),
            ("schatten4", "cubic", 5, 40, 48, "power law", FLOAT32),
            ("schatten8", "tuned", 5, 160, 48, "log-uniform 1e-6", FLOAT32),
            ("schatten8", "tuned", 4, 48, 90, "rank deficient", ("float32", "bfloat16")),
            ("schatten8", "polar-express", 5, 48, 48, "zero", FLOAT32),
            ("schatten8", "keller", 5, 20, 33, "rank one", FLOAT32),
            ("schatten8", "cubic", 5, 40, 48, "huge", FLOAT32),
            ("schatten8", "tuned", 6, 64, 64, "tiny", FLOAT32),
            ("frobenius", "tuned", 5, 48, 60, "clustered", FLOAT32),
        )
    ),
    PolarCase(
        "NaN in one of three, schatten8",
        m=24,
        n=40,
        batch=(3,),
        planted="nan",
        norm="schatten8",
        schedule="tuned",
        dtypes=FLOAT32,
    ),
    PolarCase("layout transposed", m=50, n=20, batch=(2,), layout="transposed"),
    PolarCase("layout gaps", m=21, n=50, layout="gaps"),
    *(PolarCase(f"misaligned {k}", m=33, n=29, offset=k, dtypes=FLOAT32) for k in (1, 3)),
    PolarCase("130 x 300", m=130, n=300, quick=False),
    PolarCase("520 x 530", m=520, n=530, quick=False, interpreted="never", dtypes=FLOAT32),
    PolarCase("800 x 515", spectrum="exponential", m=800, n=515, quick=False, interpreted="never", dtypes=FLOAT32),
)


def build(case: PolarCase, dtype: torch.dtype, seed: int, device: str = "cpu") -> Problem:
    x, _ = zoo.matrix(case.spectrum, case.m, case.n, seed=seed, batch=case.batch, dtype=dtype)
    if case.planted is not None:
        x[1, case.m // 2, case.n // 3] = float(case.planted)
    guarded = Guarded(x, layout=case.layout, offset=case.offset, device=device)
    return Problem(case, dtype, {"x": guarded.view}, {"x": x}, [guarded])


def run(function, problem: Problem) -> dict[str, torch.Tensor]:
    x = problem.tensors["x"]
    return {"y": function(x, **problem.case.options()), "x": x}


def plan_of(backend: Backend, case: PolarCase, dtype: torch.dtype) -> Plan:
    """What the backend executes; the reference knows the plain form only."""
    options = case.options()
    if backend.name == "reference":
        return plan(case.shape, dtype, "cpu", form="plain", **options)
    if backend.name == "cpu":
        return plan(case.shape, dtype, "cpu", **options)
    return plan(case.shape, dtype, "cuda", backend="triton" if "triton" in backend.name else "torch", **options)


def judge(problem: Problem, outputs: dict[str, torch.Tensor], backend: Backend) -> list[Figure]:
    case, x, y = problem.case, problem.expected["x"], outputs["y"].cpu()
    figures = [
        Figure("shape and dtype", float(y.shape != x.shape or y.dtype != x.dtype), 0, "wrong"),
        bits_figure("input unchanged", [(outputs["x"], x)]),
    ]
    if figures[0].value or not x.numel():
        return figures
    todo = plan_of(backend, case, problem.dtype)
    xs, ys = x.reshape(-1, case.m, case.n), y.reshape(-1, case.m, case.n)
    finite = [bool(one.isfinite().all()) for one in xs]
    wrong = sum(int((~one.isfinite() if good else ~one.isnan()).sum()) for one, good in zip(ys, finite))
    figures.append(Figure("non-finite", wrong, 0, "elements", "a matrix with NaN or inf gives NaN, the others do not"))
    if wrong:
        return figures
    figures += Measured.worst([measure(a, b, todo) for a, b, good in zip(xs, ys, finite) if good])
    if case.batch and backend.name not in ("reference", INTERPRETED):
        kept = (with_other_neighbours(problem, backend, place) for place in itertools.product(*map(range, case.batch)))
        figures.append(bits_figure("neighbours", zip(ys, kept), "the same whatever the rest of the batch is"))
    return figures


def with_other_neighbours(problem: Problem, backend: Backend, place: tuple[int, ...]) -> torch.Tensor:
    """The result for the matrix at `place` with NaN in all others; same layout and alignment, since products by MKL
    round by alignment."""
    case, x = problem.case, problem.expected["x"]
    alone = torch.full_like(x, torch.nan)
    alone[place] = x[place]
    guarded = Guarded(alone, layout=case.layout, offset=case.offset, device=backend.device)
    return backend.function(guarded.view, **case.options())[place]


def least_bytes(case: PolarCase, dtype: torch.dtype) -> int:
    """Read x, write the result; anything between may stay on chip."""
    return 2 * math.prod(case.shape) * dtype.itemsize


def flops(case: PolarCase) -> int:
    """Of the cheaper form, with symmetric products at half price."""
    n, m = sorted((case.m, case.n))
    plans = [
        plan(case.shape, torch.float32, "cuda", backend="triton", form=f, **case.options()) for f in ("plain", "gram")
    ]
    return min(round(2 * n * n * (1.5 * p.grams * m + 0.5 * p.symmetric_products * n)) for p in plans) * math.prod(
        case.batch
    )


def _reference(x, **options):
    """In float32 for 16-bit input, as the CPU works."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    todo = plan(x.shape, wide.dtype, "cpu", **options)  # which says what "tuned" and "auto" come to
    options["norm"] = todo.norm
    if options["schedule"] == "tuned":
        options["schedule"] = todo.schedule
    return reference.polar(wide, **options).to(x.dtype)


def _interpreted(x, *, dtype=None, **options):
    """As on a CUDA device: its plan, its verbs; `polar` itself sends CPU tensors to torch."""
    from steepest.matrix.triton_verbs import TritonVerbs

    todo = plan(x.shape, x.dtype, "cuda", working=dtype, backend="triton", **options)
    if not x.numel():
        return torch.empty_like(x)
    size = initial_size(todo.norm, min(x.shape[-2:]), UNIT_ROUNDOFF[todo.dtype])
    y = normalised(x.reshape(-1, *x.shape[-2:]), todo.dtype, size)
    return iterate(y, todo, TritonVerbs()).to(x.dtype).reshape(x.shape)


def backends() -> tuple[Backend, ...]:
    def through(name):
        return lambda x, **options: polar(x, backend=name, **options)

    return (
        Backend("reference", _reference),
        Backend("cpu", through("auto"), note="what a call without backend= takes: the C library's kernels or torch's"),
        Backend("triton-interpreted", _interpreted, available=interpreter_missing, note="planned as for CUDA"),
        Backend("triton", through("triton"), "cuda", triton_missing),
        Backend("cuda", through("torch"), "cuda", cuda_missing, note="torch verbs"),
    )


OP = register(
    Op(
        name="polar",
        public=("polar", "polar_svd"),
        cases=CASES,
        backends=backends,
        build=build,
        run=run,
        judge=judge,
        bytes=least_bytes,
        flops=flops,
        bound="rounding: stochastic arithmetic on the executed plan; method: the certificate; see polar_bounds",
        source="Jordan et al. 2024 (Muon); Amsel et al. 2025 (Polar Express); Grishina et al. 2025 (CANS)",
        promises=(),  # products of other thread counts round differently
    )
)
