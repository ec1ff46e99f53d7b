"""Shampoo's statistics, preconditioning and step by Triton, for stacks of matrices whose two sides are both full."""

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


def writes(bucket: Bucket) -> bool:
    """Whether `step` can write the parameters of this bucket, if they are contiguous."""
    p = bucket.blocks[0].param
    matrices = len(bucket.kinds) == 2 and all(kind == FULL for kind in bucket.kinds)
    narrow = p.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return bucket.in_place and matrices and 0 not in bucket.shape and narrow and on_device(p)


def step(bucket: Bucket, m: Tensor, graft: Tensor, group: dict, on: Tensor, given: list[bool]) -> None:
    """W <- W (1 - lr weight_decay) - lr P for the blocks that are given; P counts for those that are `on`.

    m, graft (blocks, n, m) float32: the filtered gradient and the step whose length P gets.  Without grafting and
    momentum P is written in the epilogue of the second product.  Otherwise that leaves P and its norms, and one pass
    over P and W scales, takes up momentum and writes.
    """
    from steepest.kernels import blocks, statistics

    views = bucket.views()
    if bucket.targets is None or not bucket.targets.fits(views):
        bucket.targets = blocks.Targets(views)
    lr, batch = float(group["lr"]), len(m)
    numbers = m.new_ones(batch, blocks.COLUMNS.value)
    numbers[:, blocks.KEEP.value] = 1 - lr * group["weight_decay"]
    if not all(given):
        left_alone = [i for i, yes in enumerate(given) if not yes]
        numbers[left_alone, blocks.KEEP.value] = 1.0
    numbers[:, blocks.STEP.value] = -lr
    numbers[:, blocks.ON.value] = on
    if group["grafting"] == "none" and not group["momentum"]:
        roots = [bucket.stacks[f"root.{i}"] for i in (0, 1)]
        statistics.apply_precondition(m.contiguous(), *roots, bucket.targets, numbers, input_precision=PRECISION)
        return
    direction, norm = precondition(bucket, m)
    if group["grafting"] != "none":
        length = torch.linalg.vector_norm(graft.flatten(1), dim=1)
        numbers[:, blocks.RATIO.value] = length / norm.clamp(min=torch.finfo(m.dtype).tiny)
        numbers[:, blocks.READY.value] = bucket.stacks["refreshed"] > 0
    options = {"momentum": group["momentum"], "nesterov": group["nesterov"]}
    buffer = bucket.stacks["momentum_buffer"] if group["momentum"] else None
    blocks.move(direction, graft.contiguous(), bucket.targets, numbers, buffer=buffer, **options)
