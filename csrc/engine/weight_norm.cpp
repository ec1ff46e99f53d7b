// Weight normalisation on the CPU: one read of a row for its norm, a second one, from the cache, for the result.
#include <algorithm>
#include <cmath>

#include "engine/clones.h"
#include "engine/cpu_threads.h"
#include "engine/engine.h"
#include "engine/stages.h"

namespace steepest::cpu {
namespace {

// w = factor * v.
STEEPEST_CLONES void scale_row(const float *__restrict v, float *__restrict w, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) w[i] = factor * v[i];
}

// dv = factor * (dw - share * v).
STEEPEST_CLONES void project_row(const float *__restrict dw, const float *__restrict v, float *__restrict dv, int64_t n,
                                 float factor, float share) {
  for (int64_t i = 0; i < n; ++i) dv[i] = factor * (dw[i] - share * v[i]);
}

// Sixteen running sums in float64, added in order: the result does not depend on the width of the vectors.
STEEPEST_CLONES double inner_row(const float *__restrict a, const float *__restrict b, int64_t n) {
  constexpr int64_t kLanes = 16;
  double sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) sums[k] += static_cast<double>(a[i + k]) * static_cast<double>(b[i + k]);
  for (int64_t k = 0; i + k < n; ++k) sums[k] += static_cast<double>(a[i + k]) * static_cast<double>(b[i + k]);
  double sum = 0.0;
  for (const double part : sums) sum += part;
  return sum;
}

// Calls row(i) for all rows; threads take an eighth of their part at a time.  (Row by row they wait for each other: norms of
// neighbours share a cache line.  768 x 3072, two threads: 0.7 ms, so 0.3.)
template <class Row>
void for_rows(const steepest_exec &exec, int64_t rows, int64_t columns, const Row &row) {
  const int threads = thread_count(exec, rows * columns);
  const int64_t turn = std::max<int64_t>(1, rows / (8 * threads));
  std::atomic<int64_t> taken{0};
  run_on_threads(threads, [&] {
    for (int64_t begin = taken.fetch_add(turn); begin < rows; begin = taken.fetch_add(turn))
      for (int64_t i = begin; i < std::min(begin + turn, rows); ++i) row(i);
  });
}

}  // namespace

void weight_norm(const steepest_exec &exec, const steepest_weight_norm_args &a) {
  for_rows(exec, a.rows, a.columns, [&](int64_t i) {
    const float *v = a.v + i * a.columns;
    const double norm = std::sqrt(inner_row(v, v, a.columns));
    a.norms[i] = static_cast<float>(norm);
    // A row of zeros has no direction: its w is 0.  One with NaN is NaN.
    scale_row(v, a.w + i * a.columns, a.columns, norm != 0.0 ? static_cast<float>(a.g[i] / norm) : 0.0f);
  });
}

void weight_norm_backward(const steepest_exec &exec, const steepest_weight_norm_args &a) {
  for_rows(exec, a.rows, a.columns, [&](int64_t i) {
    const float *v = a.v + i * a.columns, *dw = a.grad_w + i * a.columns;
    const double norm = a.norms[i], inner = inner_row(dw, v, a.columns);
    const bool zero = norm == 0.0;
    a.grad_g[i] = zero ? 0.0f : static_cast<float>(inner / norm);
    project_row(dw, v, a.grad_v + i * a.columns, a.columns, zero ? 0.0f : static_cast<float>(a.g[i] / norm),
                zero ? 0.0f : static_cast<float>(inner / (norm * norm)));
  });
}

}  // namespace steepest::cpu
