"""The bytes of scratch that the C library asks for, to the byte: which program is spread how over threads."""

from __future__ import annotations

import pytest
import torch

from steepest._native import lib

ALIGN = 64
# What a thread packs into: 48 and 384 columns of 1 KiB, and two tiles of 8 x 48 doubles.
BUFFERS = 1024 * (48 + 384) + 2 * 8 * 48 * 8
F32, F64 = lib.MATRIX_FLOAT32, lib.MATRIX_FLOAT64


def whole(x: int, unit: int) -> int:
    return -(-x // unit) * unit


def matrix_bytes(rows: int, cols: int, itemsize: int) -> int:
    """Panels of 48 columns and a multiple of 8 rows, at least one."""
    return whole(max(1, rows), 8) * whole(cols, 48) * itemsize


def recorded(n: int, m: int, dtype) -> tuple[list, list]:
    """X (n x m) normalised into scratch, then its Gram matrix into an array."""
    shapes = [(n, m, dtype), (n, n, dtype), (n, m, dtype)]
    ops = [
        (lib.MATRIX_NORMALISE, 0, 2, 0, -1, -1, 1.0, 0.0, 0.0),
        (lib.MATRIX_SYMMETRIC, lib.MATRIX_TRANSPOSE_B, 1, 2, 2, -1, 1.0, 0.0, 0.0),
    ]
    return shapes, ops


def gram_of_normalised(n: int, m: int, batch: int, allowed: int, dtype=F32) -> int:
    program = lib.MatrixProgram(*recorded(n, m, dtype), 2)
    return program.workspace([(ALIGN, m, n * m), (ALIGN, n, n * n)], batch, allowed)


def expected(n: int, m: int, batch: int, allowed: int, itemsize: int = 4) -> int:
    """A thread for every 5e5 operations, an element of the normalisation counting as 32; whole matrices for a thread
    where a set of scratch is at most 4 MiB and the last round leaves at most an eighth of the batch's number idle, or
    where no operation has 1e6."""
    costs = [32.0 * n * m, float(m) * n * n]
    threads = min(allowed, int(min(max(sum(costs) * batch / 5e5, 1), 1e6)))
    scratch = matrix_bytes(n, m, itemsize)
    idle = -(-batch // threads) * threads - batch
    alone = scratch <= 4 << 20 and batch >= threads and idle <= batch // 8
    if not alone and max(costs) < 1e6:
        alone, threads = True, min(threads, max(batch, 1))
    sums = whole(2 * n * 8, ALIGN)
    shared, each = (0, scratch + sums) if alone else (scratch + sums, 0)
    return ALIGN + whole(3 * 8, ALIGN) + shared + threads * (BUFFERS + each)


@pytest.mark.parametrize("dtype, itemsize", [(F32, 4), (F64, 8)])
@pytest.mark.parametrize("n, m", [(0, 5), (1, 1), (1, 48), (7, 49), (8, 96), (9, 97), (64, 64), (100, 400)])
def test_scratch_of_one_matrix(n, m, dtype, itemsize):
    assert gram_of_normalised(n, m, 1, 1, dtype) == expected(n, m, 1, 1, itemsize)


# (25, 400): 320,000 + 250,000 operations; (20, 80): 51,200 + 32,000; (100, 100): 320,000 + 1,000,000, to the operation
# what is shared; (99, 100) and (250, 16), 128,000 + 1,000,000, beside it.
@pytest.mark.parametrize(
    "n, m", [(25, 400), (20, 80), (100, 100), (99, 100), (250, 16), (249, 16), (300, 500), (64, 64)]
)
@pytest.mark.parametrize("allowed", [1, 2, 3, 8])
def test_threads_for_the_work_there_is(n, m, allowed):
    for batch in (0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 23, 24, 25, 64, 1000):
        assert gram_of_normalised(n, m, batch, allowed) == expected(n, m, batch, allowed), batch


@pytest.mark.parametrize("n, m", [(1024, 1008), (1024, 1056), (1040, 1008), (4096, 240), (4096, 256), (4096, 272)])
def test_a_thread_s_own_scratch_ends_at_4_mib(n, m):
    """(4096, 256) in panels is 4096 x 288: above; 4096 x 240 is below; 1024 x 1008 and 1024 x 1056 on both sides."""
    for batch in (1, 2, 8):
        assert gram_of_normalised(n, m, batch, 2) == expected(n, m, batch, 2)


def test_a_set_just_below_and_just_above_4_mib():
    """In one panel 21,840 and 21,848 rows of 192 bytes; 4 MiB itself is no multiple of a panel's 3 x 64 bytes."""
    for rows in (21_840, 21_848, 1 << 14):
        assert gram_of_normalised(rows, 40, 2, 2) == expected(rows, 40, 2, 2)


@pytest.mark.parametrize("threads", [1, 2])
def test_every_operation_is_executed_once(threads):
    """Products say how many operations they took: 300 x 300 in strips of 8 rows up to the diagonal's 16 columns."""
    n, m = 300, 500
    x, gram = torch.randn(n, m), torch.empty(n, n)
    program = lib.MatrixProgram(*recorded(n, m, F32), 2)
    arrays = [(x.data_ptr(), m, n * m), (gram.data_ptr(), n, n * n)]
    nbytes = program.workspace(arrays, 1, threads)
    memory = torch.empty(nbytes, dtype=torch.uint8)
    elements = sum(8 * whole(min(i + 8, whole(n, 8)), 16) for i in range(0, n, 8))
    assert program.run(arrays, 1, threads, memory.data_ptr(), nbytes) == 2 * m * elements


def product_alone(kind: int, rows: int, cols: int, terms: int, batch: int, allowed: int) -> int:
    shapes = [(rows, terms, F32), (terms, cols, F32), (rows, cols, F32)]
    program = lib.MatrixProgram(shapes, [(kind, 0, 2, 0, 1, -1, 1.0, 0.0, 0.0)], 3)
    strides = [(ALIGN, a, a * b) for b, a, _ in shapes]
    return program.workspace(strides, batch, allowed)


@pytest.mark.parametrize("allowed", [1, 2, 4])
def test_a_product_counts_two_operations_a_term_and_a_symmetric_one_one(allowed):
    """100 x 100 x 50 terms are 1e6 operations, which threads share; symmetric 5e5, which one thread takes."""
    for kind, factor in ((lib.MATRIX_PRODUCT, 2), (lib.MATRIX_SYMMETRIC, 1)):
        for terms in (24, 25, 49, 50, 51, 99, 100, 101, 150, 200):
            cost = factor * terms * 100 * 100
            threads = min(allowed, max(1, int(cost / 5e5)))
            if threads > 1 and cost < 1e6:
                threads = 1
            found = product_alone(kind, 100, 100, terms, 1, allowed)
            assert found == ALIGN + ALIGN + threads * BUFFERS, (kind, terms)
