"""Which matrices a parameter holds, as its param group declares, and the per-row scaling of NorMuon.

matrices=          for a parameter of shape
"whole"            (out, in)              one matrix
"flatten"          (out, in, k, ...)      one matrix (out, in·k·...): convolution kernels
"stack"            (..., out, in)         a matrix for every leading index: expert stacks
h                  (h·d, in)              h matrices (d, in): heads
(r, (s, h), ...)   (r + s + ..., in)      a matrix (r, in), then h matrices (s / h, in), ...: fused projections
"""

from __future__ import annotations

import math
from typing import NamedTuple, Union

import torch
from torch import Tensor

Matrices = Union[str, int, tuple]
NAMES = ("whole", "flatten", "stack")


class Piece(NamedTuple):
    """`length` entries of a parameter's first dimension from `start` on are `batch` matrices (rows, columns)."""

    start: int
    length: int
    batch: int
    rows: int
    columns: int


def pieces(shape: tuple[int, ...], matrices: Matrices) -> list[Piece]:
    """The matrices of a parameter. ValueError where the declaration does not fit the shape."""
    shape = tuple(shape)
    if isinstance(matrices, str) and matrices in NAMES:
        if matrices == "whole" and len(shape) != 2:
            raise ValueError(
                f"a parameter of shape {shape} is not a matrix; say matrices='flatten' (convolution kernels) or "
                "'stack' (a stack of matrices), or use algorithm='adamw'"
            )
        if len(shape) < 2:
            raise ValueError(f"a parameter of shape {shape} holds no matrix; use algorithm='adamw'")
        if matrices == "stack":
            return (
                [Piece(0, shape[0], math.prod(shape[:-2]), *shape[-2:])]
                if len(shape) > 2
                else [Piece(0, shape[0], 1, *shape)]
            )
        return [Piece(0, shape[0], 1, shape[0], math.prod(shape[1:]))]
    parts = [(shape[0] if shape else 0, matrices)] if isinstance(matrices, int) else matrices
    if isinstance(matrices, (bool, str)) or not isinstance(parts, (list, tuple)):
        raise ValueError(f"matrices is {matrices!r}, expected one of {NAMES}, a number of heads or sizes of row blocks")
    if len(shape) != 2:
        raise ValueError(f"a parameter of shape {shape} is not a matrix, whose rows matrices={matrices!r} would divide")
    found, start = [], 0
    for part in parts:
        rows, count = part if isinstance(part, (list, tuple)) else (part, 1)
        if count < 1 or rows < 1 or rows % count:
            raise ValueError(f"matrices is {matrices!r}: {rows} rows are not {count} matrices of equal height")
        found.append(Piece(start, rows, count, rows // count, shape[1]))
        start += rows
    if start != shape[0]:
        raise ValueError(f"matrices is {matrices!r}, which is {start} rows; the parameter has shape {shape}")
    return found


def row_shape(shape: tuple[int, ...], matrices: Matrices) -> tuple[int, ...]:
    """Of a tensor with one number per row of every matrix, first dimension first as in the parameter."""
    return (shape[0],) if matrices == "flatten" else tuple(shape[:-1])


def normalised_rows(factors: Tensor, moments: Tensor, beta: float) -> Tensor:
    """NorMuon: rows of the polar factors O (batch, m, n) divided by the root of their running mean square.

    v = beta v + (1 - beta) mean over columns of O²  (moments, (batch, m), in place);  P = O / (sqrt(v) + 1e-8);
    the result is P ‖O‖_F / ‖P‖_F: the step keeps its length.  Li et al., arXiv 2510.05491, where the length is
    0.2 sqrt(m n) instead.  Zero stays zero.
    """
    moments.lerp_(factors.float().square().mean(-1), 1 - beta)
    scaled = factors / (moments.sqrt() + 1e-8).to(factors.dtype).unsqueeze(-1)
    length = torch.linalg.matrix_norm(factors.float(), keepdim=True)
    other = torch.linalg.matrix_norm(scaled.float(), keepdim=True)
    return scaled * (length / other.where(other != 0, 1)).to(factors.dtype)
