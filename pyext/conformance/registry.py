"""What an op brings to be validated and benchmarked.  One file under cases/ registers it; nothing else is edited."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import asdict, dataclass, field
from typing import Any, Callable

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INTERPRETED = "triton-interpreted"
COLUMNS = ("reference", "cpu", INTERPRETED, "triton", "cuda")


@dataclass(frozen=True)
class Case:
    """One input family.  Ops subclass it with their own fields, all plain data, so that a case can go into a report."""

    id: str
    quick: bool = True  # part of `validate --quick`
    # Triton's interpreter takes about 0.1 s per launch: "quick" also in --quick, "full" not, "never" for minutes.
    interpreted: str = "quick"
    dtypes: tuple[str, ...] = tuple(DTYPES)

    def parameters(self) -> dict[str, Any]:
        rest = asdict(self)
        for name in ("id", "quick", "interpreted", "dtypes"):
            rest.pop(name)
        return rest


@dataclass(frozen=True)
class Figure:
    """One measured number against its bound; `bound` None means that it is shown, not judged."""

    name: str
    value: float
    bound: float | None
    unit: str = ""
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.bound is None or self.value <= self.bound  # NaN fails

    @property
    def share(self) -> float | None:
        """Part of the bound that was used; None where the bound is zero (an exact match is asked for) or absent."""
        return self.value / self.bound if self.bound else None


@dataclass(frozen=True)
class Backend:
    """One way to run an op.  `function` has the public op's signature."""

    name: str  # a column of the table
    function: Callable
    device: str = "cpu"
    available: Callable[[], str] = str  # "" when usable, else the reason why not
    exact: bool = True  # equal to the float32 reference bit for bit, where the op promises that
    note: str = ""
    exists: bool = True  # False: there is no such kernel on any machine, and `available` says so


@dataclass
class Problem:
    """Inputs of one cell, as an op's `build` makes them."""

    case: Case
    dtype: torch.dtype
    tensors: dict[str, Any]  # what the op is called with
    expected: dict[str, Any]  # what `judge` compares with: computed from the same rounded inputs
    guards: list = field(default_factory=list)  # memory.Guarded of every tensor that lies in guarded memory


@dataclass(frozen=True)
class Op:
    """An op with its cases, backends, bound and costs.

    build(case, dtype, seed, device) -> Problem     seeded: the same arguments give the same bits
    run(function, problem) -> dict[str, Tensor]     calls the op, returns every tensor that it wrote or returned
    judge(problem, outputs, backend) -> list[Figure]
    bytes(case, dtype), flops(case)                 the least that any implementation must move and compute
    """

    name: str
    public: tuple[str, ...]  # names in steepest.reference that these cases cover
    cases: tuple[Case, ...]
    backends: Callable[[], tuple[Backend, ...]]
    build: Callable[[Case, torch.dtype, int, str], Problem]
    run: Callable[[Callable, Problem], dict[str, torch.Tensor]]
    judge: Callable[[Problem, dict[str, torch.Tensor], Backend], list[Figure]]
    bytes: Callable[[Case, torch.dtype], int]
    flops: Callable[[Case], int]
    bound: str  # where the bound comes from: shown by `validate --list` and in reports
    source: str  # the paper
    promises: tuple[str, ...] = ("threads",)  # "threads": the same bits with any number of CPU threads


_registry: dict[str, Op] = {}


def register(op: Op) -> Op:
    if op.name in _registry:
        raise ValueError(f"register: op {op.name!r} is registered already")
    _registry[op.name] = op
    return op


def registered_ops() -> dict[str, Op]:
    """All ops, by name; imports every file under cases/."""
    from steepest.conformance import cases

    for module in pkgutil.iter_modules(cases.__path__):
        importlib.import_module(f"{cases.__name__}.{module.name}")
    return dict(sorted(_registry.items()))


def coverage(ops: dict[str, Op] | None = None) -> list[str]:
    """What is missing: registered ops without cases, backends or dtypes, and references that no op's cases cover."""
    import steepest.reference

    ops = registered_ops() if ops is None else ops
    missing = []
    for op in ops.values():
        if not op.cases:
            missing.append(f"{op.name}: no cases")
        names = {backend.name for backend in op.backends()}
        missing += [f"{op.name}: no backend {name}" for name in COLUMNS if name not in names]
        missing += [
            f"{op.name}: no case of dtype {d}" for d in DTYPES if op.cases and not any(d in c.dtypes for c in op.cases)
        ]
    covered = {name for op in ops.values() if op.cases for name in op.public}
    missing += [f"reference.{name}: no op covers it" for name in steepest.reference.__all__ if name not in covered]
    return missing
