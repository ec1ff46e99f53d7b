"""Hutchinson's estimates and the curvature penalty on losses whose Hessian is known."""

from __future__ import annotations

import pytest
import torch

import steepest
from steepest.reference import sam as reference


def quadratic(n=24):
    """A loss w'Aw/2 with A symmetric, its parameters in two tensors, and A."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, n, generator=generator, dtype=torch.float64)
    a = a @ a.T / n
    params = [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in ((4, 5), (n - 20,))]

    def closure():
        for p in params:
            p.grad = None
        w = torch.cat([p.flatten() for p in params])
        loss = w @ a @ w / 2
        loss.backward()
        return loss

    return a, params, closure


def test_trace_and_diagonal_of_a_quadratic():
    a, params, closure = quadratic()
    samples = 400
    before = [p.detach().clone() for p in params]
    params[0].grad = torch.ones_like(params[0])
    kept = params[0].grad
    trace = steepest.hessian_trace(closure, params, samples=samples)
    assert params[0].grad is kept and params[1].grad is None
    assert all(torch.equal(p, b) for p, b in zip(params, before))
    # Hutchinson's variance; five standard deviations.
    off = a - torch.diag(a.diagonal())
    assert abs(trace - a.trace()) <= 5 * (2 * off.square().sum() / samples).sqrt()
    diagonal = torch.cat([d.flatten() for d in steepest.hessian_diagonal(closure, params, samples=samples)])
    assert ((diagonal - a.diagonal()).abs() <= 5 * (off.square().sum(1) / samples).sqrt()).all()


def test_one_sample_is_the_references():
    a, params, closure = quadratic()
    generator = torch.Generator().manual_seed(7)
    z = [(torch.randint(0, 2, p.shape, generator=generator) * 2 - 1).double() for p in params]

    def gradient(w):
        g = a @ torch.cat([x.flatten() for x in w])
        return [part.reshape(p.shape) for part, p in zip(g.split([p.numel() for p in params]), params)]

    exact, diagonal = reference.hessian_trace_and_diagonal(gradient, [p.detach() for p in params], [z])
    flat = torch.cat([x.flatten() for x in z])
    # A difference of float64 gradients of order 1, divided by 2e-3, over 24 elements.
    slack = 24 * 16 * 2.0**-53 * 10 / 1e-3
    assert abs(exact - flat @ a @ flat) <= slack
    assert abs(steepest.hessian_trace(closure, params, samples=1, seed=7) - exact) <= slack
    for d, e in zip(steepest.hessian_diagonal(closure, params, samples=1, seed=7), diagonal):
        assert (d - e).abs().max() <= slack


def test_an_exception_in_the_closure_restores():
    _, params, closure = quadratic()
    before, calls = [p.detach().clone() for p in params], []

    def failing():
        closure()
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        steepest.hessian_trace(failing, params)
    assert all(torch.equal(p, b) for p, b in zip(params, before)) and params[0].grad is None


def test_wrong_arguments():
    _, params, closure = quadratic()
    with pytest.raises(ValueError, match="radius is 0"):
        steepest.hessian_trace(closure, params, radius=0)
    with pytest.raises(TypeError, match="needs float32 or float64"):
        steepest.hessian_trace(closure, [torch.zeros(2, dtype=torch.bfloat16)])


@pytest.mark.parametrize("base", [steepest.optim.SGD, torch.optim.SGD], ids=["ours", "torch"])
def test_curvature_penalty_of_a_cubic(base):
    """L = Σ a w³/6, H = diag(a w): the gradient of tr H is a, for any z and radius, and the step lr (g + weight a)."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((7,), (3, 4), ())]
    a = [1 + torch.rand(p.shape, generator=generator) for p in params]
    lr, weight, radius, calls = 0.1, 0.3, 0.5, []

    def closure():
        for p in params:
            p.grad = None
        calls.append([p.detach().clone() for p in params])
        loss = sum((c * p**3 / 6).sum() for c, p in zip(a, params))
        loss.backward()
        return loss

    optimizer = steepest.optim.CurvaturePenalty(base(params, lr=lr), weight, radius=radius)
    before = [p.detach().clone() for p in params]
    optimizer.step(closure)
    assert len(calls) == 3 and not optimizer.perturbed
    for here, there, p in zip(calls[1], calls[2], before):  # r z one way, then the other
        assert torch.allclose(here - p, p - there, atol=1e-6) and ((here - p).abs() - radius).abs().max() < 1e-6
    for p, b, c in zip(params, before, a):
        exact = b - lr * (c * b * b / 2 + weight * c)
        # Some ten roundings of gradients of at most 2 (|w| + r)², which the factor weight / r² enlarges.
        slack = lr * 16 * 2.0**-24 * (2 * (b.abs() + radius) ** 2) * (1 + 2 * weight / radius**2) + 2.0**-23 * b.abs()
        assert ((p.detach() - exact).abs() <= slack).all()
    with pytest.raises(RuntimeError, match="not perturbed"):
        optimizer.step()
