"""Polar factors of matrices that are cut along their long side: every rank keeps its part, n x n matrices are added up.

In the Gram form everything but two long products per run happens to polynomials of X X^T, n x n for n <= m.  X X^T is
the sum of the parts' Gram matrices; the polynomials are computed by every rank alike, and applied to its own part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from steepest.distributed.collectives import collective, gather_over
from steepest.distributed.layout import Layout, size
from steepest.distributed.shards import Reach
from steepest.matrix import polar as polar_module
from steepest.matrix.norm_bounds import initial_size
from steepest.matrix.polar import Plan, plan
from steepest.matrix.verbs import full_float32


def long_side(layout: Layout) -> int | None:
    """The dimension along which the matrix is cut, if it is cut along its longer (or equal) dimension alone."""
    cut = [d for d in (0, 1) if any(region[d] != (0, layout.shape[d]) for region in layout.regions)]
    if len(cut) != 1 or layout.shape[cut[0]] < layout.shape[1 - cut[0]]:
        return None
    return cut[0]


def sent_elements(layout: Layout, cuts: Sequence[int], runs: int) -> int:
    """Elements that all ranks together send to add up the Gram matrix `runs` times: rings of 2 (k - 1) / k per rank.

    cuts: sizes of the mesh dimensions over which the matrix is cut.
    """
    n, ranks = min(layout.shape), len(layout.team)
    return sum(ranks // k * 2 * (k - 1) * n * n * runs for k in cuts)


def local_flops(layout: Layout, options: dict, device: torch.device, working: torch.dtype | None) -> int:
    """Of the rank with the largest part: polynomials of the n x n Gram matrix, and products with its part of m."""
    n, m = sorted(layout.shape)
    whole, double = (gram_plan((n, length), device, options, working).flops for length in (m, 2 * m))
    along = double - whole  # what grows with m; the rest is the same on every rank
    part = max(size(region) for region in layout.regions) / n
    return round(whole - along + along * part / m)


def gram_plan(shape, device: torch.device, options: dict, working: torch.dtype | None) -> Plan:
    # The C library's products are recorded and run as one program, with no place for a sum over ranks.
    backend = "triton" if device.type == "cuda" else "torch"
    return plan(shape, torch.float32, device, form="gram", working=working, backend=backend, **options)


class _Summed:
    """Verbs whose Gram matrix is the sum over all parts of a matrix."""

    def __init__(self, op: str, verbs, reach: Reach, counter: GramFactors):
        self._op, self._verbs, self._reach, self._counter = op, verbs, reach, counter

    def __getattr__(self, name: str):
        return getattr(self._verbs, name)

    def gram(self, x: Tensor) -> Tensor:
        part = self._verbs.gram(x)
        whole = part.float() if part.dtype.itemsize < 4 else part
        for group in self._reach.groups():
            with collective(self._op, "adding up Gram matrices", group):
                dist.all_reduce(whole, group=group)
            self._counter.count(whole, dist.get_world_size(group))
        return whole.to(part.dtype)


class GramFactors:
    """Polar factors of this rank's parts; counts what it sends, as a ring all-reduce sends it."""

    def __init__(self, op: str):
        self.op, self.sent = op, 0.0

    def count(self, summed: Tensor, ranks: int) -> None:
        self.sent += 2 * (ranks - 1) / ranks * summed.numel() * summed.element_size()

    @torch.no_grad()
    def __call__(
        self, parts: Sequence[Tensor], layout: Layout, reach: Reach, options: dict, working: torch.dtype | None
    ) -> list[Tensor]:
        """parts: of matrices of one layout, each (rows, columns) of its region here; may have no elements."""
        side = long_side(layout)
        todo = gram_plan(layout.shape, parts[0].device, options, working)
        stack = torch.stack(list(parts))
        flat = stack if side == 1 else stack.mT  # n x part of m
        with torch.autocast(stack.device.type, enabled=False), full_float32():
            bound = initial_size(todo.norm, min(layout.shape), polar_module.UNIT_ROUNDOFF[todo.dtype])
            y = self._normalised(flat, todo.dtype, reach, bound)
            verbs = _Summed(self.op, polar_module._verbs(todo.backend), reach, self)
            out = polar_module._gram_form(y, todo, verbs).to(stack.dtype)
        return list((out if side == 1 else out.mT).unbind())

    def _normalised(self, x: Tensor, dtype: torch.dtype, reach: Reach, bound: float) -> Tensor:
        """`polar.normalised` of whole matrices, from each part's largest element and squares relative to it."""
        wide = x.to(torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32))
        shape = (len(x), 1, 1)
        mine = wide.abs().amax((1, 2), keepdim=True) if wide.numel() else wide.new_zeros(shape)
        relative = (wide / mine.where(mine != 0, 1)).double()
        squares = relative.square().sum((1, 2))
        sent = torch.cat([mine.flatten().double(), squares])
        found = gather_over(reach, sent, self.op, "adding up norms").view(-1, 2, len(x))
        largest = found[:, 0].amax(0)
        ratio = found[:, 0] / largest.where(largest != 0, 1)
        norm = (found[:, 1] * ratio.square()).sum(0).sqrt().view(shape)
        scale = (1 + polar_module.margin(dtype)) / bound * norm.clamp(min=1)
        top = largest.view(shape).to(wide)
        y = (wide / top.where(top != 0, 1)).to(torch.promote_types(dtype, torch.float32))
        return y.div_(scale.to(y.dtype)).to(dtype)
