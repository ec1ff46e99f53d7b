"""Argument checks for steps over lists of tensors: all of them before any state changes.

The compiled gatherer (rows.cpp) approves the usual lists in nanoseconds; what it does not approve comes here, to be
refused with a message that says what was asked, found and expected, or to be prepared (`layout.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from steepest import layout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def number(op: str, name: str, value, low: float, high: float | None = None) -> float:
    """`value` as a float in [low, high) (or >= low); a 0-dim CPU tensor counts as a number."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.device.type != "cpu":
            raise ValueError(
                f"{op}: {name} is a tensor of shape {tuple(value.shape)} on {value.device}; "
                "expected a number or a one-element CPU tensor"
            )
        value = value.item()
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} is {value!r} of type {type(value).__name__}, expected a number")
    value = float(value)
    if high is None and not low <= value < float("inf"):
        raise ValueError(f"{op}: {name} is {value!r}, expected a finite number >= {low:g}")
    if high is not None and not low <= value < high:
        raise ValueError(f"{op}: {name} is {value!r}, expected a number in [{low:g}, {high:g})")
    return value


def tensor_lists(op: str, names: Sequence[str], roles: Sequence[Sequence[Tensor]]) -> None:
    """Each role a list (or tuple) of tensors, all of the same length."""
    for name, role in zip(names, roles):
        if isinstance(role, Tensor) or not isinstance(role, (list, tuple)):
            raise TypeError(f"{op}: {name} is a {type(role).__name__}, expected a list of tensors")
    for name, role in zip(names[1:], roles[1:]):
        if len(role) != len(roles[0]):
            raise ValueError(f"{op}: {name} has {len(role)} tensors, {names[0]} has {len(roles[0])}")


def rows(
    op: str, names: Sequence[str], roles: Sequence[Sequence[Tensor]], written: Sequence[str], dtypes=lambda name: DTYPES
) -> None:
    """Every row: plain strided tensors of one shape on one device, in supported dtypes, none overlapping itself.

    `dtypes(name)` says what tensors of a list may be.  Exponents of 8-bit states have a shape of their own, and such
    states must lie in memory as their parameter does: their blocks are cut in that order.
    """
    for i in range(len(roles[0])):
        first = None
        for name, role in zip(names, roles):
            tensor = role[i]
            where = f"{op}: {name}[{i}]"
            one(where, tensor, written=name in written, dtypes=dtypes(name))
            if first is None:
                first = tensor
            elif name.endswith("_exponents"):
                blocks = -(-first.numel() // 128)
                if tuple(tensor.shape) != (blocks,) or not tensor.is_contiguous():
                    raise ValueError(
                        f"{where} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, expected ({blocks},): "
                        f"one per 128 elements of {names[0]}[{i}]"
                    )
            elif tensor.shape != first.shape:
                raise ValueError(f"{where} has shape {tuple(tensor.shape)}, {names[0]}[{i}] has {tuple(first.shape)}")
            if tensor.device != first.device:
                raise ValueError(f"{where} is on {tensor.device}, {names[0]}[{i}] is on {first.device}")
            if name == "sources" and tensor.dtype != first.dtype:
                raise TypeError(f"{where} has dtype {tensor.dtype}, {names[0]}[{i}] has {first.dtype}")
            if tensor.dtype == torch.uint8 and not name.endswith("_exponents") and not layout.follows(tensor, first):
                raise ValueError(
                    f"{where} has strides {tensor.stride()}, {names[0]}[{i}] has {first.stride()}: 8-bit states must "
                    "lie in memory as their parameter does, because their blocks were cut in that order"
                )


def one(where: str, tensor, *, written: bool, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """A plain strided tensor in a supported dtype on a supported device; a written one must not overlap itself."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where} is {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.layout != torch.strided:
        raise ValueError(f"{where} is {tensor.layout}; only dense tensors are supported, call .to_dense() first")
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise TypeError(f"{where} is a {type(tensor).__name__}; expected a plain torch.Tensor or Parameter")
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{where} is on {tensor.device}; supported: cpu, cuda")
    if tensor.dtype not in dtypes:
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{where} has dtype {tensor.dtype}; supported: {supported}")
    if written and any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride())):
        raise ValueError(f"{where} is an expanded view (strides {tensor.stride()}): its elements share memory")


def storage(op: str, names: Sequence[str], row: Sequence[Tensor], kept) -> None:
    """What a storage.Storage asks of the dtypes of one row."""
    found = dict(zip(names, (tensor.dtype for tensor in row)))
    param = found["params"]
    if "masters" in kept.lists and param == torch.float32:
        raise TypeError(f"{op}: masters are for 16-bit params, found {param}")
    if "masters" in kept.lists and ("residuals" in kept.lists or "sources" in kept.lists):
        raise ValueError(f"{op}: masters hold the parameters by themselves, expected no residuals or sources with them")
    if "residuals" in kept.lists and param != torch.bfloat16:
        raise TypeError(f"{op}: residuals are for bfloat16 params, found {param}")
    if kept.stochastic and torch.float16 in (found[name] for name in names if name != "grads"):
        raise TypeError(f"{op}: stochastic rounding is to bfloat16, found float16 tensors")


def leaves(op: str, params: Sequence[Tensor]) -> None:
    """No parameter may be the result of a recorded operation: autograd would not see the update."""
    for i, p in enumerate(params):
        if p.grad_fn is not None:
            raise ValueError(
                f"{op}: params[{i}] is not a leaf (it is the result of {p.grad_fn.name()}); "
                "pass the leaf tensor itself, or .detach() it"
            )


def no_overlap(op: str, names: Sequence[str], roles: Sequence[Sequence[Tensor]], written: Sequence[str]) -> None:
    """No two written tensors, nor a written and a read one, share memory (reads may share with reads)."""
    found = []
    for name, role in zip(names, roles):
        for i, tensor in enumerate(role):
            if tensor.numel():
                extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
                begin = tensor.data_ptr()
                found.append((str(tensor.device), begin, begin + (extent + 1) * tensor.element_size(), name, i, tensor))
    found.sort(key=lambda entry: entry[:2])
    open_ = []
    for entry in found:
        # Interleaved views (every second column and the others) have overlapping extents: keep all that still reach.
        open_ = [other for other in open_ if other[0] == entry[0] and other[2] > entry[1]]
        for other in open_:
            if (other[3] in written or entry[3] in written) and _share_memory(other[5], entry[5]):
                raise ValueError(
                    f"{op}: {entry[3]}[{entry[4]}] shares memory with {other[3]}[{other[4]}]; "
                    "each tensor must have memory of its own"
                )
        open_.append(entry)


class _Memory:
    """A tensor's extent in memory as numpy sees it: nothing is read through it."""

    def __init__(self, tensor: Tensor):
        size = tensor.element_size()
        self.__array_interface__ = {
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
            "typestr": f"|V{size}",
            "data": (tensor.data_ptr(), True),
            "version": 3,
        }


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return bool(np.shares_memory(np.asarray(_Memory(a)), np.asarray(_Memory(b))))
