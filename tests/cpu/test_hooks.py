"""Hooks and the profiler's record around `step`, as torch's optimizers have them; entered only where there are any."""

from __future__ import annotations

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import steepest


def adamw():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    return steepest.optim.AdamW([p], lr=0.5, weight_decay=0.0)


def sam():
    optimizer = steepest.optim.SAM(adamw())
    optimizer.first_step()
    return optimizer


@pytest.fixture(params=[adamw, sam])
def optimizer(request):
    return request.param()


def weights(optimizer) -> float:
    return optimizer.param_groups[0]["params"][0][0].item()


def test_hooks_of_the_optimizer_run_before_and_after(optimizer):
    seen, start = [], weights(optimizer)
    before = optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", o, weights(o) == start)))
    after = optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", o, weights(o) == start)))
    optimizer.step()
    assert seen == [("before", optimizer, True), ("after", optimizer, False)]
    before.remove(), after.remove()


@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
def test_hooks_of_all_optimizers_run(optimizer, register):
    seen = []
    handle = register(lambda o, args, kwargs: seen.append(o))
    try:
        optimizer.step()
    finally:
        handle.remove()
    assert optimizer in seen


def test_a_hook_may_change_the_arguments():
    optimizer = adamw()
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: torch.tensor(7.0)), {}))
    assert optimizer.step() == 7


def test_the_profiler_sees_steps(optimizer):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert f"Optimizer.step#{type(optimizer).__name__}.step" in {event.key for event in profile.key_averages()}


def test_without_either_no_record_is_entered(optimizer, monkeypatch):
    def refused(name):
        raise AssertionError(f"{name} was entered")

    monkeypatch.setattr(torch.autograd.profiler, "record_function", refused)
    start = weights(optimizer)
    optimizer.step()
    assert weights(optimizer) != start
