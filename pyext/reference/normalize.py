"""Weight normalisation and path normalisation in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def weight_norm(v: Tensor, g: Tensor, dim: int | None = 0) -> Tensor:
    """g v / ‖v‖, the norm over all dimensions but `dim` (None: over all); 0 where ‖v‖ is, NaN where v has NaN."""
    others = [d for d in range(v.dim()) if dim is None or d != dim % v.dim()]
    square = v.square().sum(others, keepdim=True) if others else v.square()
    length = torch.where(square != 0, square, 1).sqrt()  # its derivative at 0 would be inf
    return torch.where(square != 0, g / length, 0) * v


@torch.no_grad()
def path_normalize_(params, grads) -> Tensor:
    """w / sqrt(sum of ‖g_i‖²), in place, over all tensors; nothing changes where the sum is 0.  Returns the root."""
    norm = sum((g.double().square().sum() for g in grads), torch.zeros((), dtype=torch.float64)).sqrt()
    if norm > 0:
        for p in params:
            work = torch.promote_types(p.dtype, torch.float32)
            p.copy_(p.to(work) * (1 / norm).to(work))
    return norm.float()
