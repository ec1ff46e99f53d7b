"""Distributed Shampoo's update rule in plain PyTorch, block by block: the oracle for `steepest.optim.Shampoo`.

Shi et al., "A Distributed Data-Parallel PyTorch Implementation of the Distributed Shampoo Optimizer", arXiv 2309.06497,
algorithms 1 and 2; Gupta, Koren, Singer, arXiv 1802.09568; Anil et al., arXiv 2002.09018.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from steepest.reference.roots import inverse_root


def shampoo_(
    param: Tensor,
    grad: Tensor,
    state: dict,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    ridge: float = 1e-12,
    block_size: int | None = None,
    grafting: str = "adam",
    grafting_beta: float = 0.999,
    grafting_eps: float = 1e-8,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    exponent: int | None = None,
    statistic: str = "shampoo",
    due: Callable[[int, int], bool] = lambda step, block: True,
) -> None:
    """One step for one parameter, in place; `state` starts as {} and holds what the rule remembers.

    Every dimension is cut into pieces of at most block_size, and each block G (d1 x ... x dk) is a problem of its own::

        L_i = b2 L_i + (1 - b2) G_(i) G_(i)^T         (b2 = 1: sums), G_(i) the unfolding along dimension i
        M   = b1 M + (1 - b1) G
        P   = M / (1 - b1^t) multiplied along each dimension i by (L_i / (1 - b2^t) + ridge I)^(-1/p), p = 2 k
        P   = P |graft| / |P|                          Frobenius norms; graft by `grafting` from M / (1 - b1^t):
              sgd: itself; adagrad, rmsprop, adam: divided by sqrt(V) + eps, V the sum, the mean, the corrected mean
        B   = momentum B + P;  P = P + momentum B if nesterov else B
        W   = W (1 - lr weight_decay) - lr P

    statistic="kl", from KL-Shampoo (Lin et al., arXiv 2509.03378): p = 2, and L_i sees H / sqrt(prod_(j != i) d_j) for
    G, H being G multiplied along all j != i by the roots that there are, or, before there are any, by r^(-1/k) each, r
    the root mean square of G.  L_i starts as (1 - b2) r^(2/k) I, one gradient without direction, so 1 - b2^(t + 1) is
    what it is divided by.

    exponent replaces p.  due(t, block): whether the block's roots are computed anew in step t, counted from 1; without
    roots yet the graft itself is the step.
    """
    state["step"] = step = state.get("step", 0) + 1
    decay, update = 1 - lr * weight_decay, torch.zeros_like(param)
    for number, where in enumerate(blocks(param.shape, block_size)):
        one = state.setdefault(number, {})
        options = (betas, ridge, grafting, grafting_beta, grafting_eps, exponent, statistic)
        direction = _direction(grad[where], one, step, due(step, number), *options)
        if momentum:
            one["momentum"] = momentum * one.get("momentum", 0) + direction
            direction = direction + momentum * one["momentum"] if nesterov else one["momentum"]
        update[where] = direction
    param.mul_(decay).sub_(lr * update)


def blocks(shape, block_size: int | None) -> list[tuple[slice, ...]]:
    """Index of each block, the last dimension running fastest."""
    cuts = []
    for size in shape:
        width = block_size or max(size, 1)
        cuts.append([slice(start, min(start + width, size)) for start in range(0, size, width)])
    return list(itertools.product(*cuts))


def _direction(g, state, step, due, betas, ridge, grafting, grafting_beta, grafting_eps, exponent, statistic):
    beta1, beta2 = betas
    order = g.dim()
    seen = [_whitened(g, i, state.get("roots")) if statistic == "kl" else g for i in range(order)]
    unfolded = [h.movedim(i, 0).reshape(g.shape[i], -1) for i, h in enumerate(seen)]
    start = [0.0] * order
    if statistic == "kl":
        start = [(1 - beta2) * g.square().mean() ** (1 / order) * torch.eye(n, dtype=g.dtype) for n in g.shape]
    old = state.get("statistics", start)
    weight = 1 - beta2 if beta2 < 1 else 1.0
    state["statistics"] = [beta2 * s + weight * u @ u.T for s, u in zip(old, unfolded)]
    state["filtered"] = beta1 * state.get("filtered", 0.0) + (1 - beta1) * g
    m = state["filtered"] / (1 - beta1**step)
    graft = _graft(m, g, state, step, grafting, grafting_beta, grafting_eps)
    if due:
        correction = 1 - beta2 ** (step + (statistic == "kl")) if beta2 < 1 else 1.0
        p = exponent or (2 if statistic == "kl" else 2 * order)
        state["roots"] = [inverse_root(s / correction, p, ridge=ridge, absolute=True) for s in state["statistics"]]
    if "roots" not in state:
        return graft
    direction = m
    for i, root in enumerate(state["roots"]):
        direction = _along(root, direction, i)
    return direction if grafting == "none" else direction * (graft.norm() / direction.norm())


def _along(matrix, x, i):
    """x multiplied along dimension i."""
    return torch.tensordot(matrix, x, dims=([1], [i])).movedim(0, i)


def _whitened(g, side, roots):
    rms, h = g.square().mean().sqrt(), g
    for i in range(g.dim()):
        if i != side:
            h = (_along(roots[i], h, i) if roots else h * rms ** (-1 / g.dim())) / g.shape[i] ** 0.5
    return h


def _graft(m, g, state, step, grafting, beta, eps):
    if grafting in ("none", "sgd"):
        return m
    v = state.get("squares", 0.0)
    v = v + g.square() if grafting == "adagrad" else beta * v + (1 - beta) * g.square()
    state["squares"] = v
    if grafting == "adam":
        v = v / (1 - beta**step)
    return m / (v.sqrt() + eps)
