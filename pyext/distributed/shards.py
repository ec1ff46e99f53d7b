"""DTensor as this library sees it: a shard on this rank, a device mesh, and the mesh dimensions it is spread over.

Elementwise steps need no more than the shards: rows.cpp reads a DTensor's shard in place, provided that all tensors of
a row are laid out alike.  What it turns down comes to `local_lists`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


def dtensor_type() -> type | None:
    """DTensor; None while nothing has imported it, for then there is no DTensor either."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def is_dtensor(tensor) -> bool:
    kind = dtensor_type()
    return kind is not None and isinstance(tensor, kind)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, in the same memory; any other tensor itself.  Waits for a pending collective."""
    if not is_dtensor(tensor):
        return tensor
    shard = tensor.detach().to_local()
    return shard.wait() if hasattr(shard, "wait") else shard


@dataclass(frozen=True)
class Reach:
    """A device mesh and those of its dimensions over which a tensor is cut: together its ranks hold it exactly once."""

    mesh: dist.device_mesh.DeviceMesh
    dims: tuple[int, ...]

    def groups(self) -> list[dist.ProcessGroup]:
        return [self.mesh.get_group(dim) for dim in self.dims]


def reach_of(tensor: Tensor) -> Reach | None:
    """None for a tensor that this rank holds whole: a plain one, or a replicated DTensor."""
    if not is_dtensor(tensor):
        return None
    dims = tuple(i for i, placement in enumerate(tensor.placements) if not placement.is_replicate())
    return Reach(tensor.device_mesh, dims) if dims else None


def cuts_of(tensor: Tensor) -> tuple[int, ...]:
    """Sizes of the mesh dimensions over which the tensor is cut; none for one that this rank holds whole."""
    reach = reach_of(tensor)
    return () if reach is None else tuple(reach.mesh.size(dim) for dim in reach.dims)


def reaches_of(tensors: Iterable[Tensor]) -> list[Reach]:
    """The distinct reaches in order of appearance, the same on every rank that lists the same tensors."""
    if dtensor_type() is None:
        return []
    return list(dict.fromkeys(reach for reach in map(reach_of, tensors) if reach is not None))


class _NoTorchFunction:
    """Reading .grad of a DTensor asks each time whether it overrides that, which it does not: 80 ns a tensor."""

    def __enter__(self):
        self._guard = torch._C.DisableTorchFunctionSubclass()
        self._guard.__enter__()

    def __exit__(self, *exception):
        self._guard.__exit__(*exception)


def reading(params: Sequence[Tensor]):
    """The context in which an optimizer reads its parameters and gradients."""
    if dtensor_type() is None or not any(map(is_dtensor, params)):
        return contextlib.nullcontext()
    return _NoTorchFunction()


def check_8bit(op: str, params: Sequence[Tensor]) -> None:
    """States whose blocks share an exponent are kept per shard and could not be resharded."""
    if any(map(is_dtensor, params)):
        raise NotImplementedError(f"{op}: 8-bit states of DTensor parameters are not supported; expected float states")


def first_element(p: Tensor) -> int:
    """The number in memory order of a shard's first element within the whole tensor; 0 for plain tensors.

    Where a shard is no contiguous part of the whole, elements before it count that are in shards of earlier ranks: no
    two shards share a number, but they are not those of a single process.
    """
    if not is_dtensor(p):
        return 0
    from steepest.distributed.layout import layout_of, size

    layout = layout_of(p, None)
    regions, me = layout.regions, layout.team.me
    mine = regions[me]
    cut = [d for d, (range_, n) in enumerate(zip(mine, p.shape)) if range_ != (0, n)]
    if not cut or (cut == [0] and size(mine)):
        return mine[0][0] * size(tuple((0, n) for n in p.shape[1:])) if cut else 0
    return sum(size(regions[r]) for r in layout.source(me) if r < me)


def check_parameters(where: str, params: Iterable[Tensor]) -> None:
    for i, p in enumerate(params):
        check_placements(f"{where}: params[{i}]", p)


def check_placements(where: str, p: Tensor) -> None:
    """A parameter, or a tensor that is measured, is a value and not a sum that is still to be made."""
    if is_dtensor(p) and any(placement.is_partial() for placement in p.placements):
        raise ValueError(
            f"{where} is a DTensor with placements {p.placements}; expected Shard or Replicate (redistribute it first)"
        )


def local_lists(op: str, names: Sequence[str], roles: list[list[Tensor]]) -> list[list[Tensor]]:
    """The shards of all rows, after checking that each row is laid out like its parameter; plain tensors as they are.

    Gradients that are laid out otherwise, partial sums above all, are brought into their parameter's layout, which is
    a collective operation per gradient; the gradients themselves are not changed.  States are not moved: ValueError.
    """
    if dtensor_type() is None or not any(is_dtensor(tensor) for role in roles for tensor in role):
        return roles
    shards: list[list[Tensor]] = [[] for _ in roles]
    for i, row in enumerate(zip(*roles)):
        check_placements(f"{op}: {names[0]}[{i}]", row[0])
        for name, tensor, out in zip(names, row, shards):
            out.append(local(_laid_out_like(f"{op}: {name}[{i}]", tensor, row[0], name == "grads")))
    return shards


def _laid_out_like(where: str, tensor: Tensor, p: Tensor, movable: bool) -> Tensor:
    if is_dtensor(tensor) != is_dtensor(p):
        found, expected = type(tensor).__name__, type(p).__name__
        raise TypeError(f"{where} is a {found}, its parameter a {expected}; expected both DTensor or neither")
    if not is_dtensor(p):
        return tensor
    if tensor.device_mesh != p.device_mesh:
        raise ValueError(f"{where} is on {tensor.device_mesh}, its parameter on {p.device_mesh}")
    if tensor.shape != p.shape:
        raise ValueError(f"{where} has shape {tuple(tensor.shape)}, its parameter {tuple(p.shape)}")
    if tensor.placements == p.placements:
        return tensor
    if not movable:
        raise ValueError(f"{where} has placements {tensor.placements}, expected its parameter's, {p.placements}")
    return tensor.redistribute(placements=p.placements)


def gradient_shard(op: str, p: Tensor) -> Tensor:
    """This rank's shard of a parameter's gradient, laid out like the parameter; zeros where this rank has none."""
    shard = local(p.detach())
    return (
        shard.new_zeros(shard.shape) if p.grad is None else local(_laid_out_like(f"{op}: a gradient", p.grad, p, True))
    )
