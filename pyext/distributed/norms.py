"""Joint norms of tensors that are spread over ranks: every shard counts once, replicas do not count again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from steepest.distributed.collectives import gather_over
from steepest.distributed.shards import Reach, reach_of, reaches_of

Part = tuple[float, float, bool]  # (sum |x / scale|^q, largest |x|, whether anything is not finite)


@torch.no_grad()
def reduce_norm(norms: Sequence[Tensor | float], tensors: Sequence[Tensor], q: float = 2.0) -> Tensor:
    """The joint norm of order q of all tensors, from the norms that this rank found of its shards of them.

        norm = (sum over i and over the ranks that tensors[i] is cut over of norms[i]^q)^(1/q),  q = inf: the largest

    Args:
        norms: one 0-dim tensor or number per tensor, the norm of order q of `local(tensors[i])`; 0 where this rank has
            nothing to add.
        tensors: DTensors or plain tensors; only their layouts are looked at.  A plain tensor is taken as whole.
            All ranks must list tensors of the same layouts in the same order.
        q: >= 1, or math.inf.

    Returns a 0-dim float32 tensor, the same bits on every rank; without waiting for a device.  Raises RuntimeError
    when a rank is lost.  Cost: one all-gather of 8 bytes per mesh dimension and distinct layout.
    """
    if len(norms) != len(tensors):
        raise ValueError(f"reduce_norm: {len(norms)} norms for {len(tensors)} tensors")
    device = next((n.device for n in norms if isinstance(n, Tensor)), torch.device("cpu"))
    pairs = [
        (reach_of(tensor), torch.as_tensor(norm, dtype=torch.float64, device=device))
        for norm, tensor in zip(norms, tensors)
    ]
    return joint_norm("reduce_norm", pairs, reaches_of(tensors), q, device).float()


def joint_norm(
    op: str, pairs: Sequence[tuple[Reach | None, Tensor]], reaches: Sequence[Reach], q: float, device: torch.device
) -> Tensor:
    """The joint norm of order q, 0-dim float64, of norms (0-dim) of this rank's parts, each of its reach.

    reaches: all that any rank may have parts of, in the same order on all ranks.
    """
    found = []
    for reach in [None, *reaches]:
        mine = [norm.double().reshape(()).to(device) for other, norm in pairs if other == reach]
        joint = torch.linalg.vector_norm(torch.stack(mine), q) if mine else torch.zeros((), dtype=torch.float64)
        if reach is not None:
            joint = torch.linalg.vector_norm(gather_over(reach, joint.to(device), op, "adding up norms"), q)
        found.append(joint.to(device))
    return torch.linalg.vector_norm(torch.stack(found), q)


def reduce_parts(op: str, parts: Sequence[tuple[Reach | None, Part]], reaches: Sequence[Reach]) -> list[Part]:
    """What `norms.native` found of this rank's shards, added up over the ranks of each reach.

    reaches: all that any rank may have parts of, in the same order on all ranks; a rank without parts takes part.
    """
    out = [part for reach, part in parts if reach is None]
    for reach in reaches:
        mine = [part for other, part in parts if other == reach]
        row = [math.fsum(part[0] for part in mine), *_worst(mine)]
        everyone = gather_over(reach, torch.tensor(row, dtype=torch.float64), op, "adding up the gradients' norm")
        rows = [(power, largest, bool(bad)) for power, largest, bad in everyone.tolist()]
        out.append((math.fsum(row[0] for row in rows), *_worst(rows)))
    return out


def _worst(parts: Sequence[Part]) -> tuple[float, bool]:
    """Largest magnitude, NaN if any is, and whether anything is not finite."""
    values = [part[1] for part in parts]
    largest = math.nan if any(map(math.isnan, values)) else max(values, default=0.0)
    return largest, any(part[2] for part in parts)
