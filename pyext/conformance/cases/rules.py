"""SGD, Adagrad, RMSprop, Adam, Lion, sign descent: cases, bound, costs.

Bound.  As for AdamW (cases/adamw.py): every backend computes in float32 with one rounding per operation and one more at
each store, so running the reference's rule on tracked numbers (conformance.bounds) bounds the distance of every result
from the exact (float64) trajectory, per element and for any number of steps.  A sign whose argument is within its error
of zero may come out either way: 2 lr in p.  Cautious and l1 decay branch on results, so their cases are judged by bits
alone.

Beyond the bound, all backends promise to equal the float32 reference bit for bit; this is judged too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from steepest import reference
from steepest.conformance.backends import native_cuda_missing
from steepest.conformance.bounds import Tracked
from steepest.conformance.cases import kept
from steepest.conformance.cases.adamw import MATRICES, SIXTEEN_BIT, SPECIAL, flat
from steepest.conformance.compare import bits_figure, tracked_figures
from steepest.conformance.memory import Guarded
from steepest.conformance.registry import DTYPES, Backend, Case, Figure, Op, Problem, register
from steepest.reference.rules import lerp, stepped

# Optional states, by the argument that they are passed as; the others are positional.
OPTIONAL = ("momentum_buffers", "grad_avgs", "max_exp_avg_sqs")
SQUARES = ("state_sums", "square_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
ULP_SCALE = 0.1  # for differences; an error in ulp of such an element itself would say nothing


@dataclass(frozen=True)
class RuleCase(Case):
    states: tuple[str, ...] = ()
    hyper: tuple[tuple[str, Any], ...] = ()  # keyword arguments of the op
    shapes: tuple[tuple[int, ...], ...] = ((257,), (16, 33))
    layouts: tuple[str, ...] = ("contiguous",)  # of p, g, states; the last one is used for the rest
    offsets: tuple[int, ...] = (0,)  # elements past an aligned address, by role in the same way
    steps: int = 2
    first_step: int = 1
    grad_scale: float | None = None
    clip_coefficient: float | None = None
    found_inf: float | None = None
    values: str = "usual"  # "usual" | "fresh" (zero states) | "special" (NaN, inf, huge, tiny)
    grad_dtype: str | None = None
    state_dtype: str | None = None
    keeps: tuple[str, ...] = ()  # see kept.py

    @property
    def roles(self) -> tuple[str, ...]:
        return ("params", "grads", *self.states)

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.hyper)

    @property
    def branches(self) -> bool:
        """Whether results decide what is computed."""
        return bool(self.options.get("cautious") or self.options.get("l1") or self.options.get("clip_value"))


def _values(case: RuleCase, role: str, shape, generator) -> torch.Tensor:
    def normal():
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if role == "params":
        x = 0.5 * normal()
    elif role == "grads":  # magnitudes over four decades, as across the layers of a network
        x = normal() * torch.pow(10.0, -4 * torch.rand(shape, generator=generator, dtype=torch.float64))
        x = x * (case.grad_scale or 1.0)
    else:  # a mean square is larger than the square of the mean
        x = 0.05 + normal().square() if role in SQUARES else 0.1 * normal().clamp(-2, 2)
    if case.values == "fresh" and role not in ("params", "grads"):
        x = torch.zeros_like(x)
    if case.values == "special":
        where = torch.rand(shape, generator=generator) < 0.4
        pick = torch.randint(len(SPECIAL), shape, generator=generator)
        x = torch.where(where, torch.tensor(SPECIAL, dtype=torch.float64)[pick], x)
        x = x.abs() if role in SQUARES else x
    return x


def build(case: RuleCase, dtype: torch.dtype, seed: int, device: str = "cpu") -> Problem:
    generator = torch.Generator().manual_seed(seed)
    dtypes = {role: DTYPES.get(case.state_dtype, dtype) for role in case.roles}
    dtypes |= {"params": dtype, "grads": DTYPES.get(case.grad_dtype, dtype)}

    def draw(role):
        return [_values(case, role, shape, generator).to(dtypes[role]) for shape in case.shapes]

    values = {role: draw(role) for role in case.roles}
    values |= kept.lists(case, values, generator)
    later = [draw("grads") for _ in range(case.steps - 1)]
    tensors, guards = {}, []
    for i, role in enumerate(case.roles):
        layout = case.layouts[min(i, len(case.layouts) - 1)]
        offset = case.offsets[min(i, len(case.offsets) - 1)]
        placed = [Guarded(x, layout=layout, offset=offset, device=device) for x in values[role]]
        tensors[role] = [g.view for g in placed]
        guards += placed
    for role in kept.added_roles(case):
        placed = [Guarded(x, device=device) for x in values[role]]
        tensors[role] = [g.view for g in placed]
        guards += placed
    tensors["later_grads"] = [[g.to(device) for g in grads] for grads in later]
    for name in ("grad_scale", "clip_coefficient", "found_inf"):
        value = getattr(case, name)
        tensors[name] = None if value is None else torch.tensor([value], device=device)
    return Problem(case, dtype, tensors, {"start": values, "later_grads": later}, guards)


def run(function, problem: Problem) -> dict[str, torch.Tensor]:
    case, t = problem.case, problem.tensors
    positional = [role for role in case.roles if role not in OPTIONAL or (role, len(case.states)) == (OPTIONAL[0], 1)]
    for k in range(case.steps):
        if k:
            for g, new in zip(t["grads"], t["later_grads"][k - 1]):
                g.copy_(new)
        function(
            *(t[role] for role in positional),
            **{role: t[role] for role in case.roles if role not in positional},
            **case.options,
            step=case.first_step + k,
            grad_scale=t["grad_scale"],
            clip_coefficient=t["clip_coefficient"],
            found_inf=t["found_inf"],
            **kept.keywords(case, t),
        )
        for source, p in zip(t.get("sources", ()), t["params"]):
            source.copy_(p)
    written = [role for role in (*case.roles, *kept.added_roles(case)) if role != "grads"]
    return {f"{role}[{i}]": x for role in written for i, x in enumerate(t[role])}


class Number(Tracked):
    """A tracked number with a sign."""

    def _result(self, value, error) -> Number:
        return Number(value, error, self.dtype).stored(self.dtype)

    def stored(self, dtype) -> Number:
        x = super().stored(dtype)
        return Number(x.value, x.error, x.dtype)

    def sign(self) -> Number:
        uncertain = (self.value.abs() <= self.error) & (self.error > 0)
        value = torch.where(self.value.isnan(), self.value, self.value.sign())
        return Number(value, torch.where(uncertain, 2.0, 0.0).double(), self.dtype)


def tracked_run(rule: str, problem: Problem) -> dict[str, Tracked]:
    """All elements after all steps: exact values, and how far from them rounding to float32 may lead."""
    case, work = problem.case, torch.float32

    def constant(value: float) -> Number:
        return Number.constant(value, work)

    first = problem.expected["start"]
    start = {role: flat(first[role]) for role in ("grads", *case.states)}
    start["params"] = flat(kept.logical_start(case, first))
    average = Number.exact(flat(first["averages"]), work) if "averages" in case.keeps else None
    p, states = Number.exact(start["params"], work), [Number.exact(start[role], work) for role in case.states]
    options = case.options
    maximize = options.pop("maximize", False)
    options = {name: value for name, value in options.items() if name not in ("cautious", "l1", "clip_value")}
    if "grad_avgs" in case.states:
        options["centered"] = True
    if "decoupled" not in options and rule in ("lion", "sign"):
        options["decoupled"] = True
    for k in range(0 if case.found_inf else case.steps):
        g = Number.exact(start["grads"] if k == 0 else flat(problem.expected["later_grads"][k - 1]), work)
        g = g if case.grad_scale is None else g / constant(case.grad_scale)
        g = g if case.clip_coefficient is None else g * constant(case.clip_coefficient)
        g = Number(-g.value, g.error, work) if maximize else g
        noise = kept.noise(case, case.first_step + k, work)
        g = g if noise is None else g + Number.exact(noise, work)
        p, states = stepped(rule, p, g, states, constant, step=case.first_step + k, **options)
        average = average and lerp(average, p, constant(1 - kept.average_decay(case)))
        p = p.stored(start["params"].dtype)
        states = [x.stored(start[role].dtype) for x, role in zip(states, case.states)]
    return {"params": p, **dict(zip(case.states, states)), **({"averages": average} if average else {})}


def judge_rule(rule: str, problem: Problem, outputs: dict[str, torch.Tensor], backend: Backend) -> list[Figure]:
    case, figures = problem.case, []
    if not case.branches and kept.is_tracked(case):
        for role, expected in tracked_run(rule, problem).items():
            tensors = [outputs[f"{role}[{i}]"] for i in range(len(case.shapes))]
            x = flat(kept.logical(case, outputs) if role == "params" else tensors)
            figures += tracked_figures(role, x, expected, 0.0 if role in SQUARES else ULP_SCALE)
    if backend.exact:
        twin = {role: [x.clone() for x in tensors] for role, tensors in problem.expected["start"].items()}
        twin["later_grads"] = problem.expected["later_grads"]
        for name in ("grad_scale", "clip_coefficient", "found_inf"):
            twin[name] = None if problem.tensors[name] is None else problem.tensors[name].cpu()
        same = run(getattr(reference, f"{rule}_"), Problem(case, problem.dtype, twin, {}))
        figures.append(bits_figure("bits", ((outputs[name], same[name]) for name in same), "against the reference"))
    return figures


def elements(case: RuleCase) -> int:
    return sum(math.prod(shape) for shape in case.shapes)


def least_bytes(case: RuleCase, dtype: torch.dtype) -> int:
    """Read p, g and the states, write p and the states: 12 + 8 states bytes per element in float32."""
    grad = DTYPES.get(case.grad_dtype, dtype).itemsize
    state = DTYPES.get(case.state_dtype, dtype).itemsize
    return elements(case) * case.steps * (2 * dtype.itemsize + grad + 2 * state * len(case.states))


def shared_cases(states: tuple[str, ...], **hyper) -> list[RuleCase]:
    """What every rule goes through."""

    def case(id: str, *, options: dict | None = None, **fields) -> RuleCase:
        fields.setdefault("states", states)
        return RuleCase(id, hyper=tuple({**hyper, **(options or {})}.items()), **fields)

    tails = tuple((n,) for n in [*range(1, 20), 31, 33, 63, 65, 127, 129])
    return [
        case("two steps"),
        case("20 steps", steps=20, values="fresh"),
        case("tails", shapes=tails),
        case("0-dim and empty", shapes=((), (0,), (1,), (3, 0, 2), (5,))),
        case("several tiles and threads", shapes=((200_003,),)),
        case("misaligned, each differently", shapes=((130,), (67,)), offsets=(1, 3, 5, 7)),
        case("layout: all different", shapes=MATRICES, layouts=("transposed", "contiguous", "gaps")),
        case("layout: channels_last", shapes=MATRICES, layouts=("channels_last",)),
        case("maximize", options={"maximize": True}),
        case("weight decay", options={"weight_decay": 0.1}),
        case("grad_scale and clip_coefficient", grad_scale=1280.0, clip_coefficient=0.3),
        case("found_inf 1", found_inf=1.0),
        case("clip_value", options={"clip_value": 0.01}),
        case("l1", options={"l1": 0.7}),
        case("special values", values="special", shapes=((400,),)),
        case("float32 states", state_dtype="float32", dtypes=SIXTEEN_BIT),
        case("bfloat16 grads", grad_dtype="bfloat16", dtypes=("float32",)),
        case("master", keeps=("masters",), state_dtype="float32", dtypes=SIXTEEN_BIT),
        case("16 correction bits", keeps=("residual16",), state_dtype="float32", dtypes=("bfloat16",)),
        case("8 correction bits", keeps=("residual8",), dtypes=("bfloat16",)),
        case("from a source", keeps=("sources",)),
        case("average and noise", keeps=("averages", "noise")),
        case("stochastic rounding", keeps=("stochastic",), steps=5, dtypes=("bfloat16",)),
        *(
            ()
            if not states
            else (case("8-bit states", keeps=("block8",), steps=5, shapes=((), (0,), (130,), (7, 65))),)
        ),
        case("8 correction bits, 8-bit states, noise", keeps=("residual8", "block8", "noise"), dtypes=("bfloat16",))
        if states
        else case("8 correction bits, noise", keeps=("residual8", "noise"), dtypes=("bfloat16",)),
    ]


def own_case(id: str, states: tuple[str, ...], first_step: int = 1, **hyper) -> RuleCase:
    return RuleCase(id, states=states, hyper=tuple(hyper.items()), steps=3, first_step=first_step)


LATE = 2**24 + 1  # a float cannot hold it; the numbers beside it are such that this shows in what is derived


DECOUPLED = dict(lr=1e-2, weight_decay=0.7, decoupled=True)  # rounding either to a float changes their product
LARGEST = 2.0**128 - 2.0**104  # float32
RULES: dict[str, tuple[list[RuleCase], str, str]] = {
    "sgd": (
        [
            *shared_cases(("momentum_buffers",), lr=1e-2, momentum=0.9, dampening=0.1),
            own_case("no momentum", (), lr=0.1, weight_decay=0.1),
            own_case("nesterov", ("momentum_buffers",), lr=0.1, momentum=0.95, nesterov=True),
            own_case("decoupled", ("momentum_buffers",), momentum=0.9, dampening=0.9, **DECOUPLED),
            RuleCase("average of few steps", hyper=(("lr", 0.1),), keeps=("averages", "short")),
            RuleCase(
                "late noise",
                states=("momentum_buffers",),
                hyper=(("lr", 0.1), ("momentum", 0.9)),
                keeps=("noise",),
                first_step=LATE + 8,
            ),
            own_case("cautious", ("momentum_buffers",), momentum=0.9, cautious=True, **DECOUPLED),
            own_case("cautious, by half", (), lr=0.5, weight_decay=1.0, decoupled=True, cautious=True),
            own_case("l1 of a half", (), lr=0.5, l1=1.0),
            RuleCase("clip_coefficient 3", hyper=(("lr", 0.1),), clip_coefficient=3.0),
            RuleCase(
                "clip_value, the largest float",
                hyper=(("lr", 0.1), ("clip_value", LARGEST)),
                values="special",
                shapes=((400,),),
            ),
        ],
        "5 per element with momentum",
        "Polyak 1964; Sutskever et al. 2013",
    ),
    "adagrad": (
        [
            *shared_cases(("state_sums",), lr=1e-2),
            own_case("lr_decay", ("state_sums",), lr=0.1, lr_decay=0.3, eps=1e-3),
            own_case("late, slow lr_decay", ("state_sums",), LATE, lr=0.09, lr_decay=1.2e-7),
            own_case("decoupled", ("state_sums",), **DECOUPLED),
            own_case("cautious", ("state_sums",), cautious=True, **DECOUPLED),
        ],
        "7 per element",
        "Duchi, Hazan & Singer 2011",
    ),
    "rmsprop": (
        [
            *shared_cases(("square_avgs",), lr=1e-2),
            own_case("momentum", ("square_avgs", "momentum_buffers"), lr=1e-2, alpha=0.9, momentum=0.9),
            own_case("centered", ("square_avgs", "grad_avgs"), lr=1e-2, eps=1e-3),
            own_case("centered, momentum", ("square_avgs", "grad_avgs", "momentum_buffers"), lr=1e-2, momentum=0.5),
            own_case("alpha 0.3", ("square_avgs", "grad_avgs"), lr=1e-2, alpha=0.3),
            own_case("decoupled", ("square_avgs",), **DECOUPLED),
            own_case("cautious", ("square_avgs",), cautious=True, **DECOUPLED),
        ],
        "9 per element",
        "Tieleman & Hinton 2012; Graves 2013 (centered)",
    ),
    "adam": (
        [
            *shared_cases(("exp_avgs", "exp_avg_sqs"), lr=1e-3),
            own_case("amsgrad", ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"), lr=1e-2, weight_decay=0.1),
            own_case("beta1 0.3", ("exp_avgs", "exp_avg_sqs"), lr=1e-2, betas=(0.3, 0.95)),
            # eps rounded, times the bias correction and rounded again, differs from the product rounded once.
            own_case("large eps", ("exp_avgs", "exp_avg_sqs"), lr=0.3, eps=1.3),
            own_case("late, slow", ("exp_avgs", "exp_avg_sqs"), LATE, lr=3e-3, betas=(0.99999997, 0.99999995)),
        ],
        "15 per element",
        "Kingma & Ba 2015; Reddi et al. 2018 (AMSGrad)",
    ),
    "lion": (
        [
            *shared_cases(("exp_avgs",), lr=1e-3),
            own_case("L2 decay", ("exp_avgs",), lr=1e-2, weight_decay=0.1, decoupled=False),
            own_case("cautious", ("exp_avgs",), lr=1e-2, weight_decay=0.1, cautious=True),
            own_case("betas 0", ("exp_avgs",), lr=1e-2, betas=(0.0, 0.0)),
        ],
        "8 per element",
        "Chen et al. 2023",
    ),
    "sign": (
        [
            *shared_cases((), lr=1e-3),
            own_case("L2 decay", (), lr=1e-2, weight_decay=0.1, decoupled=False),
            own_case("cautious", (), lr=1e-2, weight_decay=0.1, cautious=True),
        ],
        "3 per element",
        "Bernstein et al. 2018",
    ),
}
FLOPS = {"sgd": 5, "adagrad": 7, "rmsprop": 9, "adam": 15, "lion": 8, "sign": 3}


def _register(rule: str) -> None:
    def through(name):
        def function(*args, **kwargs):
            from steepest import multi_tensor

            return getattr(multi_tensor, f"{rule}_")(*args, backend=name, **kwargs)

        return function

    no_triton = "no Triton kernel for this rule; CUDA C++ has one"
    cases, cost, source = RULES[rule]
    register(
        Op(
            name=rule,
            public=(f"{rule}_",),
            cases=tuple(cases),
            backends=lambda: (
                Backend("reference", getattr(reference, f"{rule}_"), exact=False),
                Backend("cpu", through("cpu")),
                Backend("triton-interpreted", through("triton"), available=lambda: no_triton, exists=False),
                Backend("triton", through("triton"), "cuda", lambda: no_triton, exists=False),
                Backend("cuda", through("cuda"), "cuda", native_cuda_missing),
            ),
            build=build,
            run=run,
            judge=lambda problem, outputs, backend: judge_rule(rule, problem, outputs, backend),
            bytes=least_bytes,
            flops=lambda case: FLOPS[rule] * elements(case) * case.steps,
            bound="running error analysis of the reference in float32, per element; and its bits",
            source=f"{source}; {cost}",
        )
    )


for _name in RULES:
    _register(_name)
