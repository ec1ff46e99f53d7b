"""Mutants of csrc/matrix that nobody can notice (see mutation_equivalents.py)."""

from __future__ import annotations

EQUIVALENT: dict[str, dict[str, tuple[str, ...]]] = {
    "csrc/matrix/kernels.inc": {
        "columns split otherwise have the same sums": (
            "if (left > 3)",
            "if (left >= 4)",
            "else if (left == 3)",
            "block<T, 2>(a + r, lda, b + j, ldb, k, alpha, beta, from, ldc, to, ldd, later), j += 3 * kLanes;",
        ),
        "an empty block, or one done twice": (
            "for (int64_t j = 0; j <= cols; j += 16)",
            "for (int64_t i = 0; i <= rows; i += 8)",
            "for (int64_t k = j; k <= cols && k < j + 16; k += 8) {",
            "for (int64_t k = j; k < cols && k <= j + 16; k += 8) {",
            "for (int64_t k = j; k < cols && k < j + 17; k += 8) {",
            "for (int64_t i = 0; i <= n; i += 8) {",
            "for (int64_t i = 1; i < n; i += 8) {",
        ),
        "element by element to the same end": (
            "if (i + 8 < rows && k + 8 <= cols) {",
            "if (i + 8 <= rows && k + 8 < cols) {",
            "if (i + 9 <= rows && k + 8 <= cols) {",
            "if (i + 8 <= rows && k + 9 <= cols) {",
            "if (i + 8 < n) {",
            "if (i + 9 <= n) {",
        ),
        "both are eight there": (
            "const int64_t height = rows - i <= 8 ? rows - i : 8, width = cols - k < 8 ? cols - k : 8;",
            "const int64_t height = rows - i < 8 ? rows - i : 8, width = cols - k <= 8 ? cols - k : 8;",
            "const int64_t height = rows - i < 9 ? rows - i : 8, width = cols - k < 8 ? cols - k : 8;",
            "const int64_t height = rows - i < 8 ? rows - i : 8, width = cols - k < 9 ? cols - k : 8;",
            "transpose(d + i * ld, ld, d + i, ld, n - i <= 8 ? n - i : 8, i);",
            "transpose(d + i * ld, ld, d + i, ld, n - i < 9 ? n - i : 8, i);",
        ),
        "a row more is mirrored, as the next round does": (
            "for (int64_t row = 1; row <= 8 && i + row < n; ++row)",
            "for (int64_t row = 1; row < 9 && i + row < n; ++row)",
        ),
        "of a diagonal element both are the same": (
            *(f"const M column = {{{', '.join(str(k + (k == c)) for k in range(8))}}};" for c in range(8)),
            "*row = column >= i ? *reinterpret_cast<const V *>(upper + 8 * i) : static_cast<V>(*row);",
        ),
        "the diagonal onto itself": (
            "for (int64_t col = 0; col <= row; ++col) corner[col * ld + row] = corner[row * ld + col];",
        ),
        "the rest goes to the same lanes": ("for (; i + kLanes < n; i += kLanes)",),
        "the same, in runs of other lengths between which a line is asked for": (
            "for (int64_t end = k >= kEvery ? k - kEvery : 0; k > end; --k, a += lda, b += ldb) {",
        ),
    },
    "csrc/matrix/program.cpp": {
        "a workspace that is aligned already is begun one line later, for which it has room": (
            "char *const memory = reinterpret_cast<char *>((reinterpret_cast<uintptr_t>(workspace) + kAlign) / kAlign "
            "* kAlign);",
        ),
        "read by the first task alone": ("const double total = begin == 0 ? total_of(a.rows) : 1;",),
        "at the last place before a line one byte beyond, which is padding of the last buffers": (
            "char *const memory = reinterpret_cast<char *>((reinterpret_cast<uintptr_t>(workspace) + kAlign + 1) "
            "/ kAlign * kAlign);",
        ),
        "every chain takes its matrix before it reads the number": ("int64_t matrix_ = 1;",),
        "how large a thread's part of a product is: time, not results": (
            "Chain chain(p, offsets, mine, reinterpret_cast<double *>(mine + spread.scratch), 2);",
        ),
        "no operation uses the sums and the buffers": ("char *const buffers = mine + spread.scratch;",),
        "one thread does it all, or is a team by itself: time": (
            "if (spread.threads != 1) {",
            "if (spread.threads == 2) {",
        ),
        "one after the other, whichever comes first": ("int64_t number = 1;",),
        "together() ends where the columns do": ("n = std::min({cols + j, x.together(j)...});",),
        "the second task, if it begins at row 1, writes the same number": ("if (begin > 1) return;",),
        "the same number where both are equal": (
            "growth = std::isnan(ratio) || ratio >= growth ? ratio : growth;",
            "double bound = norm >= 1 ? 1.0 : norm;  // NaN stays",
            "bound = std::isnan(grown) || grown <= bound ? grown : bound;",
            "for (int64_t i = 0; i < d.rows; ++i) largest = std::isnan(sums_[i]) || sums_[i] >= largest ? sums_[i] : "
            "largest;",
        ),
        "zeros stay zeros": (
            "const double factor = std::isfinite(largest) ? 0.5 * op.alpha / (largest > 0 ? largest : 3.0)",
        ),
        "an operation's last phase again, with the same numbers": (
            "case STEEPEST_MATRIX_SYMMETRISE: return 4;",
            "case STEEPEST_MATRIX_NORM: return 3;",
        ),
        "a task without rows": (
            "return (d.rows + rows_per_task(d) + 1) / rows_per_task(d);",
            "return (d.rows + rows_per_task(d)) / rows_per_task(d);",
        ),
        "up to a multiple of 8 the same": (
            "int64_t scratch_panel(const steepest_matrix_operand &x) { return round_up(std::max<int64_t>(2, x.rows), "
            "kStrip) * kPanel; }",
        ),
    },
    "csrc/matrix/product.h": {
        "whoever asks ends where the columns do": tuple(
            f"int64_t together(int64_t j) const {{ return panel ? std::min(kPanel - j % kPanel, {panels}) : {rows}; }}"
            for panels, rows in (
                ("cols + j", "cols - j"),
                ("cols", "cols - j"),
                ("cols - j", "cols + j"),
                ("cols - j", "cols"),
            )
        ),
        "with d in its place: an element of c is read before that of d is written": (
            "alignas(64) T c[kStrip / kPanel];",
        ),
    },
    "csrc/matrix/product.cpp": {
        "an empty block": (
            "for (int64_t i = r.top; i <= r.bottom; i += kPanel) {",
            "if (end <= r.bottom) transpose_part(d, end, i, r.bottom - end, end - i, d, i, end);",
        ),
        "there is one panel": (
            "transpose_part(x, first, k, width, count, Operand<T>{to, count, kPanel, kPanel, 1}, 0, 0);",
        ),
        "nothing to fill": ("if (whole >= width)",),
        "by way of a buffer, the same numbers": (
            "const auto whole = [&](const Operand<T> &x) "
            "{ return x.panel || (i + kStrip < x.rows && j + width <= x.cols); };",
            "const auto whole = [&](const Operand<T> &x) "
            "{ return x.panel || (i + kStrip <= x.rows && j + width < x.cols); };",
        ),
        "a run of no terms, a panel of no columns or rows: nothing is done": (
            "for (int64_t k = 0; k <= std::max<int64_t>(p.terms, 1); k += kRun<T>) {",
            "for (int64_t k = 0; k < std::max<int64_t>(p.terms, 2); k += kRun<T>) {",
            "for (int64_t j = r.left; j <= r.right; j += kPanel)",
            "for (int64_t panel = r.top; panel <= r.bottom; panel += kPanel) {",
            "for (int64_t j = r.left; j <= r.right; j += kPanel) {",
            "if (j > right) continue;",
        ),
        "what is computed beyond an edge is not kept; zeros only spare it NaN and what is slow": (
            "std::fill(std::copy_n(from, width, to), to + whole, T(1));",
            "if (whole <= width)",
            "for (int64_t i = 1; i < count; ++i) std::fill(to + i * kPanel + width, to + i * kPanel + whole, T(0));",
            "for (int64_t i = 0; i < count; ++i) std::fill(to + i * kPanel + width, to + i * kPanel + whole, T(1));",
            "std::fill(buffers.c + r * kPanel + valid, buffers.c + r * kPanel + width, T(1));",
        ),
    },
}
