"""Records what an algorithm does with small matrices, and runs it as one launch for a whole batch.

The algorithm is the same code that runs over any other verbs: it is handed a `Matrix`, which stands for a matrix of the
batch and notes what is done with it.  The notes become a chain of steps for `steepest.kernels.chain`, with intermediate
matrices in as few buffers as their lives need.

`steepest.matrix.native.Recorder` does the same for the C library's programs, and the two stay apart: this one's steps
are sums of two addends, with multiples put off until they are needed, of one dtype, and padded; that one's operations
have kinds, transposed operands, two dtypes, norms and several results, and take results' memory for scratch.  What both
have, numbering matrices and using their places again, is ten lines in each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

TILE = 64  # of steepest.kernels.chain
PRODUCT, GRAM_OF_ROWS, GRAM_OF_COLUMNS = 0, 1, 2  # as in steepest.kernels.chain


@dataclass(frozen=True)
class Step:
    """D = alpha A B + beta C + gamma E + diagonal I; matrices by number, -1 for none; linear where k = 0."""

    kind: int
    rows: int
    columns: int
    k: int
    a: int
    b: int
    c: int
    e: int
    d: int
    mirror: bool  # the result is symmetric: the lower triangle is computed and decides
    numbers: tuple[float, float, float, float]


@dataclass
class Tape:
    """The steps so far. Matrix 0 is the input; every step makes a new one."""

    steps: list[Step] = field(default_factory=list)

    def add(
        self, kind, rows, columns, k, a, b, alpha, c=-1, beta=0.0, e=-1, gamma=0.0, diagonal=0.0, mirror=False
    ) -> int:
        d = len(self.steps) + 1
        a, b = max(a, 0), max(b, 0)
        self.steps.append(Step(kind, rows, columns, k, a, b, c, e, d, mirror, (alpha, beta, gamma, diagonal)))
        return d


class Matrix:
    """A matrix of the batch, `rows` × `columns` as the algorithm sees it, stored transposed if `tall`.

    multiple: a factor that is not multiplied yet, so that sums of multiples are one step; None: the matrix itself.
    """

    def __init__(self, tape: Tape, number: int, rows: int, columns: int, tall: bool = False, multiple=None):
        self.tape, self.number, self.rows, self.columns, self.tall = tape, number, rows, columns, tall
        self.multiple: float | None = multiple

    @property
    def scaled(self) -> float:
        return 1.0 if self.multiple is None else self.multiple

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def settled(self) -> Matrix:
        """The same with its factor multiplied."""
        if self.scaled == 1:
            return self
        return self._linear(self.number, self.scaled)

    def _linear(self, c: int, beta: float, e: int = -1, gamma: float = 0.0) -> Matrix:
        stored = (self.columns, self.rows) if self.tall else (self.rows, self.columns)
        number = self.tape.add(PRODUCT, *stored, 0, -1, -1, 0.0, c, beta, e, gamma)
        return Matrix(self.tape, number, self.rows, self.columns, self.tall)

    def __mul__(self, factor: float) -> Matrix:
        return Matrix(self.tape, self.number, self.rows, self.columns, self.tall, self.scaled * factor)

    def clone(self) -> Matrix:
        return self._linear(self.number, self.scaled)

    dtype = None  # whatever the input has

    def to(self, dtype: torch.dtype | None) -> Matrix:
        return self

    def diagonal(self, dim1: int, dim2: int) -> _Diagonal:
        if self.multiple is not None:  # also a multiple by 1 is a matrix of its own
            self.number, self.multiple = self.clone().number, None
        return _Diagonal(self)

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function is not torch.add:
            raise NotImplementedError(f"tape: {function} is not recorded")
        x, y = arguments
        return x._linear(x.number, x.scaled, y.number, y.scaled * (options or {}).get("alpha", 1.0))


class _Diagonal:
    """The diagonal of a matrix that the last step made: adding to it changes that step."""

    def __init__(self, matrix: Matrix):
        self.matrix = matrix

    def add_(self, value: float) -> None:
        steps = self.matrix.tape.steps
        if self.matrix.number != len(steps):
            raise NotImplementedError("tape: only the diagonal of the newest matrix can be added to")
        *numbers, diagonal = steps[-1].numbers
        steps[-1] = replace(steps[-1], numbers=(*numbers, diagonal + value))


class TapeVerbs:
    """The verbs over `Matrix`, see steepest.matrix.verbs: nothing is computed, everything is noted.

    Symmetric products are mirrored, which keeps M symmetric: without that, roots in split precisions failed at a
    relative ridge of 1e-6, and polar factors in float16 were three times as far off.
    """

    def gram(self, x: Matrix) -> Matrix:
        x, n = x.settled(), x.rows
        kind = GRAM_OF_COLUMNS if x.tall else GRAM_OF_ROWS
        number = x.tape.add(kind, n, n, x.columns, x.number, x.number, 1.0, mirror=True)
        return Matrix(x.tape, number, n, n)

    def symmetric_product(self, a, b, *, alpha=1.0, beta=0.0, c=None, diagonal=0.0) -> Matrix:
        return self._product(a, b, alpha, beta, c, diagonal, True)

    def commuting_product(self, a, b, *, beta=0.0, c=None) -> Matrix:
        return self._product(a, b, 1.0, beta, c, 0.0, False)

    def _product(self, a, b, alpha, beta, c, diagonal, mirror: bool) -> Matrix:
        addend, beta = (-1, 0.0) if c is None or beta == 0 else (c.number, beta * c.scaled)
        alpha, n = alpha * a.scaled * b.scaled, a.rows
        number = a.tape.add(PRODUCT, n, n, n, a.number, b.number, alpha, addend, beta, diagonal=diagonal, mirror=mirror)
        return Matrix(a.tape, number, n, n)

    def combination(self, a, *, alpha=1.0, beta=0.0, c=None, diagonal=0.0, dtype=None) -> Matrix:
        c, beta = (-1, 0.0) if c is None or beta == 0 else (c.number, beta * c.scaled)
        new = a._linear(a.number, alpha * a.scaled, c, beta)
        if diagonal:
            new.diagonal(dim1=-2, dim2=-1).add_(diagonal)
        return new

    def long_product(self, q, x, *, alpha=1.0, shift=0.0) -> Matrix:
        alpha, shift, n, m = alpha * q.scaled * x.scaled, shift * x.scaled, x.rows, x.columns
        addend = x.number if shift else -1
        if x.tall:  # (Q X)ᵀ = Xᵀ Q
            number = x.tape.add(PRODUCT, m, n, n, x.number, q.number, alpha, addend, shift)
        else:
            number = x.tape.add(PRODUCT, n, m, n, q.number, x.number, alpha, addend, shift)
        return Matrix(x.tape, number, n, m, x.tall)


def record(
    algorithm: Callable[[Matrix, TapeVerbs], Matrix], rows: int, columns: int, tall: bool = False
) -> tuple[Tape, int]:
    """The tape of an algorithm on a rows × columns matrix, or on its transpose if it is tall; the number of its result.

    Extents are those of the padded matrix; which side is the short one is a question for the matrix without padding.
    """
    tape = Tape()
    given = Matrix(tape, 0, *((columns, rows) if tall else (rows, columns)), tall)
    return tape, algorithm(given, TapeVerbs()).settled().number


@dataclass(frozen=True, eq=False)
class Chain:
    """steps, numbers: the tables of steepest.kernels.chain; shapes: of the buffers. 0 is the input, 1 the result."""

    steps: np.ndarray
    numbers: np.ndarray
    shapes: tuple[tuple[int, int], ...]


def allocate(tape: Tape, result: int, rows: int, columns: int) -> Chain:
    """Buffers for the matrices of a tape: one is used again when nobody reads the matrix in it any more."""
    last = {0: len(tape.steps) + 1, result: len(tape.steps) + 1}  # the input is not ours to overwrite
    for i, s in enumerate(tape.steps, 1):
        for number in (s.a, s.b) * (s.k > 0) + (s.c, s.e):
            last[number] = max(last.get(number, 0), i)
    place, shapes, free, table = {0: 0, -1: -1}, [(rows, columns)], {}, []
    shapes.append((tape.steps[result - 1].rows, tape.steps[result - 1].columns))
    for i, s in enumerate(tape.steps, 1):
        shape = (s.rows, s.columns)
        if s.d == result:
            place[s.d] = 1
        elif free.get(shape):
            place[s.d] = free[shape].pop()
        else:
            place[s.d] = len(shapes)
            shapes.append(shape)
        table.append((s.kind, s.rows, s.columns, s.k, *(place[x] for x in (s.a, s.b, s.c, s.e, s.d)), s.mirror))
        for number in [x for x, end in last.items() if end == i and x > 0]:
            free.setdefault(shapes[place[number]], []).append(place[number])
    numbers = np.array([s.numbers for s in tape.steps], dtype=np.float64).reshape(-1, 4)
    return Chain(np.array(table, dtype=np.int64).reshape(-1, 10), numbers, tuple(shapes))


def run(chain: Chain, x: Tensor, input_precision: str = "ieee") -> Tensor:
    """The result of a chain for every matrix of x (batch, rows, columns), which `padded` has made fit."""
    from steepest.kernels.chain import run_chain

    tables, size = _tables(chain, len(x), x.dtype, x.device)
    y, scratch = x.new_empty(len(x), *chain.shapes[1]), x.new_empty(size)
    run_chain(tables, x, y, scratch, input_precision)
    return y


@lru_cache(maxsize=256)
def _tables(chain: Chain, batch: int, dtype: torch.dtype, device: torch.device):
    from steepest.kernels.chain import device_tables

    return device_tables(chain.steps, chain.numbers, chain.shapes, batch, dtype, device)


def symmetric_fraction(n: int) -> float:
    """The part of a product's FLOPs that a chain spends on a symmetric n × n result: tiles of the triangle."""
    side = max(-(-n // TILE), 1)
    return (side + 1) / (2 * side)


def padded(x: Tensor) -> Tensor:
    """x (batch, rows, columns), or a copy with extents that are multiples of 16 bytes and rows that start at them."""
    unit = 16 // x.element_size()
    rows, columns = (-(-size // unit) * unit for size in x.shape[1:])
    strides = x.stride()
    fits = (rows, columns) == tuple(x.shape[1:]) and strides[2] == 1 and x.data_ptr() % 16 == 0
    if fits and strides[0] % unit == strides[1] % unit == 0:
        return x
    wide = x.new_zeros(len(x), rows, columns)
    wide[:, : x.shape[1], : x.shape[2]] = x
    return wide
