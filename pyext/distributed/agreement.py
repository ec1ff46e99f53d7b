"""What all ranks must know alike before a step: which parameters have a gradient somewhere, and whether one refused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from steepest.distributed.collectives import collective
from steepest.distributed.layout import Team


def agree(op: str, team: Team, flags: Sequence[bool], error: Exception | None, device: torch.device) -> list[bool]:
    """The flags that are set on any rank.  A rank that refuses the step raises its error, and all others say whose.

    Cost: one all-reduce of 4 bytes per flag; on a GPU the host waits for it.
    """
    refused = 0 if error is None else team.me + 1
    row = torch.tensor([refused, *map(int, flags)], dtype=torch.int32, device=device)
    with collective(op, "agreeing on gradients", team.group):
        dist.all_reduce(row, dist.ReduceOp.MAX, group=team.group)
    refused, *found = row.tolist()
    if error is not None:
        raise error
    if refused:
        raise RuntimeError(
            f"{op}: rank {team.ranks[refused - 1]} refused this step (see its error); nothing was changed"
        )
    return [bool(flag) for flag in found]
