"""Prepares rows of tensors for kernels that see flat memory: one dense layout per row, one dtype per role and call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """True when the elements fill one block of memory without gaps or overlap, in any order of dimensions."""
    if not tensor.numel():
        return True
    expected = 1
    for stride, size in sorted((st, sz) for sz, st in zip(tensor.shape, tensor.stride()) if sz != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """True when element k of the flat memory of `a` and of `b` has the same index (shapes being equal)."""
    return not a.numel() or all(size == 1 or x == y for size, x, y in zip(a.shape, a.stride(), b.stride()))


def follows(tensor: Tensor, param: Tensor) -> bool:
    """True when a tensor lies in memory in the order in which kernels walk the parameter."""
    model = param if is_dense(param) else torch.empty(param.shape, device="meta")
    return is_dense(tensor) and same_layout(tensor, model)


class Rows:
    """Rows in one dense layout each.  Tensors in another layout are copied in, and out again by `write_back`.

    `flat` roles (the exponents of 8-bit states) have a layout of their own and are taken as they are.
    """

    def __init__(self, roles: Sequence[Sequence[Tensor]], written: Sequence[bool], flat: Sequence[bool]):
        self.roles: list[list[Tensor]] = [[] for _ in roles]
        self._copied: list[tuple[Tensor, Tensor]] = []
        for row in zip(*roles):
            model = row[0] if is_dense(row[0]) else torch.empty_like(row[0], memory_format=torch.contiguous_format)
            for role, (tensor, is_written, is_flat) in enumerate(zip(row, written, flat)):
                plain = tensor.detach()
                if not (is_flat or (is_dense(plain) and same_layout(plain, model))):
                    plain = torch.empty_strided(model.shape, model.stride(), dtype=plain.dtype, device=plain.device)
                    plain.copy_(tensor.detach())
                    if is_written:
                        self._copied.append((tensor.detach(), plain))
                self.roles[role].append(plain)

    def write_back(self) -> None:
        for tensor, plain in self._copied:
            tensor.copy_(plain)


def by_device_and_dtype(roles: Sequence[Sequence[Tensor]]) -> Iterator[list[int]]:
    """Row numbers grouped so that each group has one device and, per role, one dtype."""
    groups: dict[tuple, list[int]] = {}
    for i, row in enumerate(zip(*roles)):
        groups.setdefault((row[0].device, *(tensor.dtype for tensor in row)), []).append(i)
    yield from groups.values()
