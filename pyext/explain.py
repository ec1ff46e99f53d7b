"""`steepest.explain(op, ...)`: which path a call would take, and why, without taking it."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from typing import Callable


@dataclass(frozen=True)
class Explanation:
    """What a call would do: `str()` of it is a table, `facts` holds the same by name."""

    op: str
    facts: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        width = max((len(name) for name in self.facts), default=0)
        lines = [self.op]
        for name, value in self.facts.items():
            first, *rest = str(value).splitlines() or [""]
            lines.append(f"  {name:<{width}}  {first}")
            lines += [" " * (width + 4) + line for line in rest]
        return "\n".join(lines)

    __repr__ = __str__


def explain(op: str | Callable, *args, **kwargs) -> Explanation:
    """Says which path `op(*args, **kwargs)` would take, and why; nothing is computed or changed.

    op: "adamw_", "polar" or "inverse_root", or the function itself.  The arguments are those of the op.  For adamw_ the
    lists after params may be left out, as may all numbers: gradients and states like the parameters are assumed then.

    Raises ValueError for an unknown op, and what the op itself would raise for arguments that it refuses.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in EXPLAINERS:
        raise ValueError(f"explain: op is {name!r}, expected one of {', '.join(sorted(EXPLAINERS))}")
    return EXPLAINERS[name](*args, **kwargs)


def _adamw(
    params, grads=None, exp_avgs=None, exp_avg_sqs=None, *, max_exp_avg_sqs=None, backend="auto", step=1, **_numbers
) -> Explanation:
    from steepest import check, engine, layout, rules

    op = "adamw_"
    rule = rules.adam(op, amsgrad=max_exp_avg_sqs is not None, decoupled=True)
    roles = [params, *(params if role is None else role for role in (grads, exp_avgs, exp_avg_sqs))]
    roles += [] if max_exp_avg_sqs is None else [max_exp_avg_sqs]
    names = rule.names
    check.tensor_lists(op, names, roles)
    check.rows(op, names, roles, rule.written, rule.dtypes)
    if not params:
        return Explanation(op, {"tensors": "0: nothing to do"})
    chosen = engine.choose_backend(op, backend, params[0])
    rows = list(zip(*roles))
    in_place = sum(layout.is_dense(row[0]) and all(layout.same_layout(row[0], t) for t in row[1:]) for row in rows)
    groups = list(layout.by_device_and_dtype(roles))
    elements = sum(p.numel() for p in params)
    moved = sum(rule.moved([t.numel() * t.element_size() for t in row]) for row in rows)
    facts = {
        "backend": f"{chosen} ({_adamw_why(backend, chosen, params[0])})",
        "tensors": f"{len(params)}, {elements:,} elements, on {', '.join(sorted({str(p.device) for p in params}))}",
        "dtypes": "\n".join(_dtypes(names, [role[group[0]] for role in roles], len(group)) for group in groups),
        "layout": f"{in_place} rows worked on in place"
        + (
            f", {len(rows) - in_place} copied in and out (gaps, or layouts that differ within the row)"
            if in_place < len(rows)
            else ""
        ),
        "bytes": f"{moved:,} in all, {moved / elements:.4g} per element" if elements else "0",
        "launches": "\n".join(_adamw_launches(rule, chosen, group, roles, step) for group in groups),
        "rounding": "float32 inside, in torch.optim.AdamW's order; each result rounded once to its tensor's dtype",
    }
    return Explanation(op, facts)


def _adamw_why(asked: str, chosen: str, param) -> str:
    if asked != "auto":
        return "as asked"
    if chosen == "triton":
        return f"parameters are on {param.device}, and this build has no CUDA kernels"
    return f"parameters are on {param.device}"


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(names, row, count: int) -> str:
    return ", ".join(f"{name} {_name(t.dtype)}" for name, t in zip(names, row)) + f" ({count} rows)"


def _adamw_launches(rule, chosen: str, group: list[int], roles, step) -> str:
    if chosen == "cpu":
        import torch

        return f"1 call, at most {torch.get_num_threads()} threads"
    if chosen == "triton":
        return "1, or 2 where some addresses are not multiples of 16 bytes"
    from steepest._native import lib

    steps = sorted({step[i] for i in group}) if isinstance(step, (list, tuple)) else [step]
    index = [steps.index(step[i]) for i in group] if len(steps) > 1 else []
    count = lib.launches(
        rule.number, rule.flags, len(rule.states), [roles[0][i].numel() for i in group], index, len(steps)
    )
    return f"{count}"


def _polar(
    x, *, schedule="polar-express", steps=5, lower=1e-3, tol=None, norm="auto", dtype=None, form="auto", force=False,
    backend="auto",
) -> Explanation:  # fmt: skip
    from steepest.matrix.polar import plan

    options = {"schedule": schedule, "steps": steps, "lower": lower, "tol": tol, "norm": norm, "working": dtype}
    todo = plan(x.shape, x.dtype, x.device, form=form, force=force, backend=backend, **options)
    other = plan(x.shape, x.dtype, x.device, backend=backend, form="plain", **options)
    s = todo.schedule
    low = s.lower**0.5
    coefficients = "\n".join("  ".join(f"{c:9.6f}" for c in row) for row in s.coefficients)
    saved = f"{other.flops / todo.flops:.2f} times fewer FLOPs than the plain form" if todo.flops else "nothing to do"
    why = {
        "gram": f"iterates the small Gram matrix, {saved}",
        "plain": "iterates the matrix itself, the cheaper form here",
    }
    facts = {
        "backend": f"{todo.backend} ({'as asked' if backend != 'auto' else f'x is on {x.device}'})",
        "shape": f"{tuple(x.shape)} {_name(x.dtype)}, worked on in {_name(todo.dtype)}",
        "form": f"{todo.form}: {why[todo.form]}",
        "restarts": f"after step {', '.join(map(str, todo.restarts))}" if todo.restarts else "none",
        "norm": f"{todo.norm}: {NORM_TEXT[todo.norm]}",
        "schedule": f"{s.name}, {s.steps} steps of degree {s.degree} in X X^T\n{coefficients}",
        "certificate": f"|1 - f(s)| <= {s.error:.3g} for singular values s >= {low:g} times the norm of x that is used",
        "map": singular_value_map(s),
        "slope": f"{s.slope:.4g}: smaller singular values, and rounding errors, grow at most so much",
        "safe up to": f"{s.largest_safe:.6g}: an input whose norm is underestimated by more diverges",
        "products": f"{todo.grams} Gram, {todo.symmetric_products} symmetric, {todo.long_products} long",
        "launches": launches(todo, todo.grams + todo.symmetric_products + todo.long_products),
        "flops": f"{todo.flops:,}",
    }
    return Explanation("polar", facts)


NORM_TEXT = {
    "frobenius": "the root of the sum of squares",
    "schatten4": "of the Gram matrix that the first step needs; tighter, no product more",
    "schatten8": "of the square of the Gram matrix that the first step needs; tighter still, no product more",
}


def launches(todo, products: int) -> str:
    if todo.backend == "native":
        return "none: one call of the C library for the whole batch"
    if todo.backend != "triton":
        return "none: torch's products"
    if todo.resident:
        return "1 for all products of the batch: a program takes a matrix through all steps"
    return f"{products}, one per product for the whole batch"


def singular_value_map(schedule) -> str:
    """s -> f(s) for singular values s relative to the norm: two lines, and their plot over s from 1e-5 to 1."""
    points = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
    values = [schedule.apply(s**schedule.p) for s in points]
    lines = ["s    " + " ".join(f"{s:>6.3g}" for s in points), "f(s) " + " ".join(f"{v:>6.3f}" for v in values)]
    columns = [schedule.apply(10 ** (schedule.p * (5 * k / 64 - 5))) for k in range(65)]
    for low in (1.2, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0):
        marks = "".join("*" if low <= v < low + 0.2 else " " for v in columns)
        lines.append(f"{low:>4.1f} |{marks}".rstrip())
    return "\n".join([*lines, f"     {'1e-5':<13}{'1e-4':<13}{'1e-3':<13}{'1e-2':<13}{'0.1':<10}1"])


def _inverse_root(
    a, p=4, *, ridge=1e-6, absolute=False, tol=1e-3, method="auto", precision="auto", backend="auto", **_rest
) -> Explanation:
    from steepest.matrix.root_plan import RIDGE_FLOOR, plan

    options = {"p": p, "ridge": ridge, "absolute": absolute, "tol": tol, "precision": precision, "backend": backend}
    todo = plan(a.shape, a.dtype, a.device, method=method, **options)
    s = todo.schedule
    facts = {
        "backend": f"{todo.backend} ({'as asked' if backend != 'auto' else f'a is on {a.device}'})",
        "shape": f"{tuple(a.shape)} {_name(a.dtype)}, worked on in {_name(todo.dtype)}",
        "method": f"{todo.method}: {todo.why}",
        "ridge": f"{ridge:g}{'' if absolute else ' times a bound of the largest eigenvalue'}",
        "precision": f"{todo.precision}, polynomials bear ridges from {RIDGE_FLOOR[todo.precision]:g} times lambda",
    }
    if s is not None:
        rows = "\n".join("  ".join(f"{c:12.6f}" for c in row) for row in s.coefficients)
        facts["float64"] = "the two most sensitive products of the first step" if todo.wide else "none of the products"
        facts["mirrored"] = "all products" if todo.mirrored else "squares only: others would lose what is small"
        facts["schedule"] = f"{s.name}, {s.steps} steps\n{rows}"
        facts["certificate"] = f"relative error of every eigenvalue of the root <= {s.error:.3g}, before rounding"
        facts["products"] = f"{todo.products} per matrix, {todo.group} matrices walked through all steps at once"
        facts["launches"] = launches(todo, todo.products)
    facts["flops"] = f"{todo.flops:,}"
    return Explanation("inverse_root", facts)


EXPLAINERS: dict[str, Callable[..., Explanation]] = {"adamw_": _adamw, "inverse_root": _inverse_root, "polar": _polar}


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape like 768x3072") from None


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if "--plan" in argv:
        from steepest.planning import command

        return command.main([word for word in argv if word != "--plan"])
    parser = argparse.ArgumentParser(
        "python -m steepest explain",
        description="Which path an op takes for tensors of these shapes, and why.",
        epilog="explain --plan --help: what optimizers' steps cost on many ranks.",
    )
    parser.add_argument("op", choices=sorted(EXPLAINERS))
    parser.add_argument("shapes", nargs="+", type=_shape, metavar="SHAPE", help="such as 768x3072; several for adamw_")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64"))
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--schedule", help="polar: a named schedule, minimax or tuned")
    parser.add_argument("--steps", type=int, help="polar")
    parser.add_argument("--norm", help="polar: frobenius, schatten4 or schatten8")
    parser.add_argument("--tol", type=float, help="polar, inverse_root: as many steps as reach it")
    options = parser.parse_args(argv)
    import torch

    names = {"polar": ("schedule", "steps", "tol", "norm"), "inverse_root": ("tol",)}.get(options.op, ())
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    try:
        tensors = [torch.empty(s, dtype=getattr(torch, options.dtype), device=options.device) for s in options.shapes]
        if options.op in ("polar", "inverse_root"):
            for x in tensors:
                print(explain(options.op, x, backend=options.backend, **given))
        else:
            print(explain(options.op, tensors, backend=options.backend, **given))
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AssertionError) as error:
        print(f"explain: {error}", file=sys.stderr)
        return 2
    return 0
