"""20 steps of SAM and each variant against their papers' formulas, within a bound that running error analysis derives.

The loss is quadratic, with gradient a w - b element by element, so that every rounding of a step is known: two in a
gradient, five in an ascent (see conformance/cases/sam.py), those of the base rule.  The formulas below run on numbers
that carry their exact value, in float64, and a bound on their error (conformance.bounds).  Norms and inner products are
sums in float64; by the triangle inequality |‖x'‖ - ‖x‖| <= ‖x' - x‖, and |<x', y'> - <x, y>| is at most
Σ |x| ey + |y| ex + ex ey.
"""

from __future__ import annotations

import pytest
import torch

import steepest
from steepest.conformance.bounds import Tracked
from steepest.reference import sam as reference
from steepest.reference.rules import stepped

STEPS, RHO, LR = 20, 0.05, 1e-2
SHAPES = [(7, 5), (), (0,), (40,)]
F32 = torch.float32


def constant(x: float) -> Tracked:
    return Tracked.constant(x, F32)


def size(x: Tracked) -> Tracked:
    return Tracked(x.value.norm(), x.error.norm(), F32)


def inner(x: Tracked, y: Tracked) -> Tracked:
    error = (x.value.abs() * y.error + y.value.abs() * x.error + x.error * y.error).sum()
    return Tracked((x.value * y.value).sum(), error, F32)


def ascent(x: Tracked, rho: float = RHO) -> Tracked:
    """rho x / ‖x‖: quotient, coefficient, their product, rho, product."""
    return x * constant(1.0) * (constant(1.0) / size(x)) * constant(rho)


class Problem:
    """Parameters of a quadratic, and the same as one tracked vector."""

    def __init__(self, noise: float = 0.0):
        generator = torch.Generator().manual_seed(0)

        def draw():
            return [torch.randn(shape, generator=generator) for shape in SHAPES]

        self.params = [torch.nn.Parameter(w) for w in draw()]
        self.curvature = [a.abs() + 0.1 for a in draw()]
        self.targets = [[b + noise * x for b, x in zip(self.params, draw())] for _ in range(STEPS)]
        self.targets = [[b.detach() + 2 for b in targets] for targets in self.targets]
        self.t, self.calls = 0, 0

    def closure(self):
        self.calls += 1
        for p, a, b in zip(self.params, self.curvature, self.targets[self.t]):
            p.grad = a * p.detach() - b
        return torch.zeros(())

    def gradient(self, w: Tracked, t: int) -> Tracked:
        return w * Tracked.exact(flat(self.curvature), F32) - Tracked.exact(flat(self.targets[t]), F32)

    def exact_gradient(self, params: list[torch.Tensor]) -> list[torch.Tensor]:
        """In float64, for reference.*."""
        return [a.double() * w - b.double() for w, a, b in zip(params, self.curvature, self.targets[self.t])]


def flat(tensors) -> torch.Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


def adamw(params):
    return steepest.optim.AdamW(params, lr=LR, weight_decay=0.1)


def sgd(params):
    return steepest.optim.SGD(params, lr=LR, momentum=0.9)


def torch_sgd(params):
    return torch.optim.SGD(params, lr=LR, momentum=0.9)


ADAM = dict(lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, decoupled=True)
SGD = dict(lr=LR, momentum=0.9)
BASES = {"adamw": (adamw, "adam", ADAM, 2), "sgd": (sgd, "sgd", SGD, 1), "torch sgd": (torch_sgd, "sgd", SGD, 1)}


def transcribed(problem: Problem, base: str, step_gradient) -> list[Tracked]:
    """The trajectory; step_gradient(w, t, states) -> the gradient that the base rule gets."""
    _, rule, options, count = BASES[base]
    w = Tracked.exact(flat(problem.params), F32)
    states = [Tracked.exact(torch.zeros_like(w.value), F32) for _ in range(count)]
    trajectory = []
    for t in range(STEPS):
        g = step_gradient(w, t, states)
        w, states = stepped(rule, w, g, states, constant, step=t + 1, **options)
        w, states = w.stored(F32), [s.stored(F32) for s in states]
        trajectory.append(w)
    return trajectory


def check(problem: Problem, optimizer, trajectory: list[Tracked]) -> None:
    start = flat(problem.params)
    for t, expected in enumerate(trajectory):
        problem.t = t
        optimizer.step(problem.closure)
        distance = (flat(problem.params).double() - expected.value).abs()
        share = float((distance / expected.error).max())
        assert share <= 1, (t, share)
    # The bound says something: it is far below how far the weights went.
    assert float(expected.error.max()) < 0.01 * float((expected.value - start).abs().max())


@pytest.mark.parametrize("base", BASES)
def test_sam(base):
    problem = Problem()

    def gradient(w, t, states):
        return problem.gradient(w + ascent(problem.gradient(w, t)), t)

    trajectory = transcribed(problem, base, gradient)
    check(problem, steepest.optim.SAM(BASES[base][0](problem.params), rho=RHO), trajectory)
    assert problem.calls == 2 * STEPS


@pytest.mark.parametrize("base", BASES)
def test_gsam(base):
    problem, alpha = Problem(), 0.4

    def gradient(w, t, states):
        clean = problem.gradient(w, t)
        ascended = problem.gradient(w + ascent(clean), t)
        along = inner(clean, ascended) / inner(ascended, ascended)
        return ascended * (constant(1.0) + along * constant(alpha)) + clean * constant(-alpha)

    trajectory = transcribed(problem, base, gradient)
    check(problem, steepest.optim.GSAM(BASES[base][0](problem.params), rho=RHO, alpha=alpha), trajectory)


@pytest.mark.parametrize("base", BASES)
def test_looksam(base):
    # A long ascent, because g_v is a small difference of large numbers, and the steps between enlarge it again.
    problem, alpha, k, kept, rho = Problem(), 0.2, 4, [], 1.0

    def gradient(w, t, states):
        clean = problem.gradient(w, t)
        if t % k:
            scale = (inner(clean, clean) / inner(kept[0], kept[0])).sqrt()
            return clean + kept[0] * (scale * constant(alpha))
        ascended = problem.gradient(w + ascent(clean, rho), t)
        kept[:] = [ascended - clean * (inner(clean, ascended) / inner(clean, clean))]
        return ascended

    trajectory = transcribed(problem, base, gradient)
    check(problem, steepest.optim.LookSAM(BASES[base][0](problem.params), rho=rho, k=k, alpha=alpha), trajectory)
    assert problem.calls == STEPS + STEPS // k  # the second pass is really left out


@pytest.mark.parametrize("base", BASES)
def test_momentum_sam(base):
    problem = Problem()

    def gradient(w, t, states):
        return problem.gradient(w if t == 0 else w - ascent(states[0]), t)

    trajectory = transcribed(problem, base, gradient)
    check(problem, steepest.optim.MomentumSAM(BASES[base][0](problem.params), rho=RHO), trajectory)
    assert problem.calls == STEPS


@pytest.mark.parametrize("base", BASES)
def test_friendly_sam(base):
    problem, sigma, lmbda = Problem(noise=1.0), 0.9, 0.8
    average = [Tracked.exact(torch.zeros(sum(p.numel() for p in problem.params)), F32)]

    def gradient(w, t, states):
        clean = problem.gradient(w, t)
        average[0] = average[0] * constant(lmbda) + clean * constant(1 - lmbda)
        return problem.gradient(w + ascent(clean - average[0] * constant(sigma)), t)

    trajectory = transcribed(problem, base, gradient)
    optimizer = steepest.optim.FriendlySAM(BASES[base][0](problem.params), rho=RHO, sigma=sigma, lmbda=lmbda)
    check(problem, optimizer, trajectory)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_gradient_norm_penalty(base, squared):
    problem, weight, radius = Problem(), 0.001 if squared else 0.02, 0.05

    def gradient(w, t, states):
        clean = problem.gradient(w, t)
        ascended = problem.gradient(w + ascent(clean, radius), t)
        factor = size(clean) * constant(2 * weight / radius) if squared else constant(weight / radius)
        return clean * (constant(1.0) - factor) + ascended * factor

    trajectory = transcribed(problem, base, gradient)
    options = dict(weight=weight, radius=radius, squared=squared)
    check(problem, steepest.optim.GradientNormPenalty(BASES[base][0](problem.params), **options), trajectory)


def test_these_formulas_are_the_references():
    """The transcriptions above and steepest.reference.sam, both in float64: nothing but float64's rounding between."""
    problem = Problem(noise=1.0)
    w = Tracked.exact(flat(problem.params), F32)
    params = [p.detach().double() for p in problem.params]
    clean, exact = problem.gradient(w, 0), problem.exact_gradient(params)
    ascended = problem.gradient(w + ascent(clean), 0)

    def same(tracked, tensors):
        torch.testing.assert_close(tracked.value, flat(tensors), rtol=1e-6, atol=0)  # constants are rounded to float32

    same(ascent(clean), reference.ascent(params, exact, rho=RHO))
    sam = reference.sam_gradient(problem.exact_gradient, params, rho=RHO)
    same(ascended, sam)
    along = inner(clean, ascended) / inner(ascended, ascended)
    same(ascended - (clean - ascended * along) * constant(0.4), reference.gsam_gradient(exact, sam, 0.4))
    component = ascended - clean * (inner(clean, ascended) / inner(clean, clean))
    exact_component = reference.looksam_component(exact, sam)
    same(component, exact_component)
    scale = (inner(clean, clean) / inner(component, component)).sqrt()
    same(clean + component * (scale * constant(0.7)), reference.looksam_gradient(exact, exact_component, 0.7))
    zero = [torch.zeros_like(x) for x in exact]
    direction, average = reference.friendly_direction(exact, zero, 0.9, 0.8)
    same(clean * constant(1 - 0.8), average)
    same(clean - clean * constant(1 - 0.8) * constant(0.9), direction)
    same(-ascent(clean), reference.momentum_ascent(params, exact, rho=RHO))
    factor = size(clean) * constant(2 * 0.02 / 0.05)
    penalised = problem.gradient(w + ascent(clean, 0.05), 0)
    expected = reference.penalty_gradient(problem.exact_gradient, params, weight=0.02, squared=True, radius=0.05)
    same(clean * (constant(1.0) - factor) + penalised * factor, expected)
