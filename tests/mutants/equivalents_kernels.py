"""Mutants of Triton sources that nobody can notice where kernels are interpreted (see mutation_equivalents.py)."""

from __future__ import annotations

import re

# What the compiler may assume or chooses by, and the interpreter does not read.
PROMISE = "a promise to the compiler, which the interpreter does not read; tests/aot looks at vector widths"
PRECISION = "the interpreter multiplies in one precision; tests/aot looks at the instructions"
TILING = "which tile computes an element: speed, not its value"
EITHER_HALF = "both halves of a symmetric result are within its bound; which one is kept is nobody's promise"
NOT_STORED = "what stands for an element beyond the edge is not stored"
BELOW = "a tile below the diagonal has all its columns inside the matrix"
PLACE_0 = "this column is number 0"
ANOTHER_STREAM = "another stream of random numbers, as good as this one"

SUBSCRIPT = re.compile(r"\[-?\d+\]")
PATTERNS: dict[str, tuple[tuple[str, re.Pattern], ...]] = {
    file: (
        (PROMISE, re.compile(r"^[\w, ]+ = tl\.multiple_of\(|^if (UNIT > 1|ALIGNED):$")),
        (PRECISION, re.compile(r'^"PRECISION": ')),
        (TILING, re.compile(r'^kind = .* else "half"$|^(tilings?|full) = ')),
    )
    for file in (f"kernels/{name}.py" for name in ("blocks", "chain", "grouped", "long", "momentum", "statistics"))
}

EQUIVALENT: dict[str, dict[str, tuple[str, ...]]] = {
    "kernels/tiles.py": {
        EITHER_HALF: ("out = tl.where(rows[:, None] > columns[None, :], out, tl.trans(out))",),
        BELOW: ("mirrored = (columns <= n)[:, None] & (rows < n)[None, :]",),
        "the first of the triangle, either way": ("if rest <= first * height:",),
        "too large a row is put right": ("row = ((tl.sqrt_rn(8.0 * t.to(tl.float32) + 1.0)) * 0.5).to(tl.int64)",),
    },
    "kernels/chain.py": {
        PROMISE: ("return tl.multiple_of(base, 17), tl.where(number == 0, x_row, tl.load(row + 2)) * UNIT",),
        PLACE_0: (
            "kind, c_number, e_number = tl.load(row - KIND), tl.load(row + C), tl.load(row + E)",
            "kind, c_number, e_number = tl.load(row), tl.load(row + C), tl.load(row + E)",
        ),
        "the first two scratch buffers begin at 0, as what is no scratch does": (
            "buffers[i] = offset if i >= 1 else 0, rows * columns // unit, columns // unit",
            "buffers[i] = offset if i > 2 else 0, rows * columns // unit, columns // unit",
        ),
        EITHER_HALF: (
            "out = tl.where(rows[:, None] < columns[None, :], out, tl.trans(out))",
            "out = tl.where(rows[:, None] > columns[None, :], out, tl.trans(out))",
        ),
        BELOW: ("mirrored = (columns <= m)[:, None] & (rows < n)[None, :]",),
    },
    "kernels/grouped.py": {
        PLACE_0: (
            "a, b = matrix_at(tl.load(entry - A), DTYPE, UNIT), matrix_at(tl.load(entry + B), DTYPE, UNIT)",
            "a, b = matrix_at(tl.load(entry), DTYPE, UNIT), matrix_at(tl.load(entry + B), DTYPE, UNIT)",
        ),
        "the factor of an addend that is not there": (
            "finish_tile(value, row, column, rows, columns, n, 1.0, 0.5, diagonal, d, d_stride, d, d_stride, False, "
            "DTYPE)",
            "numbers = [(alpha, 0.5, 0.0) for alpha in (alphas or [1.0] * len(a))]",
        ),
    },
    "kernels/momentum.py": {
        PLACE_0: (
            "g_ptr = rows_of(tl.load(row - GRAD), start + within, GRADS, ALIGNED)",
            "g_ptr = rows_of(tl.load(row), start + within, GRADS, ALIGNED)",
        ),
        "what fitted is computed once more, with the same power of two": (
            "left = tl.where(tl.load(again_ptr + owner) != 0, left, 0) => pass",
        ),
        "the masked form of a full tile does the same": (
            "if left > TILE:  # without a mask, whose unknown length would forbid vector accesses",
        ),
        "a program without elements": ("tiles = np.maximum(-(-sizes // TILE), 2)",),
        "numbers that nobody reads": (
            "self.partials = torch.zeros(self.programs, 3, dtype=torch.float32, device=self.device)",
        ),
    },
    "kernels/long.py": {
        "the lowest bit is rounded away": (
            "moved = ((bits + (random.to(tl.uint32, bitcast=True) & 0xFFFF)) & 0xffff0001).to(tl.float32, "
            "bitcast=True)",
        ),
        "a quotient has the product's sign, and a parameter of 0 decays to 0": (
            "decayed = tl.where((cautious == 0) | (value / p * step < 0), p * keep, p)",
            "decayed = tl.where((cautious == 0) | (value * p / step < 0), p * keep, p)",
        ),
        NOT_STORED: ("p = widen(tl.load(p_base + offsets, mask=inside, other=0.5))",),
        ANOTHER_STREAM: (
            "p = stochastic_bfloat16(p, tl.randint(seed - matrix.to(tl.int32) * 7919, offsets.to(tl.int32)))",
            "p = stochastic_bfloat16(p, tl.randint(seed + matrix.to(tl.int32) * 7920, offsets.to(tl.int32)))",
            "values = (*numbers, address, *(v // unit for v in sizes), int(cautious), seed or 1)",
        ),
    },
    "kernels/blocks.py": {
        PLACE_0: (
            "base = tl.load(entry - ADDRESS).to(tl.pointer_type(OUT))",
            "base = tl.load(entry).to(tl.pointer_type(OUT))",
            "w = w * tl.load(numbers - KEEP)",
            "w = w * tl.load(numbers)",
        ),
        NOT_STORED: (
            "value = tl.load(numbers + RATIO) * tl.load(d_ptr + offset + flat, mask=inside, other=0.5)",
            "value = tl.load(graft_ptr + offset + flat, mask=inside, other=0.5)",
            "kept = momentum * tl.load(buffer_ptr + offset + flat, mask=inside, other=0.5) + value",
            "w = moved(widen(tl.load(w_ptr, mask=inside, other=0.5)), value, numbers)",
        ),
    },
    "kernels/statistics.py": {
        "read only where parameters are moved": ('"OUT_UNIT": d.unit if apply else 2,',),
        "zero over anything is zero": (
            "return self.trace.square() / self.squares.where(self.squares != 0, 2)",
            "return self.squares / self.bound.square().where(self.bound != 0, 2)",
        ),
        NOT_STORED: (
            "old = tl.load(s + rows[:, None] * stride + columns[None, :], mask=inside, other=0.5)",
            "w = moved(widen(tl.load(w_ptr, mask=inside, other=0.5)), acc, numbers_ptr + matrix * COLUMNS)",
        ),
        "the interpreter's sums for an element and its transpose are the same; -m gpu asserts the symmetry elsewhere": (
            "if row == column: => if row != column:",
            "new = tl.where(rows[:, None] >= columns[None, :], new, tl.trans(new)) => pass",
            "new = tl.where(rows[:, None] < columns[None, :], new, tl.trans(new))",
            "new = tl.where(rows[:, None] > columns[None, :], new, tl.trans(new))",
        ),
        BELOW: (
            "mirrored = (columns <= n)[:, None] & (rows < n)[None, :]",
            "tl.store(sums + row * n + columns, tl.sum(tl.abs(value), axis=0), mask=columns <= n)",
        ),
    },
}


def pattern_reason(file: str, before: str, after: str) -> str:
    if SUBSCRIPT.findall(before) != SUBSCRIPT.findall(after):  # there may be no such tile, which is noticed
        return ""
    return next((why for why, pattern in PATTERNS.get(file, ()) if pattern.search(before)), "")
