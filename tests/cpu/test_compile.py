"""torch.compile: registered ops pass opcheck, compiled steps have eager's bits, and nothing is compiled anew."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import steepest
from steepest import ops_steps

SHAPES = [(4, 6), (8,), (3, 1)]
STATES = {"adagrad_": 1, "adam_": 2, "adamw_": 2, "lion_": 1, "rmsprop_": 1, "sgd_": 1, "sign_": 0}


def lists(count):
    torch.manual_seed(1)
    return [[torch.randn(shape) for shape in SHAPES] for _ in range(2)] + [
        [torch.rand(shape) for shape in SHAPES] for _ in range(count)
    ]


def op_arguments(name):
    """All arguments of the op, in order, with momentum and the like switched on."""
    given = dict(zip(("params", "grads"), lists(0)))
    states = iter(lists(4)[2:])
    out = []
    for parameter in ops_steps._parameters(getattr(steepest.multi_tensor, name)):
        key = parameter.name
        if key in given:
            out.append(given[key])
        elif parameter.annotation in ops_steps._LISTS:
            out.append(next(states))
        elif key == "lr":
            out.append(torch.tensor(0.1))
        elif key == "step":
            out.append(torch.tensor(3))
        else:
            out.append({"clip_value": 0.5, "momentum": 0.9}.get(key, parameter.default))
    return tuple(out)


@pytest.mark.parametrize("name", ops_steps.STEPS)
def test_opcheck_of_steps(name):
    torch.library.opcheck(getattr(torch.ops.steepest, name).default, op_arguments(name))


def test_opcheck_of_functions():
    x = torch.randn(2, 4, 6)
    torch.library.opcheck(torch.ops.steepest.polar.default, (x, "polar-express", 5, 1e-3, None, None, "auto"))
    torch.library.opcheck(torch.ops.steepest.polar.default, (x.mT, "polar-express", 5, 1e-3, None, None, "auto"))
    torch.library.opcheck(torch.ops.steepest.inverse_root.default, (x @ x.mT, 4, 1e-6, False, 1e-3, "auto"))
    torch.library.opcheck(torch.ops.steepest.survey.default, ([x, x[0].half()], 2.0))


def test_opcheck_of_a_whole_step():
    p = torch.nn.Parameter(torch.randn(3, 4))
    p.grad = torch.randn(3, 4)
    optimizer = steepest.optim.SGD([p], lr=0.1)  # without states: opcheck repeats the step
    arguments = ([p.detach().clone()], [p.grad.clone()], optimizer.number_in_graphs)
    torch.library.opcheck(torch.ops.steepest.optimizer_step.default, arguments)


@pytest.mark.parametrize("name", ops_steps.STEPS)
def test_compiled_functions_equal_eager_and_are_compiled_once(name):
    step_function = getattr(steepest, name)
    counter = CompileCounter()

    def run(params, grads, states, lr, step):
        scaled = [g * 2 for g in grads]  # something to compile around the op
        step_function(params, scaled, *states, lr=lr, step=step)
        return [p + 1 for p in params]

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    params, grads, *states = lists(STATES[name])
    ours, expected = copy.deepcopy((params, states)), copy.deepcopy((params, states))
    for step in range(1, 5):
        lr, count = torch.tensor(0.1 / step), torch.tensor(step)
        found = compiled(ours[0], grads, ours[1], lr, count)
        wanted = run(expected[0], grads, expected[1], lr.item(), step)
        for a, b in zip(found, wanted):
            assert torch.equal(a, b)
        for mine, theirs in zip([ours[0], *ours[1]], [expected[0], *expected[1]]):
            assert all(map(torch.equal, mine, theirs))
    assert counter.frame_count == 1


def test_compiled_matrix_functions_equal_eager():
    a = torch.randn(4, 8, 12)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(a):
        found = steepest.survey([a], q=3.0)
        return steepest.polar(a) + 1, steepest.inverse_root(a @ a.mT, 4), found.norm, found.max_abs, found.nonfinite

    found = run(a)
    survey = steepest.survey([a], q=3.0)
    wanted = steepest.polar(a) + 1, steepest.inverse_root(a @ a.mT, 4), survey.norm, survey.max_abs, survey.nonfinite
    assert all(torch.equal(x, y) for x, y in zip(found, wanted))


OPTIMIZERS = {
    "SGD": lambda p: steepest.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adagrad": lambda p: steepest.optim.Adagrad(p, lr=0.1),
    "RMSprop": lambda p: steepest.optim.RMSprop(p, lr=0.1),
    "Adam": lambda p: steepest.optim.Adam(p, lr=0.1, amsgrad=True),
    "AdamW": lambda p: steepest.optim.AdamW(p, lr=0.1, max_grad_norm=0.1),
    "Lion": lambda p: steepest.optim.Lion(p, lr=0.1),
    "NormedDescent": lambda p: steepest.optim.NormedDescent(p, lr=0.1, norm="l2"),
    "Muon": lambda p: steepest.optim.Muon(p, lr=0.1),
    "Shampoo": lambda p: steepest.optim.Shampoo(p, lr=0.1, precondition_frequency=2),
}


def network():
    torch.manual_seed(2)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_compiled_optimizers_equal_eager_and_are_compiled_once(name, backend):
    torch._dynamo.reset()
    models = network(), network()
    ours, expected = (OPTIMIZERS[name](model.parameters()) for model in models)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(ours.step, fullgraph=True, backend=counter)
    for step in range(4):
        x = torch.randn(5, 8)
        for model, optimizer in zip(models, (ours, expected)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        compiled()
        expected.step()
        for p, q in zip(models[0].parameters(), models[1].parameters()):
            assert torch.equal(p, q)
            for a, b in zip(ours.state[p].values(), expected.state[q].values()):
                assert torch.equal(a, b)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:Detected call of")  # schedulers watch the step that they have replaced
def test_lr_schedulers_follow_a_step_that_was_compiled_before_them():
    """A scheduler replaces optimizer.step by a wrapper in a file that torch.compile refuses to trace."""
    torch._dynamo.reset()
    models = network(), network()
    ours, expected = (OPTIMIZERS["AdamW"](model.parameters()) for model in models)
    compiled = torch.compile(ours.step, backend="aot_eager", fullgraph=True)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in (ours, expected)]
    for _ in range(3):
        x = torch.randn(5, 8)
        for model in models:
            model.zero_grad()
            model(x).square().mean().backward()
        compiled()
        expected.step()
        for scheduler in schedulers:
            scheduler.step()
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters()))


def test_a_step_whose_parameters_the_graph_has_changed_sees_the_change():
    """aot_eager hands the op copies: they are stepped from, and copied back."""
    torch._dynamo.reset()
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    ours, expected = (steepest.optim.SGD([x], lr=0.5) for x in (p, q))
    p.grad, q.grad = torch.ones(3), torch.ones(3)

    def run(parameter, optimizer):
        with torch.no_grad():
            parameter.mul_(3)
        optimizer.step()
        return parameter * 2

    found = torch.compile(run, fullgraph=True, backend="aot_eager")(p, ours)
    assert torch.equal(found, run(q, expected)) and torch.equal(p, q) and (p == 2.5).all()
