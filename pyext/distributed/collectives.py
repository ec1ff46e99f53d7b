"""Collective operations with errors that say what was under way."""

from __future__ import annotations

from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor

from steepest.distributed.shards import Reach

# The name since torch 2.13; the older one warns there.
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


@contextmanager
def collective(op: str, what: str, group: dist.ProcessGroup | None):
    """Turns the failure of a collective operation into an error that names it and says what to do."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{op}: {what} among {dist.get_world_size(group)} ranks failed on rank {dist.get_rank()}: a rank was lost "
            f"or did not take part in time. This step is not complete; restart from the last checkpoint. ({error})"
        ) from error


def gather_over(reach: Reach, parts: Tensor, op: str, what: str) -> Tensor:
    """Each rank's `parts` (k,) as rows of (ranks, k), in the order of mesh coordinates: the same on all ranks."""
    found = parts.reshape(1, -1)
    for group in reach.groups():
        out = found.new_empty((dist.get_world_size(group) * found.shape[0], found.shape[1]))
        with collective(op, what, group):
            _all_gather(out, found.contiguous(), group=group)
        found = out
    return found
