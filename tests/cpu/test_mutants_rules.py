"""Wrong rules given to the conformance cases as a backend: every mistake must FAIL at least one case."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch

from steepest import reference
from steepest.conformance import Backend, Cell, registered_ops, run_cell
from steepest.conformance.runner import FAIL, OK
from steepest.reference import rules

SQRT = rules.square_root


def scaled(**changes):
    """Derived scalars changed: name -> function of all scalars and hyper-parameters."""

    def mutate(scalars, element):
        def wrong(**hyper):
            found = scalars(**hyper)
            return found | {name: change(found, hyper) for name, change in changes.items()}

        return wrong, element

    return mutate


def with_hyper(change):
    return lambda scalars, element: (lambda **hyper: scalars(**change(hyper)), element)


def with_element(wrong):
    return lambda scalars, element: (scalars, lambda *args: wrong(element, *args))


def eps_inside(element, p, g, states, s):
    with mock.patch.object(rules, "square_root", lambda x: SQRT(x + s.eps) - s.eps):
        return element(p, g, states, s)


def truncating(element, p, g, states, s):
    """Results lose their last bits towards zero before they are stored."""
    p, states = element(p, g, states, s)
    return truncated(p), [truncated(x) for x in states]


def truncated(x):
    return (x.view(torch.int32) & ~0xFFFF).view(torch.float32)


def bias2_sqrt(h):
    return math.sqrt(1 - h.get("betas", (0.9, 0.999))[1] ** h["step"])


COMMON = {
    "no step": with_element(lambda element, p, g, states, s: (p, states)),
    "flipped sign": scaled(negative_lr=lambda s, h: -s["negative_lr"]),
    "gradient not prepared": with_element(lambda element, p, g, states, s: element(p, g * (1 + 2.0**-20), states, s)),
    "states forgotten": with_element(lambda element, p, g, states, s: (element(p, g, states, s)[0], states)),
}
NEXT = with_hyper(lambda h: h | {"step": h["step"] + 1})
MUTATIONS = {
    "sgd": COMMON
    | {
        "no dampening": with_hyper(lambda h: h | {"dampening": 0.0}),
        "first step like the others": NEXT,
        "nesterov ignored": with_hyper(lambda h: h | {"nesterov": False}),
        "momentum twice": scaled(carry=lambda s, h: s["carry"] ** 2),
    },
    "adagrad": COMMON
    | {
        "lr_decay ignored": with_hyper(lambda h: h | {"lr_decay": 0.0}),
        "step off by one": NEXT,
        "eps inside the root": with_element(eps_inside),
        "no eps": scaled(eps=lambda s, h: 0.0),
    },
    "rmsprop": COMMON
    | {
        "alpha and 1 - alpha swapped": scaled(alpha=lambda s, h: s["rest"], rest=lambda s, h: s["alpha"]),
        "1 - float32(alpha)": scaled(rest=lambda s, h: float(1 - torch.tensor(s["alpha"], dtype=torch.float32))),
        "not centered": scaled(centered=lambda s, h: False),
        "momentum ignored": scaled(momentum=lambda s, h: 0.0),
        "eps inside the root": with_element(eps_inside),
    },
    "adam": {name: mutate for name, mutate in COMMON.items() if name != "flipped sign"}
    | {
        "flipped sign": scaled(negative_step_size=lambda s, h: -s["negative_step_size"]),
        "no first bias correction": scaled(negative_step_size=lambda s, h: -h["lr"] * bias2_sqrt(h)),
        "no second bias correction": scaled(
            negative_step_size=lambda s, h: s["negative_step_size"] / bias2_sqrt(h), eps=lambda s, h: h.get("eps", 1e-8)
        ),
        "second bias correction without eps": scaled(eps=lambda s, h: h.get("eps", 1e-8)),
        "step off by one": NEXT,
        "betas swapped": with_hyper(lambda h: h | {"betas": h.get("betas", (0.9, 0.999))[::-1]}),
    },
    "lion": COMMON | {"betas swapped": with_hyper(lambda h: h | {"betas": h.get("betas", (0.9, 0.99))[::-1]})},
    "sign": {name: mutate for name, mutate in COMMON.items() if name in ("no step", "flipped sign")},
}
CASES = [(rule, name) for rule, mutations in MUTATIONS.items() for name in mutations]


def statuses(rule: str, mutate) -> dict[str, str]:
    op, wrong = registered_ops()[rule], mutate(*rules.RULES[rule]) if mutate else rules.RULES[rule]

    def function(*args, **kwargs):
        with mock.patch.dict(rules.RULES, {rule: wrong}):
            getattr(reference, f"{rule}_")(*args, **kwargs)

    cases = [
        case
        for case in op.cases
        if case.id not in ("several tiles and threads", "20 steps") and "float32" in case.dtypes
    ]
    return {case.id: run_cell(Cell(op, Backend("cpu", function), "float32", case)).status for case in cases}


@pytest.mark.parametrize("rule", MUTATIONS)
def test_without_a_mutation_every_case_passes(rule):
    assert set(statuses(rule, None).values()) == {OK}


@pytest.mark.parametrize("rule, name", CASES)
def test_mistakes_fail(rule, name):
    found = statuses(rule, MUTATIONS[rule][name])
    assert FAIL in found.values(), found


MISTAKES = ("decay ignored", "decay after the rule", "clip_value ignored", "l1 ignored")
# Clamping keeps signs.
STAGES = [(rule, mistake) for rule in MUTATIONS for mistake in MISTAKES if (rule, mistake) != ("sign", MISTAKES[2])]


@pytest.mark.parametrize("rule, mistake", STAGES)
def test_wrong_stages_fail(rule, mistake):
    op = registered_ops()[rule]
    option = {"decay ignored": "weight_decay", "decay after the rule": "weight_decay"}.get(mistake, mistake.split()[0])

    def function(*args, **kwargs):
        value = kwargs.pop(option, None)
        getattr(reference, f"{rule}_")(*args, **kwargs)
        if mistake == "decay after the rule" and value:
            for p in args[0]:
                p.mul_(1 - kwargs["lr"] * value)

    cases = [case for case in op.cases if case.options.get(option) and "float32" in case.dtypes]
    assert cases
    assert {run_cell(Cell(op, Backend("cpu", function), "float32", case)).status for case in cases} == {FAIL}


@pytest.mark.parametrize("rule", MUTATIONS)
def test_truncation_fails(rule):
    op, wrong = registered_ops()[rule], with_element(truncating)(*rules.RULES[rule])

    def function(*args, **kwargs):
        with mock.patch.dict(rules.RULES, {rule: wrong}):
            getattr(reference, f"{rule}_")(*args, **kwargs)

    case = next(case for case in op.cases if case.id == "two steps")
    assert run_cell(Cell(op, Backend("cpu", function), "bfloat16", case)).status == FAIL
