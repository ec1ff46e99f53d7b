"""Shampoo's statistics and preconditioning by Triton, for stacks of matrices whose two sides are both full."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from steepest.optim.shampoo_blocks import FULL, Bucket

PRECISION = "tf32x3"


@cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def on_device(g: Tensor) -> bool:
    """Where the kernels can run at all."""
    return g.is_cuda and triton_installed()


def takes(bucket: Bucket, g: Tensor) -> bool:
    both = g.dim() == 3 and all(kind == FULL for kind in bucket.kinds)
    return both and g.dtype == torch.float32 and on_device(g)


def update_statistics(bucket: Bucket, g: Tensor, keep: Tensor, weight: Tensor) -> None:
    """Both statistics of every block in one launch."""
    from steepest.kernels import statistics

    stacks = [bucket.stacks[f"statistic.{i}"] for i in (0, 1)]
    statistics.update_statistics(g.contiguous(), *stacks, keep, weight, input_precision=PRECISION)


def precondition(bucket: Bucket, m: Tensor) -> tuple[Tensor, Tensor]:
    """(direction, its Frobenius norm per block)."""
    from steepest.kernels import statistics

    roots = [bucket.stacks[f"root.{i}"] for i in (0, 1)]
    return statistics.precondition(m.contiguous(), *roots, input_precision=PRECISION)
