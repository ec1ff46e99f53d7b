// Surveys: sums of powers and the largest magnitude of float32 blocks.
#include <cmath>

#include "engine/clones.h"
#include "engine/stages.h"

#if STEEPEST_HAS_CLONES
#include <immintrin.h>
#endif

namespace steepest::cpu {
namespace {

// GCC's vectors, because it does not vectorise loops over arrays of running sums: 0.3 instead of 3 elements per cycle
// (Zen 4).  Narrower processors split them.  Every vector is a variable of its own: of an array GCC keeps a copy in
// memory, and what is stored narrow and read wide waits for the store.
using Bits = uint32_t __attribute__((vector_size(2 * kSurveyLanes)));
using Half = float __attribute__((vector_size(2 * kSurveyLanes)));
using Doubles = double __attribute__((vector_size(4 * kSurveyLanes)));  // of half of the lanes

template <class Power>
struct SurveyLanes {
  Doubles sum = {};
  Bits largest = {};

  __attribute__((always_inline)) void add(const Half &x, Power power) {
    Doubles d = __builtin_convertvector(x, Doubles);
    power(d);
    sum += d;
    const Bits magnitude = (Bits)x & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
};

template <class Power>
__attribute__((always_inline)) inline SurveyPart survey_loop(const float *__restrict x, int64_t n, Power power) {
  constexpr int64_t kHalf = kSurveyLanes / 2;
  SurveyLanes<Power> low, high;
  int64_t i = 0;
  for (; i + kSurveyLanes <= n; i += kSurveyLanes) {
    Half a, b;
    __builtin_memcpy(&a, x + i, sizeof a);
    __builtin_memcpy(&b, x + i + kHalf, sizeof b);
    low.add(a, power);
    high.add(b, power);
  }
  if (i < n) {
    // Zeros stand for what is missing: they add 0 and are never the largest.
    alignas(64) float rest[kSurveyLanes] = {};
    __builtin_memcpy(rest, x + i, (n - i) * sizeof(float));
    Half a, b;
    __builtin_memcpy(&a, rest, sizeof a);
    __builtin_memcpy(&b, rest + kHalf, sizeof b);
    low.add(a, power);
    high.add(b, power);
  }
  SurveyPart part{0.0, 0};
  for (int k = 0; k < kHalf; ++k) part.power_sum += low.sum[k];
  for (int k = 0; k < kHalf; ++k) part.power_sum += high.sum[k];
  const Bits largest = low.largest > high.largest ? low.largest : high.largest;
  for (int k = 0; k < kHalf; ++k) part.largest = largest[k] > part.largest ? largest[k] : part.largest;
  return part;
}

// By reference: a vector as a result would change the calling convention with the instruction set.
struct PowerTwo {
  __attribute__((always_inline)) void operator()(Doubles &x) const { x = x * x; }
};
struct PowerOne {
  __attribute__((always_inline)) void operator()(Doubles &x) const { x = x < 0.0 ? -x : x; }
};
struct NoPower {
  __attribute__((always_inline)) void operator()(Doubles &x) const { x = Doubles{}; }
};

STEEPEST_CLONES SurveyPart survey_two(const float *x, int64_t n) { return survey_loop(x, n, PowerTwo{}); }
STEEPEST_CLONES SurveyPart survey_one(const float *x, int64_t n) { return survey_loop(x, n, PowerOne{}); }
STEEPEST_CLONES SurveyPart survey_max(const float *x, int64_t n) { return survey_loop(x, n, NoPower{}); }

// Relative to the largest element, so that no power overflows and none that counts underflows.
STEEPEST_CLONES SurveyPart survey_scaled(const float *x, int64_t n, double q, double scale) {
  double sums[kSurveyLanes] = {}, powers[kSurveyLanes];
  for (int64_t i = 0; i < n; i += kSurveyLanes) {
    const int64_t m = n - i < kSurveyLanes ? n - i : kSurveyLanes;
    for (int64_t k = 0; k < m; ++k) powers[k] = power01(std::fabs(static_cast<double>(x[i + k])) / scale, q);
    for (int64_t k = 0; k < m; ++k) sums[k] += powers[k];
  }
  SurveyPart part = survey_loop(x, n, NoPower{});
  for (const double sum : sums) part.power_sum += sum;
  return part;
}

// The inner product, in the order of survey_loop.
STEEPEST_CLONES SurveyPart survey_inner(const float *x, const float *w, int64_t n) {
  double sums[kSurveyLanes] = {}, products[kSurveyLanes];
  for (int64_t i = 0; i < n; i += kSurveyLanes) {
    const int64_t m = n - i < kSurveyLanes ? n - i : kSurveyLanes;
    for (int64_t k = 0; k < m; ++k) products[k] = static_cast<double>(x[i + k]) * static_cast<double>(w[i + k]);
    for (int64_t k = 0; k < m; ++k) sums[k] += products[k];
  }
  SurveyPart part = survey_loop(x, n, NoPower{});
  for (const double sum : sums) part.power_sum += sum;
  return part;
}

STEEPEST_CLONES void weigh_loop(const float *x, const float *w, float *out, int64_t n, float alpha, float eps) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * (fabsf(w[i]) * alpha + eps);
}

#if STEEPEST_HAS_CLONES
// survey_two of kTogether blocks side by side, in the same order within each.  One stream alone waits for memory: two
// cores of a Xeon read 16 GB/s so, and 50 with eight streams that are asked for in advance.  (One intrinsic, because
// GCC 12 widens eight floats in two halves; in its form with a mask, because of the other it says that it reads what was
// not written.)
__attribute__((target("arch=x86-64-v4"))) void survey_two_together(const float *const *x, int64_t n,
                                                                   SurveyPart *parts) {
  using Magnitudes = uint32_t __attribute__((vector_size(4 * kSurveyLanes)));
  constexpr int64_t kHalf = kSurveyLanes / 2, kAhead = 128;  // elements
  Doubles low[kTogether] = {}, high[kTogether] = {};
  Magnitudes largest[kTogether] = {};
  for (int64_t i = 0; i < n; i += kSurveyLanes) {
#pragma GCC unroll 8
    for (int k = 0; k < kTogether; ++k) {
      const float *const at = x[k] + i;
      __builtin_prefetch(at + kAhead);
      const Doubles a = (Doubles)_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(at));
      const Doubles b = (Doubles)_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(at + kHalf));
      low[k] += a * a, high[k] += b * b;
      Magnitudes magnitude;
      __builtin_memcpy(&magnitude, at, sizeof magnitude);
      magnitude &= 0x7fffffffu;
      largest[k] = magnitude > largest[k] ? magnitude : largest[k];
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kTogether; ++k) {
    parts[k] = {0.0, 0};
    for (int lane = 0; lane < kHalf; ++lane) parts[k].power_sum += low[k][lane];
    for (int lane = 0; lane < kHalf; ++lane) parts[k].power_sum += high[k][lane];
    for (int lane = 0; lane < kSurveyLanes; ++lane)
      parts[k].largest = largest[k][lane] > parts[k].largest ? largest[k][lane] : parts[k].largest;
  }
}
#endif

}  // namespace

void survey_squares(const float *const *x, int64_t n, int count, SurveyPart *parts) {
#if STEEPEST_HAS_CLONES
  static_assert(kSurveyLanes == 16, "two vectors of doubles");
  if (count == kTogether && n % kSurveyLanes == 0 && has_v4()) return survey_two_together(x, n, parts);
#endif
  for (int k = 0; k < count; ++k) parts[k] = survey_two(x[k], n);
}

SurveyPart survey_tile(const float *x, int64_t n, double q, double scale) {
  if (q == 2.0 && scale == 1.0) return survey_two(x, n);
  if (q == 1.0 && scale == 1.0) return survey_one(x, n);
  if (std::isinf(q)) return survey_max(x, n);
  return survey_scaled(x, n, q, scale);
}

SurveyPart inner_tile(const float *x, const float *w, int64_t n) { return survey_inner(x, w, n); }

void weigh(const float *x, const float *w, float *out, int64_t n, float alpha, float eps) {
  weigh_loop(x, w, out, n, alpha, eps);
}

}  // namespace steepest::cpu
