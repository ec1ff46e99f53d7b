"""Inverse roots against a Python loop of torch.linalg.eigh, as other packages compute them, and Shampoo's step.

The loop takes each block's eigenvalues and vectors, adds the ridge, and multiplies the root out.
"""

from __future__ import annotations

import pytest
import torch
from problems import copies, parameters

import steepest
from steepest.conformance.registry import registered_ops
from steepest.conformance.root_bounds import CONSTANT
from steepest.matrix.root_plan import UNIT, plan
from steepest.reference.roots import inverse_root as oracle

RIDGE, TOL = 1e-6, 1e-3
QUICK = {"16x128x128": (16, 128), "32x64x64": (32, 64), "1x512x512": (1, 512)}
FULL = {"64x128x128": (64, 128), "128x64x64": (128, 64), "16x256x256": (16, 256), "1x1024x1024": (1, 1024)}
ON_GPU = {"230x1024x1024": (230, 1024), "640x512x512": (640, 512), "8x2048x2048": (8, 2048)}


def statistics(count: int, n: int, device: str) -> torch.Tensor:
    """Mean of n / 4 outer products and a fading tail, per block: what Shampoo takes roots of."""
    generator = torch.Generator(device).manual_seed(0)
    fading = torch.logspace(0, -3, n, device=device)
    x = torch.randn(count, n, n, generator=generator, device=device) * fading
    return x @ x.mT / n


def eigh_loop(a: torch.Tensor, p: int = 4) -> torch.Tensor:
    roots = []
    for block in a:
        w, q = torch.linalg.eigh(block)
        roots.append((q * (w.clamp(min=0) + RIDGE * w[-1]) ** (-1 / p)) @ q.mT)
    return torch.stack(roots)


def eigh_batch(a: torch.Tensor, p: int = 4) -> torch.Tensor:
    w, q = torch.linalg.eigh(a)
    return (q * (w.clamp(min=0) + RIDGE * w[:, -1:])[:, None, :] ** (-1 / p)) @ q.mT


def check_roots(a: torch.Tensor) -> dict[str, float]:
    """Relative errors against float64, ours within its published bound."""
    x, status = steepest.inverse_root(a, ridge=RIDGE, tol=TOL, return_status=True)
    assert status.ok.all(), f"{int((~status.ok).sum())} of {len(a)} roots are not ok"
    todo, few = plan(a.shape, a.dtype, a.device, ridge=RIDGE, tol=TOL), a[:2].double()
    exact = oracle(few, ridge=RIDGE, scale=status.scale[:2].double())
    error = ((x[:2] - exact).norm() / exact.norm()).item()
    unit = UNIT[todo.precision]
    perturbation = CONSTANT * unit if todo.schedule else 2 * status.residual[:2].max().item() + unit
    bound = TOL + perturbation / (4 * RIDGE)
    assert error <= bound, f"ours is {error:g} away from float64, expected at most {bound:g}"
    theirs = oracle(few, ridge=RIDGE)
    return {"ours": error, "eigh loop": ((eigh_loop(a[:2]) - theirs).norm() / theirs.norm()).item()}


def roots_race(race, device: str, count: int, n: int) -> None:
    from steepest.conformance.cases.roots import RootCase

    a = statistics(count, n, device)
    errors = check_roots(a)
    todo = plan(a.shape, a.dtype, a.device, ridge=RIDGE, tol=TOL)
    case = RootCase("benchmark", n=n, batch=(count,))
    race(
        lambda: steepest.inverse_root(a, ridge=RIDGE, tol=TOL), {"eigh loop": lambda: eigh_loop(a),
        "batched eigh": lambda: eigh_batch(a)}, op="inverse_root", case=f"{count} x {n} x {n} float32",
        nbytes=registered_ops()["inverse_root"].bytes(case, a.dtype), flops=todo.flops if todo.schedule else None,
        errors=errors, method=todo.method, products=todo.products,
    )  # fmt: skip


@pytest.mark.cases(quick=QUICK, full=FULL)
def bench_roots(race, device, case):
    roots_race(race, device, *case)


@pytest.mark.gpu
@pytest.mark.cases(quick={"16x1024x1024": (16, 1024)}, full=ON_GPU)
def bench_roots_gpu(race, device, case):
    roots_race(race, device, *case)


class PlainShampoo:
    """Shampoo as it is usually written: parameter by parameter, block by block, roots by eigh; grafted to its SGD."""

    def __init__(self, params, lr: float, block_size: int, beta: float):
        self.params, self.lr, self.block_size, self.beta, self.state, self.step_number = (
            params,
            lr,
            block_size,
            beta,
            {},
            0,
        )

    @torch.no_grad()
    def step(self) -> None:
        self.step_number += 1
        correction = 1 - self.beta**self.step_number
        for p in self.params:
            for i, rows in enumerate(p.split(self.block_size)):
                for j, block in enumerate(rows.split(self.block_size, 1)):
                    g = p.grad.split(self.block_size)[i].split(self.block_size, 1)[j]
                    left, right = self.state.setdefault((p, i, j), (0 * (g @ g.mT), 0 * (g.mT @ g)))
                    left.lerp_(g @ g.mT, 1 - self.beta)
                    right.lerp_(g.mT @ g, 1 - self.beta)
                    direction = eigh_loop(left[None] / correction)[0] @ g @ eigh_loop(right[None] / correction)[0]
                    block.sub_(direction, alpha=self.lr * g.norm() / direction.norm())


def pytorch_optimizer_step(params: list[torch.Tensor]):
    """The step of pytorch-optimizer's ScalableShampoo (its Shampoo with blocks) at our settings, or None without it.

    It grafts by parameter where ours does by block, and takes roots by coupled Newton.
    """
    try:
        from pytorch_optimizer import ScalableShampoo
    except ImportError:
        return None
    options = dict(betas=(0.0, 0.95), block_size=128, preconditioning_compute_steps=1, start_preconditioning_step=1)
    return ScalableShampoo(params, lr=0.01, nesterov=False, graft_type=1, **options).step


def check_step(name: str, before: list, mine: list, theirs: list, least: float) -> None:
    """Both have gone the same way as far: cosine above `least`, lengths within 1 %."""
    for w, p, q in zip(before, mine, theirs):
        ours, other = (p - w).double().flatten(), (q - w).double().flatten()
        cosine = torch.nn.functional.cosine_similarity(ours, other, 0).item()
        assert cosine > least, f"the step of {name} over {tuple(p.shape)} has cosine {cosine:.4f} with ours"
        assert 0.99 < ours.norm() / other.norm() < 1.01


@pytest.mark.cases(
    quick={"8x128x128": [(128, 128)] * 8}, full={"demo model": [(128, 128)] * 20 + [(512, 128)] * 5 + [(128, 512)] * 5}
)
def bench_shampoo(race, device, case):
    """Roots in every step, blocks of 128, full-rank gradients; the peers' steps agree in direction and length.

    Ridges differ by the factor of at most 2 between lambda and the largest eigenvalue; a first step of a square block
    is its polar factor but for its few smallest singular values.
    """
    params = parameters(case, torch.float32, device)
    theirs, others, before = copies(params), copies(params), [p.detach().clone() for p in params]
    options = dict(betas=(0.0, 0.95), ridge=RIDGE, block_size=128, precondition_frequency=1, grafting="sgd")
    ours = steepest.optim.Shampoo(params, lr=0.01, **options)
    peers = {"plain loop over blocks": PlainShampoo(theirs, 0.01, 128, 0.95).step}
    scalable = pytorch_optimizer_step(others)
    ours.step()
    peers["plain loop over blocks"]()
    check_step("the plain loop", before, params, theirs, 0.99)
    if scalable:
        peers["pytorch-optimizer"] = scalable
        scalable()
        check_step("pytorch-optimizer", before, params, others, 0.95)
    race(
        ours.step, peers, op="shampoo", case=f"{len(case)} matrices, roots every step",
        tensors=len(case), elements=sum(p.numel() for p in params),
    )  # fmt: skip
