"""What is mutated, which cells of `validate` and which tests must notice, and which mutants nobody can notice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mutation_equivalents
from mutation_rules import Mutant, mutants

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, eq=False)
class Target:
    """One source file.

    op, backends: the cells of `validate` that run first; those of all ops when none is called `op`.  tests: what runs
    when those do not notice; none for the
    headers of update rules, where `validate` alone must notice everything.  without: a test among them that is left
    out.  functions: mutate only inside these.
    skip: a regular expression for lines to leave alone.  quick: only the cells of `validate --quick`.
    roundings: (text, text with a rounding moved or left out).
    """

    file: str
    op: str
    backends: tuple[str, ...]
    tests: tuple[str, ...] = ()
    without: str = ""
    functions: tuple[str, ...] | None = None
    skip: str = ""
    quick: bool = True
    roundings: tuple[tuple[str, str], ...] = ()

    @property
    def native(self) -> bool:
        """Compiled into the library that the cells use."""
        return self.file.startswith("csrc/") and bool(self.backends)

    @property
    def interpreted(self) -> bool:
        return "triton-interpreted" in self.backends

    def mutants(self) -> Iterator[Mutant]:
        text = (ROOT / self.file).read_text()
        yield from mutants(self.file, text, self.functions, self.skip)
        for old, new in self.roundings:
            if text.count(old) != 1:
                raise LookupError(f"{self.file} has {old!r} {text.count(old)} times, expected once")
            line = text[: text.index(old)].count("\n") + 1
            yield Mutant(self.file, line, "rounding", old, new, text.replace(old, new))

    def reason(self, mutant: Mutant) -> str:
        """Why a mutant is equivalent; "" when it is not."""
        return mutation_equivalents.reason(mutant.file, mutant.before, mutant.after)


FORMULAS, ADAMW_STEP = "tests/formula/test_formulas.py", "tests/cpu/test_adamw_step.py"
POLAR, VERBS, SCHEDULES = "tests/cpu/test_polar.py", "tests/cpu/test_verbs.py", "tests/reference/test_schedules.py"
NORM_BOUNDS = "tests/cpu/test_polar_norms.py"

CAPTURABLE = "tests/cpu/test_capturable.py"
ZOO, CUDA_HOST = "tests/cpu/test_zoo.py", "tests/cuda_host/test_cuda_host.py"

# What Triton's AdamW computes, for mutants with another rounding.
V = "v = v * beta2 + (beta2_rest * g) * g"
DENOMINATOR = "tl.div_rn(tl.sqrt_rn(second), bias2_sqrt) + eps"
STEP = "p + tl.div_rn(negative_step_size * m, denominator)"

LISTED = (
    Target(
        "csrc/formula/adam.h",
        "^adam",
        ("cpu",),
        roundings=(
            ("(s.beta2_rest * g) * g", "s.beta2_rest * (g * g)"),
            ("sqrtf(second) / s.bias2_sqrt", "sqrtf(second / (s.bias2_sqrt * s.bias2_sqrt))"),
            ("(s.negative_step_size * m) / denominator", "s.negative_step_size * (m / denominator)"),
        ),
    ),
    Target("csrc/formula/number.h", "adamw", ("cpu",), (FORMULAS,)),
    Target(
        "csrc/engine/stages.cpp",
        "adamw",
        ("cpu",),
        (FORMULAS,),
        skip="__builtin_cpu",
    ),
    Target("csrc/engine/stages.h", "adamw", ("cpu",), (FORMULAS,), skip="kTile"),
    # Constants that are tuned, here and below: other values give the same results at another speed.
    Target("csrc/engine/cpu.cpp", "adamw", ("cpu",), (ADAMW_STEP,), skip="constexpr"),
    Target("csrc/engine/cpu_threads.h", "adamw", ("cpu",), (ADAMW_STEP,), skip="constexpr"),
    Target("csrc/engine/plan.h", "adamw", ("cpu",), (FORMULAS,), skip="constexpr"),
    Target("csrc/engine/cuda_plan.h", "", (), (CUDA_HOST,), without="mutations"),
    Target("csrc/engine/cuda.cu", "", (), (CUDA_HOST,), without="mutations"),
    Target("csrc/engine/cuda_block.h", "", (), (CUDA_HOST,), without="mutations"),
    Target("csrc/engine/cuda_general.cu", "", (), (CUDA_HOST,), without="mutations"),
    *(
        Target(f"csrc/engine/cuda_{name}", "", (), (CUDA_HOST,), without="mutations")
        for name in ("live.cu", "live.h", "survey.cu", "survey.h")
    ),
    *(
        Target(f"csrc/engine/{name}", "perturb", ("cpu",), (CAPTURABLE,))
        for name in ("live.h", "measure.cpp", "measure.h")
    ),
    Target("csrc/engine/storage_stages.cpp", "adam", ("cpu",), ("tests/cpu/test_storage.py",)),
    Target("csrc/formula/random.h", "adam", ("cpu",), ()),
    Target("csrc/formula/storage.h", "adam", ("cpu",), ()),
    Target(
        "kernels/adamw.py",
        "adamw",
        ("triton-interpreted",),
        ("tests/interpret/test_triton_adamw.py",),
        functions=("adamw_formula", "adamw_tile", "tile_pointers", "scalar_at", "adamw_kernel", "launch_arguments"),
        roundings=(
            ("m + lerp * toward", "(m.to(tl.float64) + lerp.to(tl.float64) * toward).to(tl.float32)"),
            ("g - toward * lerp_rest", "(g.to(tl.float64) - toward.to(tl.float64) * lerp_rest).to(tl.float32)"),
            (V, "v = (v.to(tl.float64) * beta2 + (beta2_rest * g) * g).to(tl.float32)"),
            (V, "v = v * beta2 + ((beta2_rest.to(tl.float64) * g) * g).to(tl.float32)"),
            (V, "v = (v * beta2 + (beta2_rest * g).to(tl.float64) * g).to(tl.float32)"),
            (V, "v = v * beta2 + beta2_rest * (g * g)"),
            (DENOMINATOR, "(tl.sqrt_rn(second).to(tl.float64) / bias2_sqrt + eps).to(tl.float32)"),
            (DENOMINATOR, "(tl.sqrt(second.to(tl.float64)) / bias2_sqrt).to(tl.float32) + eps"),
            (STEP, "(p.to(tl.float64) + (negative_step_size * m).to(tl.float64) / denominator).to(tl.float32)"),
            (STEP, "p + ((negative_step_size.to(tl.float64) * m) / denominator).to(tl.float32)"),
            (STEP, "p + negative_step_size * tl.div_rn(m, denominator)"),
            ("tl.div_rn(g, divisor)", "g * (1.0 / divisor)"),
        ),
    ),
    Target(
        "kernels/portable.py",
        "adamw|polar",
        ("triton-interpreted",),
        ("tests/interpret",),
        functions=("widen", "narrow"),
    ),
    Target(
        "kernels/symmetric.py",
        "polar",
        ("triton-interpreted",),
        ("tests/interpret/test_triton_symmetric.py",),
        functions=("symmetric_kernel",),
    ),
    Target(
        "kernels/tiles.py",
        "polar",
        ("triton-interpreted",),
        ("tests/interpret/test_triton_symmetric.py",),
        roundings=(
            ("acc = dot(left, right, acc, PRECISION)",
             "acc = dot(left, right, acc, PRECISION).to(tl.float16).to(tl.float32)"),
        ),
    ),
    Target(
        "pyext/reference/adamw.py",
        "adamw",
        ("reference", "cpu"),
        ("tests/reference/test_adamw_reference.py",),
        roundings=(
            ("x.double().sqrt().to(x.dtype) if", "x.sqrt() if"),
            ("beta2_rest=1 - beta2,", "beta2_rest=1 - float(torch.tensor(beta2)),"),
            ("(s.beta2_rest * g) * g", "s.beta2_rest * (g * g)"),
            ("(s.negative_step_size * m) / denominator", "s.negative_step_size * (m / denominator)"),
        ),
    ),
    Target("pyext/reference/polar.py", "polar", ("reference", "cpu"), (ZOO, POLAR)),
    Target(
        "pyext/matrix/polar.py",
        "polar",
        ("cpu", "triton-interpreted"),
        (POLAR,),
        functions=("_restarts", "normalised", "iterate", "_gram_form", "times", "_plain_form", "_polynomial",
                   "_plus_identity"),
    ),
    Target("pyext/matrix/tape.py", "polar", ("triton-interpreted",), ("tests/cpu/test_tape.py",)),
    Target("kernels/chain.py", "polar", ("triton-interpreted",), ("tests/interpret/test_triton_chain.py",)),
    Target("kernels/grouped.py", "polar", (), ("tests/interpret/test_triton_grouped.py",)),
    *(
        Target(file, "polar", (), ("tests/interpret/test_triton_muon.py",))
        for file in ("kernels/momentum.py", "kernels/long.py", "pyext/matrix/fused_muon.py")
    ),
    Target(
        "pyext/matrix/norm_bounds.py", "polar", ("cpu",), (NORM_BOUNDS,),
        functions=("initial_size", "tightened", "margin", "_divided"),
    ),
    Target(
        "pyext/matrix/verbs.py",
        "polar",
        ("cpu",),
        (VERBS, POLAR),
        quick=False,  # small matrices are computed in one panel
        functions=("gram", "symmetric_product", "long_product", "panel_ends", "_symmetric", "_flat"),
    ),
    Target(
        "pyext/schedules.py",
        "polar",
        ("reference", "cpu"),
        (SCHEDULES,),
        functions=("_step", "_stationary", "_image", "_reach", "intervals", "error", "slope", "largest_safe", "apply",
                   "_minimax", "_centred_step", "_best_step", "_taylor"),
    ),
)  # fmt: skip

# Files beside the targets, and why they are not mutated.
EXEMPT = {
    "csrc/formula": {},
    "csrc/engine": {
        "cuda_launch.h": "of two definitions of one macro; tests/cuda_host has the other",
        "engine.h": "declarations",
        "status.cpp": "texts",
        "status.h": "declarations",
    },
    "kernels": {"__init__.py": "empty", "aot.py": "measures code, computes nothing; see tests/aot"},
    "pyext/reference": {"__init__.py": "imports"},
    "pyext/matrix": {"__init__.py": "empty", "triton_verbs.py": "passes arguments on"},
}

# How a file of these folders is judged that is not listed above: by the cells of the op that it is named after.
BACKENDS = {
    "csrc/formula": ("cpu",),
    "csrc/engine": ("cpu",),
    "kernels": ("triton-interpreted",),
    "pyext/reference": ("reference", "cpu"),
    "pyext/matrix": ("cpu",),
}


def unlisted() -> Iterator[Target]:
    listed = {target.file for target in LISTED}
    for folder, exempt in EXEMPT.items():
        for path in sorted((ROOT / folder).iterdir()):
            file = f"{folder}/{path.name}"
            if path.suffix in (".h", ".cpp", ".cu", ".py") and path.name not in exempt and file not in listed:
                yield Target(file, f"^{path.stem}", BACKENDS[folder])


TARGETS = (*LISTED, *unlisted())
