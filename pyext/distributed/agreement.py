"""What all ranks must know alike before a step: which parameters have a gradient somewhere, and whether one refused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from steepest.distributed.collectives import collective
from steepest.distributed.layout import Layout, Team, layout_of
from steepest.distributed.shards import is_dtensor


class Roster:
    """The parameters of a list that are spread over ranks, and where they lie.

    DTensors are; plain parameters are when there is a process group, each of whose ranks has them all.
    """

    def __init__(self, op: str, params: Sequence[Tensor], process_group: dist.ProcessGroup | None):
        self.op = op
        self.params = [p for p in params if is_dtensor(p) or process_group is not None]
        self.layouts: list[Layout] = [layout_of(p, process_group) for p in self.params]

    def agree(self, error: Exception | None) -> list[bool]:
        """Which of the parameters have a gradient on any rank.

        A rank that refuses the step calls this with its error, which is raised there; all others say whose it was.
        """
        given = [p.grad is not None for p in self.params]
        for team in dict.fromkeys(layout.team for layout in self.layouts):
            places = [i for i, layout in enumerate(self.layouts) if layout.team == team]
            found = agree(self.op, team, [given[i] for i in places], error, self.params[places[0]].device)
            for i, flag in zip(places, found):
                given[i] = flag
        return given


def agree(op: str, team: Team, flags: Sequence[bool], error: Exception | None, device: torch.device) -> list[bool]:
    """The flags that are set on any rank of the team; raises everywhere when one rank has an error.

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
