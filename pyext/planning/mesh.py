"""Meshes without ranks: how DDP, FSDP2, HSDP and tensor parallel lay out the parameters of an inventory."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from steepest.distributed.layout import Layout, Team, layout_on

# Which side of a matrix tensor parallelism cuts, by the name of its module: column-wise layers their outputs, and so do
# vocabularies; row-wise layers their inputs.  Everything else is whole on every rank of the tensor dimension.
OUTPUTS = ("q_proj", "k_proj", "v_proj", "c_attn", "c_fc", "gate_proj", "up_proj", "wte", "embed_tokens", "lm_head")
INPUTS = ("o_proj", "attn.c_proj", "mlp.c_proj", "down_proj")


@dataclass(frozen=True)
class Mesh:
    """`replicas` copies of the model, each cut over `shards` ranks (FSDP2), each shard's layers over `tensor` ranks.

    replicas alone is DDP, with plain parameters; replicas and shards HSDP.  ValueError for sizes below 1, and for
    replicas of layers that are cut over `tensor` ranks without shards, which no stack builds.
    """

    replicas: int = 1
    shards: int = 1
    tensor: int = 1
    _known: dict = field(default_factory=dict, repr=False, compare=False)  # (shape, placements) -> Layout

    def __post_init__(self):
        if min(self.sizes) < 1:
            raise ValueError(f"Mesh: sizes are {self.sizes}, expected numbers >= 1")
        if self.replicas > 1 and self.tensor > 1 and self.shards == 1:
            raise ValueError(f"Mesh: {self.replicas} replicas with tensor={self.tensor} need shards > 1")

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.replicas, self.shards, self.tensor

    @property
    def ranks(self) -> int:
        return self.replicas * self.shards * self.tensor

    @property
    def plain(self) -> bool:
        """Parameters are plain tensors, whole on every rank."""
        return self.shards == self.tensor == 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the device mesh: dimensions of one rank are left out."""
        return tuple(n for n in self.sizes if n > 1) or (1,)

    def __str__(self) -> str:
        if self.plain:
            return f"DDP {self.replicas}" if self.replicas > 1 else "1"
        parts = [f"HSDP {self.replicas} x {self.shards}" if self.replicas > 1 else f"FSDP2 {self.shards}"]
        return " x ".join((parts if self.shards > 1 else []) + ([f"TP {self.tensor}"] if self.tensor > 1 else []))

    @cached_property
    def team(self) -> Team:
        return Team(tuple(range(self.ranks)))

    def cut(self, name: str, shape: tuple[int, ...]) -> int | None:
        """The dimension that the tensor ranks cut; None where they hold it whole: also one they do not divide."""
        module, _, kind = name.rpartition(".")
        along = 0 if module.endswith(OUTPUTS) else 1 if module.endswith(INPUTS) and kind == "weight" else None
        if self.tensor == 1 or along is None or shape[along] % self.tensor:
            return None
        return along

    def placements(self, name: str, shape: tuple[int, ...]) -> tuple:
        """As FSDP2 over `parallelize_module` leaves them, one per dimension of `shape` (of the mesh)."""
        along = self.cut(name, shape)
        found = [Replicate()] if self.replicas > 1 else []
        if self.shards > 1:
            found.append(_StridedShard(0, split_factor=self.tensor) if along == 0 else Shard(0))
        if self.tensor > 1:
            found.append(Replicate() if along is None else Shard(along))
        return tuple(found) or (Replicate(),)

    def layout(self, name: str, shape: tuple[int, ...]) -> Layout:
        """Each rank's region."""
        placements = () if self.plain else self.placements(name, shape)
        key = shape, placements
        if key not in self._known:
            if self.plain:
                whole = tuple((0, n) for n in shape)
                made = Layout(self.team, shape, (whole,) * self.ranks, tuple(range(self.ranks)))
            else:
                made = layout_on(self.team, shape, np.arange(self.ranks).reshape(self.shape), placements)
            self._known[key] = made
        return self._known[key]

    def cuts(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the mesh dimensions over which the parameter is cut."""
        if self.plain:
            return ()
        return tuple(n for n, p in zip(self.shape, self.placements(name, shape)) if not p.is_replicate())
