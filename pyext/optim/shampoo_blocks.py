"""How Shampoo cuts parameters into blocks, stacks blocks of one shape, and spreads the refreshing of their roots.

Everything that is kept per block lies in stacks, one per bucket of blocks of one shape: a step is a few batched
operations whatever the number of parameters.  What `optimizer.state[p]` holds are views of its blocks' slices.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

FULL, DIAGONAL, NONE = "full", "diagonal", "none"


def merged_shape(shape, block_size: int, merge: bool = True) -> tuple[int, ...]:
    """The shape without dimensions of 1, neighbours merged from the last on while their product is <= block_size.

    3 x 3 convolution kernels (out, in, 3, 3) become (out, in, 9), or (out, 9 in) where 9 in <= block_size.  Matrices
    are left alone: their two sides mean something.
    """
    kept = [size for size in shape if size != 1]
    if len(kept) <= 2 or not merge:
        return tuple(kept) or (1,)
    merged = [kept[-1]]
    for size in reversed(kept[:-1]):
        if merged[0] * size <= block_size:
            merged[0] *= size
        else:
            merged.insert(0, size)
    return tuple(merged)


def block_slices(shape, block_size: int, large_dim: int) -> list[tuple[slice, ...]]:
    """Index of each block, the last dimension running fastest; a dimension above large_dim is not cut."""
    cuts = []
    for size in shape:
        width = block_size if size <= large_dim else size
        cuts.append([slice(start, min(start + width, size)) for start in range(0, size, width)])
    return list(itertools.product(*cuts))


def side_kinds(shape, large_dim: int, fallback: str) -> tuple[str, ...]:
    """What preconditions each dimension of a parameter: a full matrix per block; above large_dim the fallback."""
    return tuple(FULL if size <= large_dim else fallback for size in shape)


@dataclass
class Block:
    """One block: parameter, index into its merged view, place in the stack, and when its roots are refreshed."""

    param: Tensor
    merged: tuple[int, ...]
    where: tuple[slice, ...]
    number: int  # among the blocks of its parameter
    slot: int = 0  # refreshed in steps t with (t - 1) % frequency == slot

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.where)


@dataclass
class Bucket:
    """Blocks of one shape, of one group and dtype, and their stacks.

    stacks: name -> tensor (blocks, ...): "statistic.i" and "root.i" per dimension i, "refreshed" (the step of the last
    good root, 0 for none), "exp_avg", "graft_sq", "momentum_buffer" as the group's options need them.  packed: a
    statistic of n rows is kept as the n (n + 1) / 2 numbers of its lower triangle, row by row.
    """

    blocks: list[Block]
    kinds: tuple[str, ...]
    stacks: dict[str, Tensor] = field(default_factory=dict)
    packed: bool = False
    targets: Any = None  # kernels.blocks.Targets, where kernels write the parameters
    in_place: ClassVar[bool] = True  # the parameters themselves are moved here

    @property
    def shape(self) -> tuple[int, ...]:
        return self.blocks[0].shape

    @property
    def sides(self) -> list[int]:
        return [i for i, kind in enumerate(self.kinds) if kind != NONE]

    @property
    def cost(self) -> int:
        """Of refreshing one block, up to a factor."""
        return sum(n**3 if kind == FULL else n for n, kind in zip(self.shape, self.kinds) if kind != NONE)

    def allocate(self, names: tuple[str, ...], dtype: torch.dtype, packed: bool = False) -> None:
        device, count = self.blocks[0].param.device, len(self.blocks)
        self.packed = packed
        for name, shape in self.state_shapes(names).items():
            kept = torch.float32 if name == "refreshed" else dtype
            self.stacks[name] = torch.zeros((count, *shape), dtype=kept, device=device)
            if name.startswith("root."):
                (self.stacks[name].diagonal(0, 1, 2) if len(shape) == 2 else self.stacks[name]).fill_(1)

    def state_shapes(self, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
        """What is kept for one block; names: of the stacks of its own shape."""
        found: dict[str, tuple[int, ...]] = {"refreshed": ()}
        for i in self.sides:
            n = self.shape[i]
            found[f"statistic.{i}"] = found[f"root.{i}"] = (n, n) if self.kinds[i] == FULL else (n,)
            if self.packed and self.kinds[i] == FULL:
                found[f"statistic.{i}"] = (n * (n + 1) // 2,)
        return found | dict.fromkeys(names, self.shape)

    def stored(self, i: int, matrices: Tensor) -> Tensor:
        """Matrices of side i (blocks, n, n), or diagonals, in the form in which statistics are kept."""
        if not self.packed or self.kinds[i] != FULL:
            return matrices
        rows, columns = _triangle(self.shape[i], matrices.device)
        return matrices[:, rows, columns]

    def statistic(self, i: int, index) -> Tensor:
        """The statistics of side i of the blocks `index`, (blocks, n, n) or diagonals (blocks, n)."""
        kept = self.stacks[f"statistic.{i}"][index]
        if not self.packed or self.kinds[i] != FULL:
            return kept
        return unpacked(kept, self.shape[i])

    def gather(self) -> Tensor:
        """The gradients' blocks, stacked, in the dtype of the stacks; zeros for parameters without a gradient."""
        dtype = torch.promote_types(self.blocks[0].param.dtype, torch.float32)
        zero = None
        parts = []
        for block in self.blocks:
            if block.param.grad is None:
                zero = block.param.new_zeros(self.shape) if zero is None else zero
                parts.append(zero)
            else:
                parts.append(block.param.grad.reshape(block.merged)[block.where])
        return torch.stack(parts).to(dtype)

    def views(self) -> list[Tensor]:
        """The blocks in the memory of their parameters, which are contiguous."""
        return [block.param.detach().view(block.merged)[block.where] for block in self.blocks]

    def scatter(self, update: Tensor, lr: float, chosen: list[bool]) -> None:
        """W <- W - lr update, for the chosen blocks."""
        targets, changes = [], []
        for block, change, yes in zip(self.blocks, update.unbind(), chosen):
            target = block.param.detach()
            if not yes:
                continue
            if target.is_contiguous():
                targets.append(target.view(block.merged)[block.where])
                changes.append(change.to(target.dtype))
            else:  # channels last and the like: merging dimensions copies, so the copy is written back
                copy = target.reshape(block.merged).clone(memory_format=torch.contiguous_format)
                copy[block.where].sub_(change.to(copy.dtype), alpha=lr)
                target.copy_(copy.reshape(target.shape))
        if targets:
            torch._foreach_sub_(targets, changes, alpha=lr)

    def due(self, counts: list[int], frequency: int, first_all: bool) -> list[int]:
        """Places of the blocks whose roots are refreshed in the steps `counts`, one per block and counted from 1."""
        return [
            i
            for i, (block, step) in enumerate(zip(self.blocks, counts))
            if (step - 1) % frequency == block.slot or (first_all and step == 1)
        ]


@lru_cache(maxsize=64)
def _triangle(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of the lower triangle, row by row."""
    rows, columns = torch.tril_indices(n, n, device=device).unbind()
    return rows, columns


def unpacked(kept: Tensor, n: int) -> Tensor:
    """Symmetric matrices (blocks, n, n) from their lower triangles (blocks, n (n + 1) / 2)."""
    rows, columns = _triangle(n, kept.device)
    whole = kept.new_empty(len(kept), n, n)
    whole[:, rows, columns] = whole[:, columns, rows] = kept
    return whole


def make_buckets(params: list[Tensor], group: dict) -> list[Bucket]:
    """All blocks of these parameters by shape and dtype, with refresh slots of equal work."""
    found: dict[tuple, Bucket] = {}
    for p in params:
        merged = merged_shape(p.shape, group["block_size"], group["merge_dims"])
        kinds = side_kinds(merged, group["large_dim"], group["large_dim_fallback"])
        for number, where in enumerate(block_slices(merged, group["block_size"], group["large_dim"])):
            block = Block(p, merged, where, number)
            key = (block.shape, kinds, p.dtype, p.device)
            found.setdefault(key, Bucket([], kinds)).blocks.append(block)
    buckets = list(found.values())
    spread(buckets, group["precondition_frequency"])
    return buckets


def spread(buckets: list[Bucket], frequency: int) -> None:
    """Assigns each block to the slot with the least work so far, costly blocks first."""
    load = [0] * frequency
    for bucket in sorted(buckets, key=lambda bucket: -bucket.cost):
        for block in bucket.blocks:
            block.slot = load.index(min(load))
            load[block.slot] += bucket.cost


def order_of(kinds: tuple[str, ...]) -> int:
    """Number of preconditioned dimensions."""
    return sum(kind != NONE for kind in kinds)
