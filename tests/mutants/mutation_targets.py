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
    def compiled(self) -> bool:
        return self.file.startswith("csrc/")

    @property
    def interpreted(self) -> bool:
        return "triton-interpreted" in self.backends or any("interpret" in test for test in self.tests)

    def mutants(self) -> Iterator[Mutant]:
        text = (ROOT / self.file).read_text()
        spared = {line for begin in SPARED.get(self.file, {}) for line in block(self.file, text, begin)}
        yield from (m for m in mutants(self.file, text, self.functions, self.skip) if m.line not in spared)
        for old, new in self.roundings:
            if text.count(old) != 1:
                raise LookupError(f"{self.file} has {old!r} {text.count(old)} times, expected once")
            begin = text.index(old)
            line = text[:begin].count("\n") + 1
            yield Mutant(self.file, line, "rounding", old, new, text.replace(old, new), begin, begin + len(old), new)

    def reason(self, mutant: Mutant) -> str:
        """Why a mutant is equivalent; "" when it is not."""
        return mutation_equivalents.reason(mutant.file, mutant.before, mutant.after)


# Parts of targets that are not mutated, by how their first line begins, and why.
SPARED = {
    "csrc/matrix/program.cpp": {
        "struct Spread {": "how work is spread over threads: time and memory, not results",
        "int64_t side(": "how large a thread's part of a product is: time, not results",
        "static int64_t rows_per_task(": "how large a thread's part of a loop is: time, not results",
    },
}


def block(file: str, text: str, begin: str) -> range:
    """Numbers of the lines from the one that begins so to the one that closes it; LookupError when there is none."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.strip().startswith(begin)), None)
    if first is None:
        raise LookupError(f"{file} has no line that begins with {begin!r}")
    indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
    last = next(i for i in range(first + 1, len(lines)) if lines[i].startswith(f"{indent}}}"))
    return range(first + 1, last + 2)


FORMULAS, KEPT, ADAMW_STEP = (
    "tests/formula/test_formulas.py",
    "tests/formula/test_kept.py",
    "tests/cpu/test_adamw_step.py",
)
POLAR, VERBS, SCHEDULES = "tests/cpu/test_polar.py", "tests/cpu/test_verbs.py", "tests/reference/test_schedules.py"
NORM_BOUNDS = "tests/cpu/test_polar_norms.py"

TRAJECTORIES = "tests/cpu/test_sam_trajectories.py"
NORMS, SAM, RULES, STORAGE, ROOTS = (
    f"tests/cpu/test_{name}.py" for name in ("norms", "sam", "rules", "storage", "roots")
)
MATRIX_CORE, MATRIX_SIZES = "tests/matrix/test_matrix_core.py", "tests/cpu/test_workspace_sizes.py"
CAPTURABLE, MEASURE = "tests/cpu/test_capturable.py", "tests/cpu/test_measure.py"
DEFINITIONS, CORNERS = "tests/reference/test_definitions.py", "tests/reference/test_corners.py"
ZOO = "tests/cpu/test_zoo.py"
CUDA_HOST, CUDA_CORNERS, CUDA_VECTORS, LIVE_VALUES, STEP_PLAN, OTHER_PLANS = (
    f"tests/cuda_host/test_{name}.py"
    for name in ("cuda_host", "cuda_corners", "cuda_vectors", "cuda_live_values", "step_plan", "live_and_survey_plans")
)

STREAMS, GRADIENT_STAGE = "tests/cpu/test_streams.py", "tests/cpu/test_gradient_stage.py"
RANDOM_BITS, SURVEY_ORDER = "tests/cpu/test_random_bits.py", "tests/cpu/test_survey_order.py"
PAGE_ENDS, SURVEYS, ENGINE_CORNERS = (
    f"tests/cpu/test_{name}.py" for name in ("page_ends", "surveys", "engine_corners")
)
ENGINE = (ENGINE_CORNERS, PAGE_ENDS, ADAMW_STEP, STORAGE)
NATIVE_PROGRAMS, NATIVE_SIZES = "tests/cpu/test_native_programs.py", "tests/cpu/test_native_sizes.py"
TRITON_CORNERS = "tests/interpret/test_triton_corners.py"
# Of the CUDA source on the host: sanitizers compile switches for minutes, and what they see is no result.
SLOW_HOST = "(mutations or sanitizers or 2_to_32)"

NO_RESULT = r"constexpr|prefetch|__builtin_cpu|ahead|later \+=|next_run"  # speed depends on these lines, no result

# What Triton's AdamW computes, for mutants with another rounding.
V = "v = v * beta2 + (beta2_rest * g) * g"
ROOT_AND_EPS = "(square_root(v if vmax is None else vmax) + s.eps)"
DENOMINATOR = "tl.sqrt_rn(second) + eps"
STEP = f"p + tl.div_rn(negative_step_size * m, {DENOMINATOR})"

LISTED = (
    Target(
        "csrc/formula/adam.h",
        "^adam",
        ("cpu",),
        roundings=(
            ("(s.beta2_rest * g) * g", "s.beta2_rest * (g * g)"),
            ("sqrtf(second) + s.eps", "sqrtf(second + s.eps * s.eps)"),
            (
                "(s.negative_step_size * m) / (sqrtf(second) + s.eps)",
                "s.negative_step_size * (m / (sqrtf(second) + s.eps))",
            ),
        ),
    ),
    Target("csrc/formula/number.h", "adamw", ("cpu",), (FORMULAS,)),
    Target(
        "csrc/engine/stages.cpp",
        "^(adamw|sgd)",  # with states and without
        ("cpu",),
        (FORMULAS, "tests/formula/test_streaming.py", GRADIENT_STAGE),
        skip="__builtin_cpu|prefetch",
    ),
    Target(
        "csrc/engine/survey_stages.cpp",
        "^perturb",
        ("cpu",),
        (SURVEYS, FORMULAS, NORMS),
        skip="prefetch|static_assert",
    ),
    # Speed alone depends on what is skipped.
    Target("csrc/engine/stages.h", "adamw", ("cpu",), (FORMULAS,), skip="kTile|kNear|kTogether"),
    # Constants that are tuned, here and below: other values give the same results at another speed.
    Target("csrc/engine/cpu.cpp", "^(adam|sgd|perturb)", ("cpu",), (STREAMS, RANDOM_BITS, *ENGINE), skip="constexpr"),
    Target("csrc/engine/cpu_survey.cpp", "^perturb", ("cpu",), (PAGE_ENDS, SURVEYS, NORMS, SAM), skip="prefetch"),
    Target("csrc/engine/cpu_threads.h", "adamw", ("cpu",), (FORMULAS,), skip="constexpr"),
    Target("csrc/engine/plan.h", "adamw", ("cpu",), (FORMULAS,), skip="constexpr"),
    Target("csrc/engine/cuda_plan.h", "", (), (STEP_PLAN, CUDA_VECTORS, CUDA_HOST), without=SLOW_HOST),
    Target("csrc/engine/cuda.cu", "", (), (CUDA_VECTORS, CUDA_HOST), without=SLOW_HOST),
    Target("csrc/engine/cuda_step.h", "", (), (CUDA_HOST,), without=SLOW_HOST),
    Target("csrc/engine/cuda_block.h", "", (), (CUDA_HOST,), without=SLOW_HOST),
    Target("csrc/engine/cuda_general.cu", "", (), (CUDA_HOST,), without=SLOW_HOST),
    Target("csrc/engine/storage_stages.cpp", "^(adam|sgd|perturb)", ("cpu",), (FORMULAS, *ENGINE)),
    *(
        Target(f"csrc/matrix/{name}", "polar|inverse_root", ("cpu",), tests, skip=NO_RESULT)
        for name, tests in (
            *((name, (MATRIX_CORE, MATRIX_SIZES)) for name in ("kernels.inc", "product.cpp", "product.h")),
            ("program.cpp", (NATIVE_SIZES, MATRIX_CORE, MATRIX_SIZES)),
        )
    ),
    # What is asked for in advance is a matter of speed.
    Target("csrc/matrix/kernels.h", "^(polar|inverse_root)", ("cpu",), (MATRIX_CORE,), skip="kLine|kTermsPerLine"),
    Target("csrc/matrix/ahead.h", "", (), (MATRIX_CORE,)),
    Target("csrc/formula/random.h", "adam", ("cpu",), (KEPT,)),
    Target("csrc/formula/storage.h", "adam", ("cpu",), (KEPT,)),
    # The tests descend and perturb masters as well, which are no ops of their own.
    Target("csrc/formula/perturb.h", "^(perturb|restore|normed_descent)", ("cpu",), (SAM, TRAJECTORIES), quick=False),
    Target("csrc/formula/survey.h", "^(perturb|weight_norm|path_normalize)", ("cpu",), (KEPT, SURVEY_ORDER, NORMS)),
    Target("csrc/formula/power.h", "^(perturb|adam)", ("cpu",), (KEPT,)),
    *(
        Target(f"csrc/engine/cuda_{name}", "", (), (OTHER_PLANS, CUDA_HOST, CUDA_CORNERS), without=SLOW_HOST)
        for name in ("live.cu", "live.h", "survey.cu", "survey.h")
    ),
    # Both devices read it; these tests build both, and compare them.
    Target("csrc/engine/live.h", "", (), (LIVE_VALUES, STEP_PLAN, CUDA_HOST), without=SLOW_HOST),
    *(
        Target(f"csrc/engine/{name}", "perturb", ("cpu",), (MEASURE, CAPTURABLE, NORMS))
        for name in ("measure.cpp", "measure.h")
    ),
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
            (DENOMINATOR, "(tl.sqrt(second.to(tl.float64)) + eps).to(tl.float32)"),
            (STEP, f"(p.to(tl.float64) + (negative_step_size * m).to(tl.float64) / ({DENOMINATOR})).to(tl.float32)"),
            (STEP, f"p + ((negative_step_size.to(tl.float64) * m) / ({DENOMINATOR})).to(tl.float32)"),
            (STEP, f"p + negative_step_size * tl.div_rn(m, {DENOMINATOR})"),
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
            (f"(s.negative_step_size * m) / {ROOT_AND_EPS}", f"s.negative_step_size * (m / {ROOT_AND_EPS})"),
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
    Target(
        "kernels/chain.py", "polar", ("triton-interpreted",), (TRITON_CORNERS, "tests/interpret/test_triton_chain.py")
    ),
    Target("kernels/grouped.py", "polar", (), (TRITON_CORNERS, "tests/interpret/test_triton_grouped.py")),
    *(
        Target(file, "polar", (), (TRITON_CORNERS, "tests/interpret/test_triton_muon.py"))
        for file in ("kernels/momentum.py", "kernels/long.py", "pyext/matrix/fused_muon.py")
    ),
    Target(
        "pyext/matrix/norm_bounds.py", "polar", ("cpu",), (NORM_BOUNDS,),
        functions=("initial_size", "tightened", "divided", "margin"),
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
        (SCHEDULES, "tests/reference/test_reach.py"),
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
    "csrc/matrix": {
        "kernels.cpp": "chooses an instruction set: speed; tests/matrix runs the machine's and the plain one",
        "matrix.cpp": "checks of arguments",
        "program.h": "declarations",
    },
    "kernels": {"__init__.py": "empty", "aot.py": "measures code, computes nothing; see tests/aot"},
    "pyext/reference": {"__init__.py": "imports"},
    "pyext/matrix": {"__init__.py": "empty", "triton_verbs.py": "passes arguments on"},
}

# How files are judged that are named after no op: (op, tests).
JUDGES = {
    "csrc/formula/lion.h": ("^(lion|sign)", ()),
    "csrc/formula/options.h": ("^(adam|sgd|lion)", (RULES, GRADIENT_STAGE)),
    "csrc/engine/rules.h": (
        "^(adam|sgd|adagrad|rmsprop|lion|sign|perturb|restore)",
        (SAM, CAPTURABLE, "tests/cpu/test_sam_precision.py"),
    ),
    "csrc/engine/traffic.cpp": ("^adamw", ("tests/cpu/test_traffic.py", RULES, SAM)),
    "csrc/engine/weight_norm.cpp": ("^weight_norm", ("tests/cpu/test_normalize.py",)),
    "kernels/blocks.py": ("^none", (TRITON_CORNERS, "tests/interpret/test_triton_statistics.py")),
    "kernels/statistics.py": (
        "^inverse_root",
        ("tests/interpret/test_triton_statistics_corners.py", "tests/interpret/test_triton_statistics.py"),
    ),
    "pyext/reference/dynamics.py": (
        "^none",
        (DEFINITIONS, "tests/cpu/test_dynamics.py", "tests/cpu/test_curvature.py"),
    ),
    "pyext/reference/normalize.py": (
        "^(path_normalize|weight_norm)",
        (DEFINITIONS, CORNERS, "tests/cpu/test_normalize.py"),
    ),
    "pyext/reference/roots.py": ("^inverse_root", (CORNERS, DEFINITIONS, "tests/reference/test_roots_reference.py")),
    "pyext/reference/rules.py": ("^(sgd|adam|adagrad|rmsprop|lion|sign)", (DEFINITIONS, RULES)),
    "pyext/reference/sam.py": ("^(perturb|restore)", (DEFINITIONS, SAM, TRAJECTORIES)),
    "pyext/reference/shampoo.py": ("^none", ("tests/cpu/test_shampoo.py",)),
    "pyext/reference/storage.py": ("^(adam|sgd|lion)", (CORNERS, STORAGE)),
    "pyext/matrix/muon_rule.py": (
        "^none",
        ("tests/cpu/test_muon_rule.py", "tests/cpu/test_muon.py", "tests/cpu/test_muon_matrices.py"),
    ),
    "pyext/matrix/native.py": (
        "^(polar|inverse_root)",
        (
            "tests/cpu/test_matrix_scratch.py",
            "tests/cpu/test_native.py",
            "tests/cpu/test_native_layouts.py",
            NATIVE_PROGRAMS,
        ),
    ),
    "pyext/matrix/root_plan.py": (
        "^inverse_root",
        ("tests/cpu/test_root_costs.py", NATIVE_PROGRAMS, ROOTS, "tests/cpu/test_root_precisions.py"),
    ),
    "pyext/matrix/roots.py": (
        "^inverse_root",
        ("tests/cpu/test_root_checks.py", "tests/cpu/test_root_corners.py", ROOTS, "tests/cpu/test_root_precisions.py"),
    ),
}

# How a file of these folders is judged that is not listed above: by the cells of the op that it is named after.
BACKENDS = {
    "csrc/formula": ("cpu",),
    "csrc/engine": ("cpu",),
    "csrc/matrix": ("cpu",),
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
                op, tests = JUDGES.get(file, (f"^{path.stem}", ()))
                yield Target(file, op, () if op == "^none" else BACKENDS[folder], tests)


TARGETS = (*LISTED, *unlisted())
