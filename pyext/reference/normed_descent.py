"""Steepest descent under a norm, in plain PyTorch with an exact singular value decomposition."""

from __future__ import annotations

import torch


def as_matrix(g: torch.Tensor) -> torch.Tensor:
    """A tensor as the matrix whose spectral norm is meant: first dimension by all others; vectors as one row."""
    return g.reshape(1, -1) if g.dim() < 2 else g.reshape(g.shape[0], -1)


def direction(g: torch.Tensor, norm: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(the D with ‖D‖ = 1 that maximises <g, D>, that maximum: the dual norm of g); zeros where g is zero."""
    if norm == "l2":
        size = g.norm()
        return g / torch.where(size > 0, size, 1.0), size
    if norm == "linf":
        return g.sign(), g.abs().sum()
    u, s, vh = torch.linalg.svd(as_matrix(g), full_matrices=False)
    kept = (s > 0).to(s.dtype)
    return ((u * kept) @ vh).reshape(g.shape), s.sum()


@torch.no_grad()
def normed_descent_(params, grads, *, lr, norm="l2", normalized=True, weight_decay=0.0, maximize=False):
    """p = p (1 - lr weight_decay) - lr D, D = argmax over ‖D‖ = 1 of <g, D>; times g's dual norm if not normalized.

    norm: "l2" (Frobenius), "linf" (largest element: sign descent) or "spectral" (of the first dimension by all others).
    """
    for p, g in zip(params, grads):
        work = torch.promote_types(p.dtype, torch.float32)
        g = -g.to(work) if maximize else g.to(work)
        if not g.numel():
            continue
        d, dual = direction(g, norm)
        p.copy_(p.to(work) * (1 - lr * weight_decay) - lr * (d if normalized else dual * d))
