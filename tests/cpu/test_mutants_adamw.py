"""Wrong AdamWs given to the conformance cases as a backend: every one must FAIL, for the reason that it is wrong."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from steepest.conformance import Backend, Cell, registered_ops, run_cell
from steepest.conformance.runner import FAIL, OK

OP = registered_ops()["adamw"]
F = torch.float32


def truncated(x, dtype):
    """bfloat16 by dropping the low half, as a kernel does that forgets to round."""
    if dtype != torch.bfloat16:
        return x.to(dtype)
    return (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def variant(
    params, grads, exp_avgs, exp_avg_sqs, *, lr, betas, eps, weight_decay, step, max_exp_avg_sqs=None, maximize=False,
    grad_scale=None, found_inf=None, mutation="",
):  # fmt: skip
    """AdamW written once more, with switches for the mistakes that people make."""
    if mutation == "no step" or (found_inf is not None and found_inf.item() and mutation != "ignores found_inf"):
        return
    beta1, beta2 = betas[::-1] if mutation == "betas swapped" else betas
    t = step - 1 + 1e-9 if mutation == "step off by one" else step
    bias1 = 1.0 if mutation == "no first bias correction" else 1 - beta1**t
    bias2 = 1.0 if mutation == "no second bias correction" else 1 - beta2**t
    beta2_rest = float(1 - np.float32(beta2)) if mutation == "1 - float32(beta2)" else 1 - beta2

    def constant(value):
        return torch.tensor(value, dtype=F)

    root2 = math.sqrt(bias2)
    decay, step_size = constant(1 - lr * weight_decay), constant(lr * root2 / bias1)
    for i, p in enumerate(params):
        out = [p, exp_avgs[i], exp_avg_sqs[i], *([] if max_exp_avg_sqs is None else [max_exp_avg_sqs[i]])]
        x, m, v, *vmax = (tensor.to(F) for tensor in out)
        g = grads[i].to(F)
        if mutation == "flat memory" and p.stride() != grads[i].stride() and p.numel():
            g = grads[i].as_strided((p.numel(),), (1,)).as_strided(p.shape, p.contiguous().stride()).to(F)
        if grad_scale is not None and mutation != "ignores grad_scale":
            g = g / grad_scale if mutation != "multiplies by 1 / grad_scale" else g * (1 / grad_scale)
        g = -g if maximize and mutation != "ignores maximize" else g
        if mutation != "decay after the step":
            x = x * decay
        if mutation == "no lerp":
            m = constant(beta1) * m + constant(1 - beta1) * g
        elif mutation == "fused multiply-add":
            m = (m.double() + constant(1 - beta1).double() * (g - m).double()).to(F)
        else:
            lerp = constant(1 - beta1)
            m = m + lerp * (g - m) if lerp < 0.5 else g - (g - m) * (1 - lerp)
        v = v * constant(beta2) + (constant(beta2_rest) * g) * g
        second = v
        if vmax:
            second = vmax[0].maximum(v) if mutation != "maximum drops NaN" else vmax[0].fmax(v)
            second, vmax = (v if mutation == "ignores the maximum" else second), [second]
        if mutation == "square root of torch":
            root = second.sqrt()
        else:
            root = (second.double() + (eps if mutation == "eps inside the root" else 0)).sqrt().to(F)
        denominator = root if mutation in ("eps inside the root", "no eps") else root + constant(eps * root2)
        update = (step_size * m) / denominator
        x = x + update if mutation == "sign" else x - update
        if mutation == "decay after the step":
            x = x * decay
        if mutation == "tail of 8 skipped" and x.dim() == 1:
            x = torch.cat([x[: len(x) // 8 * 8], p[len(x) // 8 * 8 :].to(F)])
        for old, new in zip(out, (x, m, v, *vmax)):
            old.copy_(truncated(new, old.dtype) if mutation == "truncates" else new)
        if mutation == "writes one element too many" and p.is_contiguous() and p.numel():
            p.as_strided((1,), (1,), p.storage_offset() + p.numel()).fill_(0)


def run(mutation: str, dtype: str, case: str):
    def function(*args, **kwargs):
        return variant(*args, mutation=mutation, **kwargs)

    chosen = next(c for c in OP.cases if c.id == case)
    return run_cell(Cell(OP, Backend("cpu", function), dtype, chosen))


@pytest.mark.parametrize("case", [c for c in OP.cases if c.quick], ids=lambda case: case.id)
def test_without_a_mutation_every_case_passes(case):
    results = [run("", dtype, case.id) for dtype in case.dtypes]
    assert [(r.status, r.reason) for r in results] == [(OK, "")] * len(results)


# Mistakes of meaning leave the derived bound; which case shows each, and in which figure.
MEANING = [
    ("no step", "float32", "one step", "params error/bound"),
    ("no step", "bfloat16", "one step", "exp_avgs error/bound"),
    ("no first bias correction", "float32", "first step", "params error/bound"),
    ("no second bias correction", "float32", "first step", "params error/bound"),
    ("no second bias correction", "bfloat16", "first step", "params error/bound"),
    ("eps inside the root", "float32", "one step", "params error/bound"),
    ("no eps", "float32", "one step", "params error/bound"),
    ("sign", "float32", "one step", "params error/bound"),
    ("sign", "float16", "first step", "params error/bound"),
    ("step off by one", "float32", "one step", "params error/bound"),
    ("step off by one", "float32", "first step", "params error/bound"),
    ("decay after the step", "float32", "first step", "params error/bound"),
    ("betas swapped", "float32", "one step", "exp_avgs error/bound"),
    ("betas swapped", "bfloat16", "one step", "exp_avgs error/bound"),
    ("truncates", "bfloat16", "one step", "params error/bound"),
    ("1 - float32(beta2)", "float32", "20 steps", "exp_avg_sqs error/bound"),
    ("ignores grad_scale", "float32", "grad_scale", "exp_avgs error/bound"),
    ("ignores found_inf", "float32", "found_inf 1", "params error/bound"),
    ("ignores maximize", "float32", "maximize", "exp_avgs error/bound"),
    ("ignores the maximum", "float32", "amsgrad", "params error/bound"),
    ("maximum drops NaN", "float32", "special values, amsgrad", "max_exp_avg_sqs non-finite"),
    ("tail of 8 skipped", "float32", "tails", "params error/bound"),
    ("flat memory", "float32", "layout: grad transposed", "exp_avgs error/bound"),
    ("writes one element too many", "float32", "one step", "guards"),
    ("writes one element too many", "bfloat16", "misaligned 3", "guards"),
]


@pytest.mark.parametrize("mutation, dtype, case, figure", MEANING)
def test_a_mistake_of_meaning_leaves_the_bound(mutation, dtype, case, figure):
    result = run(mutation, dtype, case)
    assert result.status == FAIL
    assert figure in [f.name for f in result.figures if not f.ok]


# A changed rounding stays within any honest error bound; it differs from the reference in bits.
ROUNDING = ["no lerp", "fused multiply-add", "square root of torch", "multiplies by 1 / grad_scale"]


@pytest.mark.parametrize("mutation", ROUNDING)
def test_one_changed_rounding_is_seen_in_the_bits(mutation):
    result = run(mutation, "float32", "grad_scale")
    assert result.status == FAIL
    assert [f.name for f in result.figures if not f.ok] == ["bits"]


def test_a_backend_that_claims_no_equality_is_not_held_to_it():
    case = next(c for c in OP.cases if c.id == "grad_scale")
    backend = Backend("cpu", lambda *a, **k: variant(*a, mutation="no lerp", **k), exact=False)
    assert run_cell(Cell(OP, backend, "float32", case)).status == OK


def test_results_that_change_between_runs_or_with_the_thread_count_fail():
    calls = [0]

    def forgetful(*args, **kwargs):
        calls[0] += 1
        return variant(*args, mutation="sign" if calls[0] == 2 else "", **kwargs)

    def counting_threads(*args, **kwargs):
        return variant(*args, mutation="sign" if torch.get_num_threads() != threads else "", **kwargs)

    threads = torch.get_num_threads()
    case = next(c for c in OP.cases if c.id == "one step")
    for function, figure in ((forgetful, "repeat"), (counting_threads, "threads")):
        result = run_cell(Cell(OP, Backend("cpu", function), "float32", case))
        assert [f.name for f in result.figures if not f.ok] == [figure]


def test_an_exception_is_a_fail_and_a_refusal_is_unsupported():
    def broken(*args, **kwargs):
        raise RuntimeError("out of luck")

    def refusing(*args, **kwargs):
        raise NotImplementedError("adamw_: no kernel for it")

    case = OP.cases[0]
    results = [run_cell(Cell(OP, Backend("cpu", f), "float32", case)) for f in (broken, refusing)]
    assert [(r.status, r.reason) for r in results] == [
        (FAIL, "RuntimeError: out of luck"),
        ("unsupported", "adamw_: no kernel for it"),
    ]
    missing = dataclasses.replace(OP.backends()[0], available=lambda: "no such device")
    assert run_cell(Cell(OP, missing, "float32", case)).status == "skipped"
