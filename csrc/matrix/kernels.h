// The loops that matrix products are made of, one set per instruction set and element type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace steepest::matrix {

constexpr int64_t kStrip = 8;      // rows of a tile
constexpr int64_t kGranule = 16;   // columns are computed in multiples of this
constexpr int64_t kPanel = 48;     // columns of a full tile, and of a packed panel
template <class T>
constexpr int64_t kLine = 64 / sizeof(T);  // elements of a line of the cache
constexpr int64_t kTermsPerLine = 4;  // a whole tile asks for a line of the cache once in so many terms

// The element type that a matrix of T is converted from.
template <class T>
using OtherType = std::conditional_t<std::is_same_v<T, float>, double, float>;

template <class T>
struct Kernels {
  // d (8 x width) = alpha sum_k a_k b_k^T + beta c: the column a_k is 8 elements at a + k lda, the row b_k is `width`
  // elements at b + k ldb.  width is 16, 32 or 48.  c may be NULL, and may be d.  What lies from `later` on is asked for
  // in the L2 cache meanwhile, about k / kTermsPerLine lines of it.
  void (*tile)(const T *a, ptrdiff_t lda, const T *b, ptrdiff_t ldb, int64_t k, int64_t width, T alpha, T beta,
               const T *c, ptrdiff_t ldc, T *d, ptrdiff_t ldd, const T *later);
  // to (cols x rows) = transpose of from (rows x cols).
  void (*transpose)(const T *from, ptrdiff_t ld_from, T *to, ptrdiff_t ld_to, int64_t rows, int64_t cols);
  // to (count rows of kPanel elements, packed) = from.
  void (*pack)(const T *from, ptrdiff_t ld_from, T *to, int64_t count);
  // d (n x n): what lies above the diagonal, from what lies below.
  void (*mirror)(T *d, ptrdiff_t ld, int64_t n);
  // d = alpha a + beta c, n elements; c may be NULL.
  void (*combine)(const T *a, const T *c, T *d, int64_t n, T alpha, T beta);
  // Sum of squares in double; in an order that depends on n alone.
  double (*sum_squares)(const T *x, int64_t n);
  // Sum of |a + b| / 2, in double and in the same order.
  double (*sum_magnitudes)(const T *a, const T *b, int64_t n);
  // b = (a + b) factor in double; returns the sum of its squares.
  double (*average)(const T *a, T *b, int64_t n, double factor);
  // y = x factor, in double.
  void (*scale)(const T *x, T *y, int64_t n, double factor);
  void (*convert)(const OtherType<T> *x, T *y, int64_t n, double factor);
};

// Those for the machine at hand, chosen once.
template <class T>
const Kernels<T> &kernels();

const char *clone_name();

}  // namespace steepest::matrix
