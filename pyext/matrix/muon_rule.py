"""Muon's rule in three parts, for whole matrices and for shards of them: momentum, polar factor, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steepest.matrix.polar import polar

SCALES: dict[str, Callable[[int, int], float]] = {
    # out x in matrix -> factor on lr.  Sources: Jordan et al. 2024; Liu et al. 2025 (Moonlight), which matches the
    # root mean square of AdamW's update; Bernstein & Newhouse 2024, steepest descent in the spectral norm.
    "keller": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match-adamw-rms": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral": lambda rows, columns: math.sqrt(rows / columns),
    "none": lambda rows, columns: 1.0,
}


def with_momentum(group: dict, grads: list[Tensor], buffers: list[Tensor]) -> list[Tensor]:
    """B <- B + (1 - momentum) (G - B); returns G + momentum (B - G) if nesterov, else B.  Elementwise."""
    momentum = group["momentum"]
    torch._foreach_lerp_(buffers, grads, 1 - momentum)
    return list(torch._foreach_lerp(grads, buffers, momentum)) if group["nesterov"] else buffers


def working_dtype(device: torch.device) -> torch.dtype | None:
    """On a GPU half precision is the working precision of choice: 8x more accurate than bfloat16 at its speed."""
    return torch.float16 if device.type == "cuda" else None


def factors(group: dict, updates: Sequence[Tensor]) -> list[Tensor]:
    """The polar factors of whole matrices of one shape, in one batch."""
    options = dict(schedule=group["schedule"], steps=group["steps"], dtype=working_dtype(updates[0].device))
    if len(updates) == 1:
        return [polar(updates[0], **options)]
    return list(polar(torch.stack(list(updates)), **options).unbind())


def decay(group: dict, params: list[Tensor]) -> None:
    """W <- W (1 - lr weight_decay)."""
    torch._foreach_mul_(params, 1 - float(group["lr"]) * group["weight_decay"])


def descend(group: dict, shape: tuple[int, int], params: list[Tensor], polar_factors: list[Tensor]) -> None:
    """W <- W - lr scale(out, in) polar(U), for parts of matrices of this shape."""
    scale = group["scale"] if callable(group["scale"]) else SCALES[group["scale"]]
    torch._foreach_add_(params, polar_factors, alpha=-float(group["lr"]) * scale(*shape))
