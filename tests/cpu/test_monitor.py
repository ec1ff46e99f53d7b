"""steepest.dynamics.Monitor: what it records, on whose behalf, and that no step waits for a device."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import steepest
from steepest import dynamics
from steepest.reference import dynamics as reference

BUILDERS = {
    "adamw": lambda model: steepest.optim.AdamW(model.parameters(), lr=1e-2),
    "torch adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "sgd": lambda model: steepest.optim.SGD(model.parameters(), lr=1e-2),
    "muon": lambda model: steepest.optim.Muon(model.named_parameters(), lr=1e-2),
    "shampoo": lambda model: steepest.optim.Shampoo(model.named_parameters(), lr=1e-2, block_size=8),
}


def training(name, dtype=torch.float32):
    """(model, optimizer, step), where step() takes one optimizer step and returns what it changed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)).to(dtype)
    optimizer = BUILDERS[name](model)
    x, y = torch.randn(30, 6, dtype=dtype), torch.randint(0, 3, (30,))

    def step():
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        change = torch.cat([(a - b.detach()).double().flatten() for a, b in zip(before, model.parameters())])
        return torch.cat([p.grad.double().flatten() for p in model.parameters()]), change

    return model, optimizer, step


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("q", [1, 2, math.inf])
def test_norms_of_gradient_and_update(name, q):
    _, optimizer, step = training(name)
    monitor = dynamics.Monitor(optimizer, every=2, q=q)
    expected = [[torch.linalg.vector_norm(x, q) for x in step()] for _ in range(5)]
    found = monitor.history()
    assert found["step"].tolist() == [1, 3, 5]
    for place, key in enumerate(("gradient_norm", "update_norm")):
        # One rounding of each difference, one of the norm.
        exact = torch.stack([expected[i][place] for i in (0, 2, 4)])
        torch.testing.assert_close(found[key], exact, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("name", BUILDERS)
def test_does_not_change_the_training(name):
    (plain, _, step), (watched, optimizer, watched_step) = training(name), training(name)
    dynamics.Monitor(optimizer, every=1, spectra_every=2)
    for _ in range(4):
        step()
        watched_step()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters()))


def test_spectra_by_name_and_of_factors():
    model, optimizer, step = training("shampoo")
    monitor = dynamics.Monitor(optimizer, every=None, spectra_every=1)
    step()
    found = monitor.history()
    weights = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    assert set(monitor.names) == set(weights)
    for i, name in enumerate(monitor.names):
        g = weights[name].grad
        torch.testing.assert_close(found["dimension"][0, i], reference.gradient_dimension(g), rtol=1e-5, atol=0)
        assert 0.99 - 1e-5 <= found["stable_rank"][0, i] / reference.stable_rank(g) <= 1 + 1e-5
    factors = {
        f"{name}.{key}": value
        for name, p in model.named_parameters()
        for key, value in optimizer.state[p].items()
        if key.startswith("statistic.")
    }
    assert set(monitor.factor_names) == set(factors) and len(factors) >= 4
    for i, name in enumerate(monitor.factor_names):
        exact = steepest.reference.effective_dimension(factors[name].double())
        torch.testing.assert_close(found["factor_dimension"][0, i], exact, rtol=1e-5, atol=0)


def test_a_convolution_counts_as_a_matrix_and_a_missing_gradient_as_zero():
    conv, unused = nn.Conv2d(3, 4, 2), nn.Parameter(torch.ones(2, 2))
    optimizer = steepest.optim.SGD([*conv.parameters(), unused], lr=0.1)
    monitor = dynamics.Monitor(optimizer, spectra_every=1)
    conv(torch.randn(1, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    found = monitor.history()["dimension"][0]
    exact = reference.gradient_dimension(conv.weight.grad.reshape(4, -1))
    torch.testing.assert_close(found[0], exact, rtol=1e-5, atol=0)
    assert found[1] == 0 and monitor.names == ["0.0", "0.2"]


def test_float64_and_half():
    for dtype in (torch.float64, torch.bfloat16):
        _, optimizer, step = training("torch adamw", dtype)
        monitor = dynamics.Monitor(optimizer, every=1)
        gradient, _ = step()
        torch.testing.assert_close(monitor.history()["gradient_norm"][0], gradient.norm(), rtol=2.0**-22, atol=0)


def test_remove_and_nothing_recorded():
    _, optimizer, step = training("sgd")
    monitor = dynamics.Monitor(optimizer, update=False, spectra_every=3)
    empty = monitor.history()
    assert {len(values) for values in empty.values()} == {0} and "update_norm" not in empty
    step()
    monitor.remove()
    step()
    assert monitor.history()["step"].tolist() == [1] and monitor.steps == 1


class NoReading(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading a value, sizes that depend on values, solver status."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "eig", "svd", "equal", "cholesky")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(name.lstrip("_").startswith(w.lstrip("_")) for w in self.WAITS), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["torch adamw", "shampoo"])
def test_no_step_waits_for_the_device(name, monkeypatch):
    """With the norms that a GPU would take; recording, spectra and factors included."""
    from steepest import norms
    from steepest.dynamics import monitor as module

    monkeypatch.setattr(module, "survey", lambda tensors, q: norms._on_device(tensors, float(q)))
    _, optimizer, step = training(name)
    step()  # torch.optim counts its steps on the host
    monitor = dynamics.Monitor(optimizer, every=1, spectra_every=1)
    with NoReading():
        monitor._before_step(optimizer, (), {})
        monitor._after_step(optimizer, (), {})
        gap = dynamics.MemorizationGap()
        gap.update(torch.tensor(1.0), torch.tensor(2.0))
    with pytest.raises(AssertionError, match="waits"), NoReading():
        bool(gap.stop)
    assert len(monitor.history()["gradient_norm"]) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"every": 0}, "every is 0"),
        ({"spectra_every": True}, "spectra_every is True"),
        ({"q": 0.5}, "q is 0.5"),
    ],
)
def test_wrong_options(options, message):
    _, optimizer, _ = training("sgd")
    with pytest.raises(ValueError, match=message):
        dynamics.Monitor(optimizer, **options)
    devices = [torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True, device="meta")]
    with pytest.raises(ValueError, match="expected one device"):
        dynamics.Monitor(torch.optim.SGD(devices))
