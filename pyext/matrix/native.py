"""The matrix verbs by the C library's CPU kernels (csrc/matrix): float32 and float64, products that do half the work.

An algorithm over verbs is run once on handles instead of tensors, which records a program; the program is then executed
for every matrix of a batch by one call.  A thread takes a small matrix through the whole chain while it stays in cache;
large ones are shared by all threads.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from steepest._native import lib, num_threads
from steepest.matrix.verbs import TorchVerbs

DTYPES = {torch.float32: lib.MATRIX_FLOAT32, torch.float64: lib.MATRIX_FLOAT64}
LARGE = 1 << 18  # elements from which a result's memory serves as scratch before
# Bytes of scratch that a thread keeps from call to call: a page that is new to the process costs 0.3 us, which was
# 10 of the 155 ms of a polar factor of 1024 x 4096.  Larger matrices have fewer pages for their work.
KEPT_BYTES = 128 << 20
STRIP, GRANULE = 8, 16  # a tile has 8 rows and a multiple of 16 columns


# Symmetric and general products and matmul of torch 2.13 (MKL), GFLOP/s of the elements that are computed, one and two
# threads of a Zen 4 (AVX-512): these kernels win at every size, symmetric ones by their half of the work besides.
#     n                    64          128         256         512         1024        2048
#     symmetric            89  180     98  200     105 206     101 193     92  183     92  184
#     general             101  200    106  210     109 214     104 193     98  193     94  186
#     matmul               -    -      98  159     105 178     104 179     97  164     90  175
# Without AVX2 and FMA they have no measurement to stand on, and torch's products are taken.
def native_wins(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies matrices of this dtype by these kernels unless asked otherwise."""
    return dtype == torch.float32 and lib.matrix_clone() != "default"


def symmetric_work(n: int) -> int:
    """Elements of a symmetric n x n result that are computed: strips of 8 rows up to the diagonal's multiple of 16."""
    whole = -(-n // GRANULE) * GRANULE
    return sum(STRIP * min(-(-(i + STRIP) // GRANULE) * GRANULE, whole) for i in range(0, n, STRIP))


def general_work(rows: int, cols: int) -> int:
    """Elements of a general result that are computed."""
    return -(-rows // STRIP) * STRIP * -(-cols // GRANULE) * GRANULE


@dataclass(frozen=True)
class Handle:
    """A matrix that a recorded program will have: operand `number`, of which it is the transpose if `transposed`."""

    number: int
    rows: int
    cols: int
    dtype: torch.dtype
    transposed: bool = False

    @property
    def mT(self) -> Handle:
        return replace(self, rows=self.cols, cols=self.rows, transposed=not self.transposed)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols


class Recorder:
    """Verbs over handles: each call appends an operation."""

    def __init__(self):
        self.shapes: list[tuple[int, int, torch.dtype]] = []
        self.ops: list[list] = []
        self.flops = 0

    def operand(self, rows: int, cols: int, dtype: torch.dtype) -> Handle:
        self.shapes.append((rows, cols, dtype))
        return Handle(len(self.shapes) - 1, rows, cols, dtype)

    def append(self, kind, flags, d, a, b, c, alpha=1.0, beta=0.0, gamma=0.0) -> Handle:
        numbers = [-1 if x is None else x.number for x in (d, a, b, c)]
        self.ops.append([kind, flags, *numbers, float(alpha), float(beta), float(gamma)])
        return d

    def gram(self, x: Handle) -> Handle:
        d = self.operand(x.rows, x.rows, x.dtype)
        self.flops += 2 * x.cols * symmetric_work(x.rows)
        flag = lib.MATRIX_TRANSPOSE_A if x.transposed else lib.MATRIX_TRANSPOSE_B
        return self.append(lib.MATRIX_SYMMETRIC, flag, d, x, x, None)

    def symmetric_product(self, a: Handle, b: Handle, *, alpha=1.0, beta=0.0, c=None, diagonal=0.0) -> Handle:
        d = self.operand(a.rows, a.rows, a.dtype)
        self.flops += 2 * a.rows * symmetric_work(a.rows)
        # A equals its transpose, whose rows are read along.
        return self.append(lib.MATRIX_SYMMETRIC, lib.MATRIX_TRANSPOSE_A, d, a, b, c, alpha, beta, diagonal)

    def commuting_product(self, a: Handle, b: Handle, *, beta: float = 0.0, c: Handle | None = None) -> Handle:
        d = self.operand(a.rows, a.rows, a.dtype)
        self.flops += 2 * a.rows * general_work(a.rows, a.rows)
        return self.append(lib.MATRIX_PRODUCT, lib.MATRIX_TRANSPOSE_A, d, a, b, c, 1.0, beta)

    def long_product(self, q: Handle, x: Handle, *, alpha: float = 1.0, shift: float = 0.0) -> Handle:
        y = x.mT if x.transposed else x
        d = self.operand(y.rows, y.cols, y.dtype)
        self.flops += 2 * q.rows * general_work(y.rows, y.cols)
        c = y if shift else None
        if x.transposed:  # (Xᵀ Q)ᵀ
            return self.append(lib.MATRIX_PRODUCT, 0, d, y, q, c, alpha, shift).mT
        return self.append(lib.MATRIX_PRODUCT, lib.MATRIX_TRANSPOSE_A, d, q, y, c, alpha, shift)

    def combination(self, a: Handle, *, alpha=1.0, beta=0.0, c=None, diagonal=0.0, dtype=None) -> Handle:
        if dtype in (None, a.dtype):
            if (alpha, beta, diagonal) == (1.0, 0.0, 0.0):
                return a
        elif c is not None:
            wide = self.combination(a, dtype=dtype)
            return self.combination(wide, alpha=alpha, beta=beta, c=c, diagonal=diagonal)
        d = self.operand(a.rows, a.cols, dtype or a.dtype)
        return self.append(lib.MATRIX_COMBINE, 0, d, a, None, c, alpha, beta, diagonal)

    def normalised(self, x: Handle, factor: float) -> Handle:
        y = x.mT if x.transposed else x
        d = self.append(lib.MATRIX_NORMALISE, 0, self.operand(y.rows, y.cols, y.dtype), y, None, None, factor)
        return d.mT if x.transposed else d

    def norm(self, a: Handle) -> Handle:
        return self.append(lib.MATRIX_NORM, 0, self.operand(1, 1, torch.float64), a, None, None)

    def divided(self, a: Handle, by: Handle, *, power: float, factor: float) -> Handle:
        y = a.mT if a.transposed else a
        d = self.operand(y.rows, y.cols, y.dtype)
        self.append(lib.MATRIX_DIVIDE, 0, d, y, by, None, 1 / factor, 0.0, power)
        return d.mT if a.transposed else d

    def spectral_bound(self, sizes: Handle, before: Handle, after: Handle) -> Handle:
        return self.append(lib.MATRIX_SPECTRAL_BOUND, 0, self.operand(1, 1, torch.float64), after, before, sizes)

    def symmetrised(self, a: Handle) -> tuple[Handle, Handle]:
        d, sizes = self.operand(a.rows, a.rows, a.dtype), self.operand(1, 2, torch.float64)
        self.append(lib.MATRIX_SYMMETRISE, 0, d, a, None, sizes)
        return d, sizes


class Program:
    """A recorded algorithm: `__call__` runs it on tensors (batch, rows, cols) and returns its results as such."""

    def __init__(self, algorithm, options: tuple, inputs: tuple[tuple[int, int, torch.dtype], ...]):
        recorder = Recorder()
        given = [recorder.operand(*shape) for shape in inputs]
        results = algorithm(recorder, *given, *options)
        results = list(results) if isinstance(results, (tuple, list)) else [results]
        self.flops = recorder.flops
        results = [self._placed(recorder, handle, len(given)) for handle in results]
        self.transposed = [handle.transposed for handle in results]
        arrays = [*(h.number for h in given), *(h.number for h in results)]
        shapes, ops = _assign(recorder, arrays, len(given))
        self.shapes, self.inputs = shapes[: len(arrays)], len(given)
        codes = [(rows, cols, DTYPES[dtype]) for rows, cols, dtype in shapes]
        self.native = lib.MatrixProgram(codes, [tuple(op) for op in ops], len(arrays))

    @staticmethod
    def _placed(recorder: Recorder, handle: Handle, inputs: int) -> Handle:
        """The result itself, where nothing reads it later; otherwise a copy: products read scratch faster."""
        read = any(handle.number in op[3:6] and op[0] != lib.MATRIX_SYMMETRISE for op in recorder.ops)
        if not read and handle.number >= inputs:
            return handle
        stored = handle.mT if handle.transposed else handle
        copy = recorder.operand(stored.rows, stored.cols, stored.dtype)
        recorder.append(lib.MATRIX_COMBINE, 0, copy, stored, None, None)
        return copy.mT if handle.transposed else copy

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        batch = max(len(x) for x in tensors)
        results = [torch.empty(batch, rows, cols, dtype=dtype) for rows, cols, dtype in self.shapes[self.inputs :]]
        arrays = [_array(x) for x in (*tensors, *results)]
        threads = num_threads()
        nbytes = self.native.workspace(arrays, batch, threads)
        workspace = _scratch(nbytes)
        self.executed = self.native.run(arrays, batch, threads, workspace.data_ptr(), nbytes)
        return [x.mT if transposed else x for x, transposed in zip(results, self.transposed)]


_kept = threading.local()


def _scratch(nbytes: int) -> Tensor:
    """Memory for one call, of any content: what this thread had before if that is enough and not for one call alone."""
    kept = getattr(_kept, "memory", None)
    if kept is None or len(kept) < nbytes:
        kept = torch.empty(nbytes, dtype=torch.uint8)
        if nbytes <= KEPT_BYTES:
            _kept.memory = kept
    return kept


def _assign(recorder: Recorder, arrays: list[int], inputs: int) -> tuple[list, list]:
    """(shapes, ops) with the arrays first; a place that is no longer read is used again for a later matrix.

    So is, for large matrices, that of a result until it is written.  (Small ones are read faster from scratch.)
    """
    last = {number: i for i, op in enumerate(recorder.ops) for number in op[2:6]}
    written = {op[2]: i for i, op in reversed(list(enumerate(recorder.ops)))}
    place = {number: i for i, number in enumerate(arrays)}
    shapes = [recorder.shapes[number] for number in arrays]
    lent = {}  # place of a result: when it is written
    for i, number in enumerate(arrays):
        if i >= inputs and shapes[i][0] * shapes[i][1] >= LARGE:
            lent[i] = written[number]
    free: dict[tuple, list[int]] = {}
    ops = []
    for i, op in enumerate(recorder.ops):
        for number in op[2:6]:
            if number >= 0 and number not in place:
                shape, end = recorder.shapes[number], last[number]
                places = [k for k, until in lent.items() if shapes[k] == shape and end < until]
                places = places or free.get(shape, [])
                if not places:
                    shapes.append(shape)
                    places = [len(shapes) - 1]
                place[number] = places[-1]
                lent.pop(place[number], None)
                if place[number] in free.get(shape, ()):
                    free[shape].remove(place[number])
        ops.append([*op[:2], *(place.get(number, -1) for number in op[2:6]), *op[6:]])
        for number in set(op[2:6]) - set(arrays) - {-1}:
            if last[number] == i:
                shape, k = recorder.shapes[number], place[number]
                if k >= len(arrays):
                    free.setdefault(shape, []).append(k)
                else:
                    lent[k] = written[arrays[k]]
    return shapes, ops


def _array(x: Tensor) -> tuple[int, int, int]:
    """(address, elements between rows, elements between matrices)."""
    return x.data_ptr(), x.stride(-2) if x.shape[-2] > 1 else x.shape[-1], x.stride(0) if len(x) > 1 else 0


@lru_cache(maxsize=256)
def program(algorithm, options: tuple, inputs: tuple) -> Program:
    return Program(algorithm, options, inputs)


def _plain(x: Tensor) -> Tensor:
    """x itself if its rows are contiguous and apart, else a copy."""
    rows_apart = x.shape[-2] <= 1 or x.stride(-2) >= x.shape[-1]
    return x if (x.shape[-1] <= 1 or x.stride(-1) == 1) and rows_apart and x.stride(0) >= 0 else x.contiguous()


class NativeVerbs(TorchVerbs):
    """The verbs over CPU tensors, float32 or float64; results are bit for bit symmetric, the same for every number of
    threads, alignment and leading dimension, and for a matrix of a batch the same as alone.

    `run` executes a whole algorithm in one call; each verb by itself is a program of one operation, empty matrices
    apart, which torch takes.
    """

    def run(self, algorithm, tensors: tuple[Tensor, ...], options: tuple = ()):
        """algorithm(verbs, *matrices, *options) for every matrix of the tensors (batch, rows, cols).

        A tensor with a batch of 1 is shared.  `options` must be hashable: the recorded program is kept.
        """
        plain = [_plain(x) for x in tensors]
        shapes = tuple((*x.shape[-2:], x.dtype) for x in plain)
        results = program(algorithm, options, shapes)(*plain)
        return results if len(results) > 1 else results[0]

    def _one(self, algorithm, tensors, options=()):
        """`run` for tensors of any batch shape, with the batch shape of the first."""
        lead = tensors[0].shape[:-2]
        flat = [x.expand(*lead, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in tensors]
        result = self.run(algorithm, flat, options)
        return result.reshape(*lead, *result.shape[-2:])

    def gram(self, x: Tensor) -> Tensor:
        """X Xᵀ; half of 2n²m FLOPs."""
        if not x.numel():
            return super().gram(x)
        if x.mT.is_contiguous() and not x.is_contiguous():
            return self._one(_gram_of_transpose, (x.mT,))
        return self._one(Recorder.gram, (x,))

    def symmetric_product(self, a, b, *, alpha=1.0, beta=0.0, c=None, diagonal=0.0) -> Tensor:
        """alpha·A B + beta·C + diagonal·I; half of 2n³ FLOPs."""
        if c is None and beta != 0:
            raise ValueError(f"symmetric_product: beta is {beta}, but c is None")
        if not a.numel():
            return super().symmetric_product(a, b, alpha=alpha, beta=beta, c=c, diagonal=diagonal)
        tensors = (a, b) if c is None else (a, b, c)
        return self._one(_symmetric_product, tensors, ((alpha, beta, diagonal, c is not None),))

    def commuting_product(self, a, b, *, beta: float = 0.0, c=None) -> Tensor:
        """A B + beta·C, 2n³ FLOPs."""
        if not a.numel():
            return super().commuting_product(a, b, beta=beta, c=c)
        return self._one(_commuting_product, (a, b) if c is None else (a, b, c), ((beta, c is not None),))

    def long_product(self, q, x, *, alpha: float = 1.0, shift: float = 0.0) -> Tensor:
        """alpha·Q X + shift·X, 2n²m FLOPs, in the memory order of x."""
        if not x.numel():
            return super().long_product(q, x, alpha=alpha, shift=shift)
        if x.mT.is_contiguous() and not x.is_contiguous():
            return self._one(_long_product_transposed, (q, x.mT), ((alpha, shift),)).mT
        return self._one(_long_product, (q, x), ((alpha, shift),))


def _gram_of_transpose(verbs, x):
    return verbs.gram(x.mT)


def _symmetric_product(verbs, a, b, *rest):
    *c, (alpha, beta, diagonal, _) = rest
    return verbs.symmetric_product(a, b, alpha=alpha, beta=beta, c=c[0] if c else None, diagonal=diagonal)


def _commuting_product(verbs, a, b, *rest):
    *c, (beta, _) = rest
    return verbs.commuting_product(a, b, beta=beta, c=c[0] if c else None)


def _long_product(verbs, q, x, options):
    return verbs.long_product(q, x, alpha=options[0], shift=options[1])


def _long_product_transposed(verbs, q, x, options):
    return verbs.long_product(q, x.mT, alpha=options[0], shift=options[1]).mT
