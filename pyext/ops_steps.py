"""Ops for steps over lists of tensors, for survey, and for a whole optimizer's step (see ops.py).

Schemas are made from the signatures of multi_tensor.py.  Optional lists are empty where they are not given.
"""

from __future__ import annotations

import inspect
import itertools
import weakref

import torch
from torch import Tensor

from steepest import multi_tensor, norms
from steepest.ops import define, number, number_tensor, traceable

STEPS = ("adagrad_", "adam_", "adamw_", "lion_", "rmsprop_", "sgd_", "sign_")
_LISTS = ("List", "List | None")
_TYPES = {
    "float": "float", "bool": "bool", "str": "str", "tuple[float, float]": "float[]", "float | None": "float?",
    "Tensor | None": "Tensor?",
}  # fmt: skip


def _parameters(function) -> list[inspect.Parameter]:
    found = inspect.signature(function).parameters.values()
    return [parameter for parameter in found if parameter.kind is not inspect.Parameter.VAR_KEYWORD]


def schema_of(function) -> str:
    """Every list but the gradients is written to; lr and step are tensors."""
    marks = iter("abcdefgh")
    out = []
    for parameter in _parameters(function):
        kind, name = parameter.annotation, parameter.name
        if kind in _LISTS:
            out.append(f"Tensor[] {name}" if name == "grads" else f"Tensor({next(marks)}!)[] {name}")
        else:
            out.append(f"{'Tensor' if name in ('lr', 'step') else _TYPES[kind]} {name}")
    return f"({', '.join(out)}) -> ()"


def _define_step(name: str):
    """The op, and the public function that puts it into graphs."""
    function = getattr(multi_tensor, name)
    parameters = _parameters(function)
    lists = [p.name for p in parameters if p.annotation in _LISTS]
    optional = [p.name for p in parameters if p.annotation == "List | None"]
    order = [p.name for p in parameters]
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}

    def run(*args):
        given = dict(zip(order, args))
        step = number(given.pop("step"))
        given["step"] = [int(value) for value in step] if isinstance(step, list) else int(step)
        given["lr"] = number(given["lr"])
        for key in optional:
            given[key] = given[key] or None
        function(**given)

    def traced(*args, **kwargs):
        given = {**defaults, **dict(zip(lists, args)), **kwargs}
        for key in given:
            if key not in order:
                raise TypeError(f"{name}: {key} is not known in a compiled function")
        given["lr"], given["step"] = number_tensor(given["lr"]), number_tensor(given["step"])
        for key in optional:
            given[key] = [] if given.get(key) is None else given[key]
        with torch.no_grad():
            getattr(torch.ops.steepest, name)(*[given[key] for key in order])

    define(name, schema_of(function), run, lambda *args: None)
    return traceable(function, traced)


adagrad_, adam_, adamw_, lion_, rmsprop_, sgd_, sign_ = map(_define_step, STEPS)


def _survey(tensors: list[Tensor], q: float):
    found = norms.survey(tensors, q=q)
    return found.norm.clone(), found.max_abs.clone()  # results of an operator share no memory


def _fake_survey(tensors: list[Tensor], q: float):
    device = tensors[0].device if tensors else torch.device("cpu")
    return tuple(torch.empty((), dtype=torch.float32, device=device) for _ in range(2))


def _traced_survey(tensors, *, q=2.0):
    with torch.no_grad():
        norm, largest = torch.ops.steepest.survey(list(tensors), float(q))
    return norms.Survey(norm, largest, float(q))


define("survey", "(Tensor[] tensors, float q) -> (Tensor, Tensor)", _survey, _fake_survey)
survey = traceable(norms.survey, _traced_survey)


# --- a whole optimizer ---------------------------------------------------------------------------------------------

_optimizers: weakref.WeakValueDictionary[int, torch.optim.Optimizer] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def enlist(optimizer: torch.optim.Optimizer) -> int:
    """A number by which a graph refers to an optimizer."""
    number = next(_numbers)
    _optimizers[number] = optimizer
    return number


def traced_step(optimizer, closure):
    """Puts an optimizer's whole step into a graph; its options and states are read when the graph runs."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    params = [p for p in optimizer.listed_params if p.grad is not None]
    with torch.no_grad():
        torch.ops.steepest.optimizer_step(params, [p.grad for p in params], optimizer.number_in_graphs)
    return loss


@torch.no_grad()
def _optimizer_step(params: list[Tensor], grads: list[Tensor], number: int) -> None:
    """Steps the optimizer's own parameters; graphs that were made functional pass copies, which are copied back.

    States are the optimizer's, not the graph's: a graph may not read them beside this op.
    """
    optimizer = _optimizers[number]
    own = [p for p in optimizer.listed_params if p.grad is not None]
    if len(own) != len(params):
        raise RuntimeError(f"optimizer_step: {len(params)} parameters had gradients when traced, now {len(own)}")
    kept = [p.grad for p in own]
    try:
        for p, passed, grad in zip(own, params, grads):
            if not _same_memory(p, passed):
                p.copy_(passed)
            if not _same_memory(p.grad, grad):
                p.grad = grad
        inspect.unwrap(type(optimizer).step)(optimizer)
        for p, passed in zip(own, params):
            if not _same_memory(p, passed):
                passed.copy_(p)
    finally:
        for p, grad in zip(own, kept):
            p.grad = grad


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


define("optimizer_step", "(Tensor(a!)[] params, Tensor[] grads, int number) -> ()", _optimizer_step, lambda *args: None)
