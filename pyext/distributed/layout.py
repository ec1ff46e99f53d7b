"""Where a tensor lies on the ranks that hold it: each rank's region, computed without asking anybody."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist
from torch import Tensor

from steepest.distributed.shards import is_dtensor

Region = tuple[tuple[int, int], ...]  # (start, stop) per dimension


def overlap(a: Region, b: Region) -> Region | None:
    """None when nothing is in both."""
    both = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b))
    return None if any(start >= stop for start, stop in both) else both


def size(region: Region) -> int:
    return math.prod(max(0, stop - start) for start, stop in region)


def slices(region: Region, origin: Region) -> tuple[slice, ...]:
    """The index of `region` in a tensor that holds `origin`."""
    return tuple(slice(start - base, stop - base) for (start, stop), (base, _) in zip(region, origin))


@dataclass(frozen=True)
class Team:
    """The ranks that share tensors, in the order of their process group."""

    ranks: tuple[int, ...]

    @property
    def group(self) -> dist.ProcessGroup:
        return _groups[self.ranks][1]

    @property
    def me(self) -> int:
        return self.ranks.index(dist.get_rank())

    def __len__(self) -> int:
        return len(self.ranks)


# ranks -> (the default group when it was made, their group): groups end with the default group.
_groups: dict[tuple[int, ...], tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}


def team_of_group(group: dist.ProcessGroup) -> Team:
    ranks = tuple(dist.get_process_group_ranks(group))
    _groups[ranks] = dist.group.WORLD, group
    return Team(ranks)


def team_of_mesh(mesh) -> Team:
    """All ranks of a mesh.  Their group is made once, by these ranks alone, when the mesh has several dimensions."""
    ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
    known = _groups.get(ranks)
    if known is None or known[0] is not dist.group.WORLD:
        if mesh.ndim == 1:
            return team_of_group(mesh.get_group(0))
        if len(ranks) == dist.get_world_size():
            return team_of_group(dist.group.WORLD)
        return team_of_group(dist.new_group(list(ranks), use_local_synchronization=True))
    return Team(ranks)


@dataclass(frozen=True)
class Layout:
    """A tensor's region on each rank of a team.

    replicas[r]: which complete copy of the tensor rank r's region belongs to; the regions of one copy tile the tensor.
    """

    team: Team
    shape: tuple[int, ...]
    regions: tuple[Region, ...]
    replicas: tuple[int, ...]

    def source(self, owner: int) -> list[int]:
        """The ranks of the copy that `owner` has a part of."""
        return [r for r, replica in enumerate(self.replicas) if replica == self.replicas[owner]]

    @functools.cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        found = np.array(self.regions, dtype=np.int64).reshape(len(self.regions), len(self.shape), 2)
        return found[..., 0], found[..., 1]

    def shares(self, where: Region) -> np.ndarray:
        """Elements of `where` that lie on each rank, (ranks,), not to be written to: for thousands of ranks at once."""
        if where not in self._shares:
            self._shares[where] = self._found_shares(where)
        return self._shares[where]

    @functools.cached_property
    def _shares(self) -> dict[Region, np.ndarray]:
        return {}

    def _found_shares(self, where: Region) -> np.ndarray:
        start, stop = np.array(where, dtype=np.int64).reshape(len(where), 2).T
        return (np.minimum(self._bounds[1], stop) - np.maximum(self._bounds[0], start)).clip(0).prod(1)

    def fellows(self, owner: int) -> np.ndarray:
        """Which ranks have a part of the copy that `owner` has a part of, (ranks,): `source` as a mask."""
        return self._copies == self._copies[owner]

    @functools.cached_property
    def _copies(self) -> np.ndarray:
        return np.array(self.replicas)


def layout_of(tensor: Tensor, group: dist.ProcessGroup | None) -> Layout:
    """Of a DTensor by its placements; of a plain tensor as one complete copy on every rank of `group`."""
    shape = tuple(tensor.shape)
    if is_dtensor(tensor):
        team = team_of_mesh(tensor.device_mesh)
        return layout_on(team, shape, tensor.device_mesh.mesh.numpy(), tensor.placements)
    team = team_of_group(dist.group.WORLD if group is None else group)
    whole = tuple((0, n) for n in shape)
    return Layout(team, shape, (whole,) * len(team), tuple(range(len(team))))


def layout_on(team: Team, shape: tuple[int, ...], ranks: np.ndarray, placements: Sequence) -> Layout:
    """Of a DTensor with these placements on a mesh whose ranks these are; needs no process group."""
    regions, replicas = {}, {}
    copies: dict[tuple, int] = {}
    for coordinate in itertools.product(*map(range, ranks.shape)):
        rank = int(ranks[coordinate])
        regions[rank] = region_at(shape, ranks.shape, coordinate, placements)
        kept = tuple(c for c, placement in zip(coordinate, placements) if placement.is_replicate())
        replicas[rank] = copies.setdefault(kept, len(copies))
    return Layout(team, shape, tuple(regions[r] for r in team.ranks), tuple(replicas[r] for r in team.ranks))


def region_at(shape, mesh_shape, coordinate, placements) -> Region:
    """The region of a tensor at a mesh coordinate: mesh dimensions cut it one after the other, as DTensor does.

    `Shard` takes the coordinate's chunk (torch.chunk) of what is left of a dimension.  `_StridedShard`, which FSDP2
    puts in front of a tensor-parallel shard of the same dimension, first cuts into split_factor chunks and takes the
    coordinate's chunk of each.
    """
    held: list[range | np.ndarray] = [range(n) for n in shape]
    for parts, c, placement in zip(mesh_shape, coordinate, placements):
        if placement.is_replicate():
            continue
        dim = placement.dim % len(shape)
        factor = getattr(placement, "split_factor", 1)
        pieces = [_chunk(piece, parts, c) for piece in _chunks(held[dim], factor)]
        held[dim] = pieces[0] if factor == 1 else np.concatenate(pieces)
    for index in held:
        if len(index) and index[-1] - index[0] != len(index) - 1:
            raise NotImplementedError(
                f"a tensor of shape {tuple(shape)} with placements {placements} on a mesh {tuple(mesh_shape)} leaves a "
                "rank with a shard of several pieces; expected one contiguous range per dimension"
            )
    return tuple((int(index[0]), int(index[-1]) + 1) if len(index) else (0, 0) for index in held)


def _chunks(index: range | np.ndarray, parts: int) -> list:
    return [_chunk(index, parts, c) for c in range(parts)]


def _chunk(index: range | np.ndarray, parts: int, c: int):
    width = -(-len(index) // parts)
    return index[c * width : (c + 1) * width]


def merged(layout: Layout, shape: tuple[int, ...]) -> Layout:
    """The layout of the tensor seen with another shape, whose dimensions each merge neighbours of the old ones.

    NotImplementedError when a region is no box in the new shape: a cut dimension may only be the first of those that
    it is merged with (the others before it being 1).
    """
    if shape == layout.shape:
        return layout
    runs, dim = [], 0
    for length in shape:
        run, product = [], 1
        while dim < len(layout.shape) and (product < length or not run):
            run.append(dim)
            product *= layout.shape[dim]
            dim += 1
        runs.append(run)
    runs[-1] += list(range(dim, len(layout.shape)))  # trailing dimensions of 1
    regions = tuple(tuple(_merged_range(layout, region, run) for run in runs) for region in layout.regions)
    return Layout(layout.team, shape, regions, layout.replicas)


def _merged_range(layout: Layout, region: Region, run: list[int]) -> tuple[int, int]:
    if size(region) == 0:
        return (0, 0)
    sizes = [layout.shape[d] for d in run]
    first = next((i for i, n in enumerate(sizes) if n > 1), len(run) - 1)
    if any(region[d] != (0, layout.shape[d]) for d in run[first + 1 :]):
        raise NotImplementedError(
            f"a parameter of shape {layout.shape} is cut along a dimension that is merged with an earlier one; "
            "cut the first of them, or set merge_dims=False"
        )
    start, stop = region[run[first]]
    inner = math.prod(sizes[first + 1 :])
    return start * inner, stop * inner
