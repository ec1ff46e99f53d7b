// One dense product, cut into tasks: rectangles of the result that one thread computes from start to end.
#pragma once

#include <algorithm>
#include <cstdint>

#include "matrix/kernels.h"

namespace steepest::matrix {

// Products are summed in runs of so many terms: a packed panel of 48 columns is then 48 KiB.  (Runs have the same bounds
// in every task, so that a result does not depend on how it was cut.)
template <class T>
constexpr int64_t kRun = 1024 / sizeof(T);
constexpr int64_t kMostSide = 384;  // of a task's rectangle: its packed part of b stays in the L2 cache

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// A matrix: its rows `ld` apart; or, what scratch is, panels of 48 columns `panel` apart, in which rows follow each other.
// A product reads panels where they lie, and has nothing to pack.  (Two cores of a Xeon, n = 1024: packing was 16 % of a
// symmetric product and 7 % of a long one.)
template <class T>
struct Operand {
  T *at;  // nullptr: there is none
  int64_t rows, cols;
  ptrdiff_t ld;
  // 0: no panels.  With them rows up to a multiple of 8, and columns up to one of 48, may be read and written.
  ptrdiff_t panel;

  T *place(int64_t i, int64_t j) const { return at + (panel ? j / kPanel * panel + j % kPanel : j) + i * ld; }
  // How many elements of a row, from column j on, lie one after another.
  int64_t together(int64_t j) const { return panel ? std::min(kPanel - j % kPanel, cols - j) : cols - j; }
};

// to(row + j, col + i) = from(top + i, left + j) for i < rows and j < cols; they may be parts of one matrix.
template <class T>
void transpose_part(const Operand<T> &from, int64_t top, int64_t left, int64_t rows, int64_t cols,
                    const Operand<T> &to, int64_t row, int64_t col) {
  for (int64_t j = 0, width; j < cols; j += width) {
    width = std::min(cols - j, from.together(left + j));
    for (int64_t i = 0, height; i < rows; i += height) {
      height = std::min(rows - i, to.together(col + i));
      kernels<T>().transpose(from.place(top + i, left + j), from.ld, to.place(row + j, col + i), to.ld, height, width);
    }
  }
}

// d = alpha op(a) op(b) + beta c + gamma I; `symmetric` computes the lower triangle and mirrors it.
template <class T>
struct Product {
  Operand<T> d, a, b, c;
  bool transpose_a, transpose_b, symmetric;
  T alpha, beta, gamma;
  int64_t terms;  // length of the sums
  int64_t side;   // of a task, a multiple of 48, at most kMostSide
};

// What a thread packs into.
template <class T>
struct Buffers {
  alignas(64) T a[kRun<T> * kPanel];
  alignas(64) T b[kRun<T> * kMostSide];
  alignas(64) T c[kStrip * kPanel];
  alignas(64) T d[kStrip * kPanel];
};

int64_t product_tasks(int64_t rows, int64_t cols, bool symmetric, int64_t side);

// Returns the floating-point operations executed.
template <class T>
int64_t run_product_task(const Product<T> &product, int64_t task, Buffers<T> &buffers);

}  // namespace steepest::matrix
