"""AdamW: cases, bound, costs.

Bound.  Every backend computes in float32 with one rounding per operation and one more at each store.  Running the
reference's `element` on tracked numbers (conformance.bounds) from the same rounded inputs bounds the distance of p, m
and v from the exact (float64) trajectory, per element and for any number of steps.  What it comes to for one step, in
units of u = 2^-24 and to first order, counting roundings of operations and of derived scalars:

    v   4 |v|                       scalar, product | scalar, two products | sum; both terms are >= 0
    m   1 |m| + 3 (1-b1) |g - m|    difference, scalar, product | sum
    p   3 |p| + (m: its own error, in steps) + 10 |step|
                                    scalar, product | sum | scalar, product, root (half of v's 4, and 1), scalar,
                                    quotient, sum with eps, quotient
    16-bit storage adds u_store |x| per step to each (2^-8 for bfloat16, 2^-11 for float16); errors of earlier
    steps decay by beta1 in m and by beta2 in v.

Beyond the bound, all backends promise to equal the float32 reference bit for bit; this is judged too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable

import torch

from steepest import reference
from steepest.conformance.backends import interpreter_missing, native_cuda_missing, triton_missing
from steepest.conformance.bounds import Tracked
from steepest.conformance.compare import bits_figure, tracked_figures
from steepest.conformance.memory import LAYOUTS, Guarded
from steepest.conformance.registry import DTYPES, Backend, Case, Figure, Op, Problem, register
from steepest.reference.adamw import element, scalars

ROLES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
WRITTEN = ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
# Typical sizes, below which an error in ulp of the element itself would say nothing: p and m are differences.
ULP_SCALE = {"params": 0.1, "exp_avgs": 0.1, "exp_avg_sqs": 0.0, "max_exp_avg_sqs": 0.0}


@dataclass(frozen=True)
class AdamWCase(Case):
    shapes: tuple[tuple[int, ...], ...] = ((257,), (16, 33))
    layouts: tuple[str, ...] = ("contiguous",)  # of p, g, m, v, vmax; the last one is used for the rest
    offsets: tuple[int, ...] = (0,)  # elements past an aligned address, by role in the same way
    steps: int = 1
    first_step: int = 10
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    amsgrad: bool = False
    maximize: bool = False
    grad_scale: float | None = None
    found_inf: float | None = None
    values: str = "usual"  # "usual" | "fresh" (zero states) | "special" (NaN, inf, huge, tiny)
    grad_dtype: str | None = None
    state_dtype: str | None = None

    def hyper(self) -> dict:
        return {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}

    @property
    def roles(self) -> tuple[str, ...]:
        return ROLES if self.amsgrad else ROLES[:4]


MATRICES = ((24, 40), (3, 5, 7, 6), (65,))
SIXTEEN_BIT = ("bfloat16", "float16")
CASES = (
    AdamWCase("one step"),
    AdamWCase("first step", first_step=1, values="fresh"),
    AdamWCase("20 steps", steps=20, first_step=1, values="fresh", interpreted="full"),
    AdamWCase("tails", shapes=tuple((n,) for n in [*range(1, 20), 31, 33, 63, 65, 127, 129])),
    AdamWCase("0-dim and empty", shapes=((), (0,), (1,), (3, 0, 2), (), (5,))),
    AdamWCase("mixed list", shapes=((), (5003,), (0,), (1, 9), (50, 41), *((16,),) * 20), steps=2),
    AdamWCase("many tiny", shapes=((16,),) * 400, quick=False),
    AdamWCase("several tiles and threads", shapes=((200_003,),), interpreted="full"),
    *(AdamWCase(f"misaligned {k}", shapes=((130,), (67,)), offsets=(k,), quick=k in (1, 4)) for k in range(1, 8)),
    AdamWCase("misaligned, each differently", shapes=((130,), (67,)), offsets=(1, 3, 5, 7)),
    *(AdamWCase(f"layout {name}", shapes=MATRICES, layouts=(name,)) for name in LAYOUTS),
    AdamWCase("layout: grad transposed", shapes=MATRICES, layouts=("contiguous", "transposed", "contiguous")),
    AdamWCase("layout: all different", shapes=MATRICES, layouts=("transposed", "contiguous", "gaps", "channels_last")),
    AdamWCase("layout: param view with gaps", shapes=MATRICES, layouts=("gaps", "contiguous")),
    AdamWCase("no decay", weight_decay=0.0),
    AdamWCase("decay to 0.07", lr=0.3, weight_decay=3.1),  # where rounding lr or weight_decay first would show
    AdamWCase("beta1 0.5", betas=(0.5, 0.9)),  # the two forms of lerp meet here, and round differently
    AdamWCase("beta1 0.3", betas=(0.3, 0.95)),
    AdamWCase("betas 0", betas=(0.0, 0.0)),
    AdamWCase("lr 0", lr=0.0),
    AdamWCase("eps 0", eps=0.0, values="fresh"),
    AdamWCase("eps 0.1", eps=0.1, values="fresh", steps=3),
    AdamWCase("step 2^24 + 3", first_step=2**24 + 3),
    AdamWCase("amsgrad", amsgrad=True, steps=3),
    AdamWCase("maximize", maximize=True, steps=2),
    AdamWCase("grad_scale", grad_scale=1280.0, steps=2),
    AdamWCase("found_inf 0", found_inf=0.0, grad_scale=3.0),
    AdamWCase("found_inf 1", found_inf=1.0, grad_scale=3.0),
    AdamWCase("special values", values="special", amsgrad=False, shapes=((400,),), steps=2),
    AdamWCase("special values, amsgrad", values="special", amsgrad=True, maximize=True, shapes=((400,),), steps=2),
    AdamWCase("float32 states", state_dtype="float32", dtypes=SIXTEEN_BIT, steps=4),
    AdamWCase("float32 grads and states", grad_dtype="float32", state_dtype="float32", dtypes=SIXTEEN_BIT),
    AdamWCase("bfloat16 grads", grad_dtype="bfloat16", dtypes=("float32",), steps=2),
)

SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e19, -3e38, 3e-39, 1e-45, -1e-23, 65504.0, 6e-8, -6e-5)


def _values(case: AdamWCase, role: str, shape, generator) -> torch.Tensor:
    def normal():
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if role == "params":
        x = 0.5 * normal()
    elif role == "grads":  # magnitudes over four decades, as across the layers of a network
        x = normal() * torch.pow(10.0, -4 * torch.rand(shape, generator=generator, dtype=torch.float64))
        x = x * (case.grad_scale or 1.0)
    elif role == "exp_avgs":
        x = 0.1 * normal()
    else:
        x = 0.01 * normal().square()
    if case.values == "fresh" and role not in ("params", "grads"):
        x = torch.zeros_like(x)
    if case.values == "special" and role != "max_exp_avg_sqs":
        # Specials of each role fall on different elements often enough to be paired with usual values and each other.
        where = torch.rand(shape, generator=generator) < 0.4
        pick = torch.randint(len(SPECIAL), shape, generator=generator)
        x = torch.where(where, torch.tensor(SPECIAL, dtype=torch.float64)[pick], x)
        x = x.abs() if role == "exp_avg_sqs" else x
    return x


def build(case: AdamWCase, dtype: torch.dtype, seed: int, device: str = "cpu") -> Problem:
    generator = torch.Generator().manual_seed(seed)
    dtypes = dict.fromkeys(case.roles, dtype)
    dtypes["grads"] = DTYPES.get(case.grad_dtype, dtype)
    dtypes |= {role: DTYPES.get(case.state_dtype, dtype) for role in case.roles[2:]}

    def draw(role):
        return [_values(case, role, shape, generator).to(dtypes[role]) for shape in case.shapes]

    values = {role: draw(role) for role in case.roles}
    later = [draw("grads") for _ in range(case.steps - 1)]
    tensors, guards = {}, []
    for i, role in enumerate(case.roles):
        layout = case.layouts[min(i, len(case.layouts) - 1)]
        offset = case.offsets[min(i, len(case.offsets) - 1)]
        placed = [Guarded(x, layout=layout, offset=offset, device=device) for x in values[role]]
        tensors[role] = [g.view for g in placed]
        guards += placed
    tensors["later_grads"] = [[g.to(device) for g in grads] for grads in later]
    for name in ("grad_scale", "found_inf"):
        value = getattr(case, name)
        tensors[name] = None if value is None else torch.tensor([value], device=device)
    expected = {"start": values, "later_grads": later}
    return Problem(case, dtype, tensors, expected, guards)


def run(function, problem: Problem) -> dict[str, torch.Tensor]:
    case, t = problem.case, problem.tensors
    options = {"max_exp_avg_sqs": t["max_exp_avg_sqs"]} if case.amsgrad else {}
    for k in range(case.steps):
        if k:
            for g, new in zip(t["grads"], t["later_grads"][k - 1]):
                g.copy_(new)
        function(
            *(t[role] for role in ROLES[:4]),
            **case.hyper(),
            step=case.first_step + k,
            maximize=case.maximize,
            grad_scale=t["grad_scale"],
            found_inf=t["found_inf"],
            **options,
        )
    return {f"{role}[{i}]": x for role in case.roles if role in WRITTEN for i, x in enumerate(t[role])}


def flat(tensors) -> torch.Tensor:
    """All elements of a list of tensors in logical order: bounds are per element, so lists are judged in one go."""
    return torch.cat([x.detach().cpu().reshape(-1) for x in tensors])


def rule(p, g, m, v, vmax, constant, *, lr, betas, eps, weight_decay, step):
    """The reference's element, with derived scalars as constant(number)."""
    s = scalars(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=step)
    return element(p, g, m, v, vmax, s.map(constant))


def tracked_run(problem: Problem, work: torch.dtype = torch.float32, rule: Callable = rule) -> dict[str, Tracked]:
    """All elements after all steps: exact values, and how far from them a step may be whose operations, in the order of
    `rule`, are rounded to `work`.

    Derived scalars are float32 even where `work` is narrower: that is how torch multiplies 16-bit tensors by numbers.
    """
    case = problem.case

    def constant(value: float) -> Tracked:
        rounded = Tracked.constant(value, torch.float32)
        return Tracked(rounded.value, rounded.error, work)

    start = {role: flat(tensors) for role, tensors in problem.expected["start"].items()}
    x = {role: Tracked.exact(values, work) for role, values in start.items()}
    p, m, v, vmax = (x.get(role) for role in WRITTEN)
    for k in range(0 if case.found_inf else case.steps):
        g = x["grads"] if k == 0 else Tracked.exact(flat(problem.expected["later_grads"][k - 1]), work)
        if case.grad_scale is not None:
            g = g / constant(case.grad_scale)
        if case.maximize:
            g = -g
        new = rule(p, g, m, v, vmax, constant, **case.hyper(), step=case.first_step + k)
        p, m, v, vmax = (x and x.stored(start[role].dtype) for role, x in zip(WRITTEN, new))
    return dict(zip(WRITTEN, (p, m, v, vmax)))


def judge(problem: Problem, outputs: dict[str, torch.Tensor], backend: Backend) -> list[Figure]:
    case = problem.case
    exact = tracked_run(problem)
    figures = []
    for role in case.roles:
        if role in WRITTEN:
            x = flat(outputs[f"{role}[{i}]"] for i in range(len(case.shapes)))
            figures += tracked_figures(role, x, exact[role], ULP_SCALE[role])
    if backend.exact:
        twin = {role: [x.clone() for x in tensors] for role, tensors in problem.expected["start"].items()}
        twin["later_grads"] = problem.expected["later_grads"]
        for name in ("grad_scale", "found_inf"):
            twin[name] = None if problem.tensors[name] is None else problem.tensors[name].cpu()
        same = run(reference.adamw_, Problem(case, problem.dtype, twin, {}))
        figures.append(bits_figure("bits", ((outputs[name], same[name]) for name in same), "against the reference"))
    return figures


def elements(case: AdamWCase) -> int:
    return sum(math.prod(shape) for shape in case.shapes)


def least_bytes(case: AdamWCase, dtype: torch.dtype) -> int:
    """Read p, g and the states, write p and the states: 28 bytes per element in float32, 36 with AMSGrad."""
    grad = DTYPES.get(case.grad_dtype, dtype).itemsize
    state = DTYPES.get(case.state_dtype, dtype).itemsize
    return elements(case) * case.steps * (2 * dtype.itemsize + grad + 2 * state * (len(case.roles) - 2))


def flops(case: AdamWCase) -> int:
    """13 per element: p 1, m 3, v 4, denominator 2 (root, sum), update 3; one more for AMSGrad's maximum."""
    return elements(case) * case.steps * (14 if case.amsgrad else 13)


def backends() -> tuple[Backend, ...]:
    def through(name):
        def function(*args, **kwargs):
            from steepest.multi_tensor import adamw_

            return adamw_(*args, backend=name, **kwargs)

        return function

    return (
        Backend("reference", reference.adamw_, exact=False),
        Backend("cpu", through("cpu")),
        Backend("triton-interpreted", through("triton"), available=interpreter_missing),
        Backend("triton", through("triton"), "cuda", triton_missing),
        Backend("cuda", through("cuda"), "cuda", native_cuda_missing),
    )


OP = register(
    Op(
        name="adamw",
        public=("adamw_",),
        cases=CASES,
        backends=backends,
        build=build,
        run=run,
        judge=judge,
        bytes=least_bytes,
        flops=flops,
        bound="running error analysis of the reference in float32, per element; and its bits",
        source="Loshchilov & Hutter 2019, Decoupled Weight Decay Regularization; Reddi et al. 2018 (AMSGrad)",
    )
)
