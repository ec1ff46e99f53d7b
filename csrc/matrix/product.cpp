#include "matrix/product.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "matrix/ahead.h"

namespace steepest::matrix {
namespace {

// op(a)^T or op(b): row k holds term k.
template <class T>
struct Terms {
  const Operand<T> &x;
  bool rows_are_terms;  // else its columns are
  bool direct;          // used where they lie

  Terms(const Operand<T> &operand, bool by_rows)
      : x(operand), rows_are_terms(by_rows), direct(by_rows && operand.panel != 0) {}

  void ask(Ahead<T> &ahead, int64_t k, int64_t count, int64_t first, int64_t width) const {
    rows_are_terms ? ahead.add(x, k, count, first, width) : ahead.add(x, first, width, k, count);
  }

  // Terms [k, k + count) of `width` elements from `first` on: rows of kPanel, zeros up to a multiple of 16.
  void pack(int64_t k, int64_t count, int64_t first, int64_t width, T *to) const {
    const int64_t whole = round_up(width, kGranule);
    if (rows_are_terms) {
      const T *from = x.at + k * x.ld + first;
      if (width == kPanel) return kernels<T>().pack(from, x.ld, to, count);
      for (int64_t i = 0; i < count; ++i, from += x.ld, to += kPanel)
        std::fill(std::copy_n(from, width, to), to + whole, T(0));
      return;
    }
    transpose_part(x, first, k, width, count, Operand<T>{to, count, kPanel, kPanel, 0}, 0, 0);
    if (whole > width)
      for (int64_t i = 0; i < count; ++i) std::fill(to + i * kPanel + width, to + i * kPanel + whole, T(0));
  }
};

struct Rectangle {
  int64_t top, bottom, left, right;
};

// Off the diagonal first: those are the longer tasks.
std::pair<int64_t, int64_t> triangle_place(int64_t task, int64_t blocks) {
  for (int64_t i = 1; i < blocks; ++i) {
    if (task < i) return {i, task};
    task -= i;
  }
  return {task, task};
}

template <class T>
Rectangle rectangle(const Product<T> &p, int64_t task) {
  const int64_t rows = p.d.rows, cols = p.d.cols, side = p.side;
  int64_t i, j;
  if (p.symmetric) {
    std::tie(i, j) = triangle_place(task, (rows + side - 1) / side);
  } else {
    const int64_t across = (cols + side - 1) / side;
    i = task / across, j = task % across;
  }
  return {i * side, std::min(rows, (i + 1) * side), j * side, std::min(cols, (j + 1) * side)};
}

// One tile of d at (i, j), straight into d where whole tiles may be written, by way of a buffer at an edge.
template <class T>
void put_tile(const Product<T> &p, const Kernels<T> &loops, Buffers<T> &buffers, int64_t i, int64_t j, int64_t width,
              const T *a, const T *b, int64_t count, bool first_run, const T *later) {
  const Operand<T> &c = first_run ? p.c : p.d;
  const T beta = first_run ? p.beta : T(1);
  const auto whole = [&](const Operand<T> &x) { return x.panel || (i + kStrip <= x.rows && j + width <= x.cols); };
  const int64_t height = std::min(kStrip, p.d.rows - i), valid = std::min(width, p.d.cols - j);
  const T *from = c.at ? c.place(i, j) : nullptr;
  ptrdiff_t ldc = c.ld;
  if (from && !whole(c)) {
    for (int64_t r = 0; r < height; ++r) {
      std::copy_n(from + r * c.ld, valid, buffers.c + r * kPanel);
      std::fill(buffers.c + r * kPanel + valid, buffers.c + r * kPanel + width, T(0));
    }
    from = buffers.c, ldc = kPanel;
  }
  T *const to = p.d.place(i, j);
  if (whole(p.d)) return loops.tile(a, kPanel, b, kPanel, count, width, p.alpha, beta, from, ldc, to, p.d.ld, later);
  loops.tile(a, kPanel, b, kPanel, count, width, p.alpha, beta, from, ldc, buffers.d, kPanel, later);
  for (int64_t r = 0; r < height; ++r) std::copy_n(buffers.d + r * kPanel, valid, to + r * p.d.ld);
}

template <class T>
void add_diagonal(const Product<T> &p, const Rectangle &r) {
  for (int64_t i = std::max(r.top, r.left); i < std::min(r.bottom, r.right); ++i) *p.d.place(i, i) += p.gamma;
}

// What lies above the diagonal, from what lies below.
template <class T>
void mirror(const Operand<T> &d, const Rectangle &r) {
  if (r.top != r.left)
    return transpose_part(d, r.top, r.left, r.bottom - r.top, r.right - r.left, d, r.left, r.top);
  for (int64_t i = r.top; i < r.bottom; i += kPanel) {
    const int64_t end = std::min(i + kPanel, r.bottom);
    kernels<T>().mirror(d.place(i, i), d.ld, end - i);
    if (end < r.bottom) transpose_part(d, end, i, r.bottom - end, end - i, d, i, end);
  }
}

}  // namespace

int64_t product_tasks(int64_t rows, int64_t cols, bool symmetric, int64_t side) {
  const int64_t down = (rows + side - 1) / side, across = (cols + side - 1) / side;
  return symmetric ? down * (down + 1) / 2 : down * across;
}

template <class T>
int64_t run_product_task(const Product<T> &p, int64_t task, Buffers<T> &buffers) {
  const Kernels<T> &loops = kernels<T>();
  const Rectangle r = rectangle(p, task);
  const Terms<T> a(p.a, p.transpose_a), b(p.b, !p.transpose_b);
  // On the diagonal of X X^T the terms of a are those of b, which are packed already.
  const bool shared = p.a.at == p.b.at && a.rows_are_terms == b.rows_are_terms && r.top == r.left && !b.direct;
  int64_t flops = 0;
  // A sum of no terms still scales c.
  for (int64_t k = 0; k < std::max<int64_t>(p.terms, 1); k += kRun<T>) {
    const int64_t count = std::min(kRun<T>, p.terms - k);
    if (!b.direct)
      for (int64_t j = r.left; j < r.right; j += kPanel)
        b.pack(k, count, j, std::min(kPanel, r.right - j), buffers.b + (j - r.left) * kRun<T>);
    Ahead<T> ahead;
    const int64_t next_run = k + kRun<T>;
    b.ask(ahead, next_run, std::min(kRun<T>, p.terms - next_run), r.left, r.right - r.left);
    if (!shared) a.ask(ahead, next_run, std::min(kRun<T>, p.terms - next_run), r.top, r.bottom - r.top);
    for (int64_t panel = r.top; panel < r.bottom; panel += kPanel) {
      const int64_t panel_end = std::min(panel + kPanel, r.bottom);
      const T *const packed = shared ? buffers.b + (panel - r.left) * kRun<T> : buffers.a;
      if (!a.direct && !shared) a.pack(k, count, panel, panel_end - panel, buffers.a);
      // A panel of b stays in the first caches while the strips of a pass by.
      for (int64_t j = r.left; j < r.right; j += kPanel) {
        const T *const from_b = b.direct ? p.b.place(k, j) : buffers.b + (j - r.left) * kRun<T>;
        for (int64_t i = panel; i < panel_end; i += kStrip) {
          const int64_t right = round_up(p.symmetric ? std::min(r.right, i + kStrip) : r.right, kGranule);
          if (j >= right) continue;
          const int64_t width = std::min(kPanel, right - j);
          const T *const from_a = a.direct ? p.a.place(k, i) : packed + (i - panel);
          const T *const later = ahead.take(count / kTermsPerLine * kLine<T>);
          put_tile(p, loops, buffers, i, j, width, from_a, from_b, count, k == 0, later ? later : from_b);
          flops += 2 * kStrip * width * count;
        }
      }
    }
  }
  if (p.gamma != 0) add_diagonal(p, r);
  if (p.symmetric) mirror(p.d, r);
  return flops;
}

template int64_t run_product_task(const Product<float> &, int64_t, Buffers<float> &);
template int64_t run_product_task(const Product<double> &, int64_t, Buffers<double> &);

}  // namespace steepest::matrix
