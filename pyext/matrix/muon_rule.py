"""Muon's rule in parts, for whole matrices and for shards of them: momentum, polar factors, update."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from steepest import rules
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
    """B <- B + (1 - momentum) (G - B); returns G + momentum (B - G) if nesterov, else B itself.  Elementwise."""
    momentum, nesterov = group["momentum"], group["nesterov"]
    if all(b.dtype == g.dtype for b, g in zip(buffers, grads)):
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        return list(torch._foreach_lerp(grads, buffers, momentum)) if nesterov else buffers
    # Of two dtypes: in float32, each result rounded once.
    wide = [g.float() for g in grads]
    advanced = [torch.lerp(b.float(), g, 1 - momentum) for b, g in zip(buffers, wide)]
    torch._foreach_copy_(buffers, advanced)
    return list(torch._foreach_lerp(wide, advanced, momentum)) if nesterov else advanced


def elements_moved(group: dict) -> int:
    """What `with_momentum` and `apply` read and write per element of a shard, momentum of the parameters' dtype."""
    return (6 if group["nesterov"] else 3) + 5 + (3 if group["cautious"] and group["weight_decay"] else 0)


def polar_options(group: dict) -> dict:
    return {name: group[name] for name in ("schedule", "steps", "norm")}


def working_dtype(device: torch.device) -> torch.dtype | None:
    """On a GPU half precision is the working precision of choice: 8x more accurate than bfloat16 at its speed."""
    return torch.float16 if device.type == "cuda" else None


def factors(group: dict, parts: list[Tensor]) -> list[Tensor]:
    """The polar factors of stacks (batch, rows, columns) of matrices of one shape, in one call."""
    found = polar(
        parts[0] if len(parts) == 1 else torch.cat(parts), dtype=working_dtype(parts[0].device), **polar_options(group)
    )
    return list(found.split([len(part) for part in parts]))


def multipliers(group: dict, rows: int, columns: int) -> tuple[float | Tensor, float | Tensor]:
    """(1 - lr weight_decay, -lr scale(rows, columns)), by which W and its polar factor enter the step.

    Numbers; of a capturable group 0-dim float64 tensors where lr or weight_decay is one, so that nothing is waited for
    and a replayed graph sees their values of that time.
    """
    scale = group["scale"] if callable(group["scale"]) else SCALES[group["scale"]]
    lr, decay = (rules.live_number(group[name], group.get("capturable", False)) for name in ("lr", "weight_decay"))
    return 1 - lr * decay, -lr * scale(rows, columns)


def apply(group: dict, rows: int, columns: int, targets: list[Tensor], steps: list[Tensor]) -> None:
    """W <- W (1 - lr weight_decay) - lr scale(rows, columns) polar(U), for parts of matrices of this shape.

    cautious: decay only where the step moves towards zero.
    """
    keep, size = multipliers(group, rows, columns)
    cautious = group["cautious"] and not (isinstance(keep, float) and keep == 1.0)
    steps = [step.reshape(t.shape).to(t.dtype) for step, t in zip(steps, targets)]
    if isinstance(keep, Tensor) or isinstance(size, Tensor):
        _apply_live(keep, size, cautious, targets, steps)
        return
    if cautious:
        kept = [torch.where(step * t > 0, keep, 1.0) for step, t in zip(steps, targets)]
        torch._foreach_mul_(targets, kept)
    else:
        torch._foreach_mul_(targets, keep)
    torch._foreach_add_(targets, steps, alpha=size)


def _apply_live(keep, size, cautious: bool, targets: list[Tensor], steps: list[Tensor]) -> None:
    """The same in float32 at least, rounded once: a tensor as a factor would be rounded to the weights' dtype first,
    and 1 - lr weight_decay is 1 in bfloat16."""
    for t, step in zip(targets, steps):
        dtype = torch.promote_types(t.dtype, torch.float32)
        wide, change = t.to(dtype), step.to(dtype)
        keep_here = keep.to(wide) if isinstance(keep, Tensor) else keep
        kept = torch.where(change * wide > 0, keep_here, 1.0) if cautious else keep_here
        t.copy_(wide * kept + change * (size.to(wide) if isinstance(size, Tensor) else size))
