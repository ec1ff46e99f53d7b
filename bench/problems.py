"""What the benchmarks share: inputs, peers, the checks that these compute the same, costs from registry and planner."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

import steepest
from steepest import rules
from steepest._native import WITH_CUDA, lib
from steepest.conformance.registry import registered_ops
from steepest.matrix.polar import UNIT_ROUNDOFF, plan
from steepest.schedules import NORM_MARGIN, Schedule

ADAMW_PEERS: dict[str, Callable] = {
    "torch fused": lambda params, **options: torch.optim.AdamW(params, fused=True, **options),
    "torch foreach": lambda params, **options: torch.optim.AdamW(params, foreach=True, **options),
}


def parameters(shapes, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """Normal values and normal gradients, seeded."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape):
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    params = [draw(shape).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = draw(p.shape)
    return params


def copies(params: list[Tensor]) -> list[Tensor]:
    """The same values in other memory."""
    found = [p.detach().clone().requires_grad_() for p in params]
    for copy, p in zip(found, params):
        copy.grad = p.grad.clone()
    return found


def adamw_costs(params: list[Tensor], *, amsgrad: bool = False) -> dict:
    """Least bytes and FLOPs of a step, from the registry; kernel launches of ours (calls, on the CPU)."""
    from steepest.conformance.cases.adamw import AdamWCase

    op = registered_ops()["adamw"]
    case = AdamWCase("benchmark", shapes=tuple(tuple(p.shape) for p in params), amsgrad=amsgrad)
    launches = 1
    if params[0].is_cuda and WITH_CUDA:
        rule = rules.adam("adamw_", amsgrad=amsgrad, decoupled=True)
        launches = lib.launches(rule.number, rule.flags, len(rule.states), [p.numel() for p in params], [], 1)
    return {
        "nbytes": op.bytes(case, params[0].dtype),
        "flops": op.flops(case),
        "launches": launches,
        "tensors": len(params),
        "elements": sum(p.numel() for p in params),
    }


def step_runners(
    params: list[Tensor], make: Callable, peers: dict[str, Callable]
) -> tuple[Callable, dict[str, Callable]]:
    """Our step and the peers' over copies of params, each taken once and compared.

    `make` and the peers take parameters and return a step.
    """
    rivals = {name: copies(params) for name in peers}
    theirs = {name: peer(rivals[name]) for name, peer in peers.items()}
    ours = make(params)
    ours()
    for name, step in theirs.items():
        step()
        check_same(name, params, rivals[name])
    return ours, theirs


def check_same(name: str, params: list[Tensor], rivals: list[Tensor]) -> None:
    """That a peer has come to the same values in one step.

    Ours and torch's kernels compute in float32 and differ in the order of a few roundings, each of at most half a unit
    in the last place of p and of a step that is far smaller: one unit of the largest parameter bounds it.
    """
    unit = torch.finfo(params[0].dtype).eps * max(p.abs().max().item() for p in params if p.numel())
    apart = max((p - q).abs().max().item() for p, q in zip(params, rivals) if p.numel())
    assert apart <= unit, f"after a step {name} is {apart:g} away from ours, expected at most {unit:g}"


def adamw_runners(params: list[Tensor], peers, *, lr: float = 1e-3, **options) -> tuple[Callable, dict[str, Callable]]:
    def stepping(make):
        return lambda p: make(p, lr=lr, **options).step

    return step_runners(params, stepping(steepest.optim.AdamW), {name: stepping(ADAMW_PEERS[name]) for name in peers})


def newton_schulz(x: Tensor, schedule: Schedule, working: torch.dtype, margin: float = NORM_MARGIN) -> Tensor:
    """The usual five lines: normalise, then X <- (a I + b A + c A^2) X with A = X X^T; batches too."""
    # The norm in float64: torch's float32 sum over these sizes is off by up to 3e-3, which would be most of the error.
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64) * (1 + margin)
    wide = torch.promote_types(x.dtype, torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = ((x.mT if tall else x).to(wide) / norm.to(wide)).to(working)
    multiply_add = torch.addmm if x.dim() == 2 else torch.baddbmm
    for a, b, c in schedule.coefficients:
        gram = x @ x.mT
        x = multiply_add(x, multiply_add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def polar_gate(x: Tensor, schedule: Schedule, working: torch.dtype) -> tuple[Tensor, float]:
    """(the schedule's polynomials of x in float64, how far ours may be from it: largest Frobenius norm over the batch).

    Four times what plain Newton-Schulz in the same working precision misses by on this x: the Gram form is restarted
    before its rounding is amplified by twice as much (steepest.matrix.polar), the other two are for chance.  And one
    rounding of the result to x's dtype.
    """
    unit = UNIT_ROUNDOFF[working]
    margin = max(NORM_MARGIN, 4 * unit)  # as steepest.polar divides
    exact = newton_schulz(x.double(), schedule, torch.float64, margin)
    plain = newton_schulz(x, schedule, working, margin)
    stored = UNIT_ROUNDOFF[x.dtype] * torch.linalg.matrix_norm(exact).max().item()
    return exact, 4 * distance(plain, exact) + stored


def distance(result: Tensor, exact: Tensor) -> float:
    """Largest Frobenius norm of the difference over the batch."""
    return torch.linalg.matrix_norm(result.double() - exact).max().item()


def polar_costs(x: Tensor) -> dict:
    """Least bytes from the registry; FLOPs and products of the plan that will be executed."""
    from steepest.conformance.cases.polar import PolarCase

    case = PolarCase("benchmark", m=x.shape[-2], n=x.shape[-1], batch=tuple(x.shape[:-2]))
    todo = plan(x.shape, x.dtype, x.device)
    return {
        "nbytes": registered_ops()["polar"].bytes(case, x.dtype),
        "flops": todo.flops,
        "form": todo.form,
        "products": todo.grams + todo.symmetric_products + todo.long_products,
    }
