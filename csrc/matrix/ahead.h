// What a task reads after its present run of terms, asked for in the L2 cache while it computes.
#pragma once

#include <cstdint>

#include "matrix/product.h"

namespace steepest::matrix {

// Parts of matrices that lie in panels, given out in pieces, one for every tile to ask for.  All at once would hold up the
// loads that the tiles need: a core waits for 16 lines at most.  (Two cores of a Xeon whose L3 takes 75 ns to answer: long
// products 7 % faster, symmetric ones 4 %; with 48 lines at the start of every tile, none.)
template <class T>
class Ahead {
 public:
  // Rows [top, top + rows) of the panels that columns [left, left + cols) lie in; nothing of a matrix without panels.
  void add(const Operand<T> &x, int64_t top, int64_t rows, int64_t left, int64_t cols) {
    if (!x.panel || rows <= 0 || cols <= 0) return;
    const int64_t first = left / kPanel, last = (left + cols - 1) / kPanel;
    parts_[size_++] = {x.place(top, first * kPanel), last - first + 1, rows * kPanel, x.panel};
  }

  // Where the next piece lies, so many elements; nullptr: none is left.
  const T *take(int64_t elements) {
    if (part_ == size_) return nullptr;
    const Part &part = parts_[part_];
    const T *const piece = part.at + panel_ * part.apart + taken_;
    taken_ += elements;
    if (taken_ >= part.elements) taken_ = 0, ++panel_;
    if (panel_ == part.panels) panel_ = 0, ++part_;
    return piece;
  }

 private:
  struct Part {
    const T *at;
    int64_t panels, elements;  // of each
    ptrdiff_t apart;
  };
  Part parts_[2];  // of a and of b
  int64_t size_ = 0, part_ = 0, panel_ = 0, taken_ = 0;
};

}  // namespace steepest::matrix
