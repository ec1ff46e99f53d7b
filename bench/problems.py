"""What the benchmarks share: inputs, peers, the checks that these compute the same, costs from registry and planner."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

import steepest
from steepest._native import WITH_CUDA, lib
from steepest.conformance.registry import registered_ops
from steepest.matrix.polar import UNIT_ROUNDOFF, plan
from steepest.schedules import NORM_MARGIN, named

ADAMW_PEERS: dict[str, Callable] = {
    "torch fused": lambda params, **options: torch.optim.AdamW(params, fused=True, **options),
    "torch foreach": lambda params, **options: torch.optim.AdamW(params, foreach=True, **options),
}
SCHEDULE = named("polar-express", 5)  # what steepest.polar takes by default


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
        launches = lib.adamw_launches([p.numel() for p in params], [], 1, amsgrad)
    return {
        "nbytes": op.bytes(case, params[0].dtype),
        "flops": op.flops(case),
        "launches": launches,
        "tensors": len(params),
        "elements": sum(p.numel() for p in params),
    }


def adamw_runners(params: list[Tensor], peers, *, lr: float = 1e-3, **options) -> tuple[Callable, dict[str, Callable]]:
    """Our step and the peers' over copies of params, each taken once and compared.

    Ours and torch's kernels compute in float32 and differ in the order of a few roundings, each of at most half a unit
    in the last place of p and of a step that is far smaller: one unit of the largest parameter bounds it.
    """
    rivals = {name: copies(params) for name in peers}
    theirs = {name: ADAMW_PEERS[name](rivals[name], lr=lr, **options) for name in peers}
    ours = steepest.optim.AdamW(params, lr=lr, **options)
    ours.step()
    unit = torch.finfo(params[0].dtype).eps * max(p.abs().max().item() for p in params if p.numel())
    for name, optimizer in theirs.items():
        optimizer.step()
        apart = max((p - q).abs().max().item() for p, q in zip(params, rivals[name]) if p.numel())
        assert apart <= unit, f"after a step {name} is {apart:g} away from ours, expected at most {unit:g}"
    return ours.step, {name: optimizer.step for name, optimizer in theirs.items()}


def newton_schulz(x, margin: float = NORM_MARGIN):
    """The usual five lines: normalise, then X <- (a I + b A + c A^2) X with A = X X^T, in x's dtype; batches too."""
    # The norm in float64: torch's float32 sum over these sizes is off by up to 3e-3, which would be most of the error.
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    x = x / (norm * (1 + margin)).to(x.dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    multiply_add = torch.addmm if x.dim() == 2 else torch.baddbmm
    for a, b, c in SCHEDULE.coefficients:
        gram = x @ x.mT
        x = multiply_add(x, multiply_add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def accuracy(result, x, unit: float) -> tuple[float, float]:
    """Largest Frobenius error over the batch against the same polynomials in float64, and its bound.

    The bound is that of `steepest.polar`'s docstring, 2 (T + 1) u slope, and the rounding of the result to x's dtype.
    """
    exact = newton_schulz(x.double(), max(NORM_MARGIN, 4 * unit))
    error = torch.linalg.matrix_norm(result.double() - exact).max().item()
    stored = UNIT_ROUNDOFF[x.dtype] * torch.linalg.matrix_norm(exact).max().item()
    return error, 2 * (SCHEDULE.steps + 1) * unit * SCHEDULE.slope + stored


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
