#include "engine/stages.h"

#include <algorithm>
#include <cmath>

#include "engine/clones.h"
#include "engine/engine.h"

#ifndef STEEPEST_HAS_F16C  // 0: tests of what runs elsewhere
#if defined(__x86_64__) && defined(__GNUC__)
#define STEEPEST_HAS_F16C 1
#define STEEPEST_HAS_SSE2 1
#else
#define STEEPEST_HAS_F16C 0
#define STEEPEST_HAS_SSE2 0
#endif
#endif
#if STEEPEST_HAS_F16C
#include <immintrin.h>
#endif

namespace steepest::cpu {
namespace {

STEEPEST_CLONES void load_bfloat16(const bfloat16 *__restrict from, float *__restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

STEEPEST_CLONES void load_float16(const float16 *__restrict from, float *__restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

#if STEEPEST_HAS_F16C
// The one place with intrinsics: compilers do not turn the integer conversion into F16C's instructions, which give the
// same bits (signalling NaNs apart, which the first operation would quiet) in a third of the time.
__attribute__((target("avx,f16c"))) void load_float16_f16c(const float16 *from, float *to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i))));
  for (; i < n; ++i) to[i] = widen(from[i]);
}

__attribute__((target("avx,f16c"))) void store_float16_f16c(const float *from, float16 *to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  for (; i < n; ++i) to[i] = narrow<float16>(from[i]);
}

bool has_f16c() {
  static const bool found = (__builtin_cpu_init(), __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c"));
  return found;
}
#endif

STEEPEST_CLONES void store_bfloat16(const float *__restrict from, bfloat16 *__restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = narrow<bfloat16>(from[i]);
}

STEEPEST_CLONES void store_float16(const float *__restrict from, float16 *__restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = narrow<float16>(from[i]);
}

// An element's way through a rule, over float32 tiles or over another type, converted in registers.  `from` may be p.
template <class Rule, class T>
__attribute__((always_inline)) inline void rule_loop(const T *from, T *p, const T *__restrict g, T *const *states,
                                                     int64_t n, typename Rule::Scalars s) {
  constexpr int kStates = Rule::kStates;
  T *__restrict s0 = kStates > 0 ? states[0] : nullptr;
  T *__restrict s1 = kStates > 1 ? states[1] : nullptr;
  T *__restrict s2 = kStates > 2 ? states[2] : nullptr;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    float pi = widen(from[i]), gi = widen(g[i]), state[3] = {};
    if constexpr (kStates > 0) state[0] = widen(s0[i]);
    if constexpr (kStates > 1) state[1] = widen(s1[i]);
    if constexpr (kStates > 2) state[2] = widen(s2[i]);
    decay(pi, gi, s.shrink);
    Rule::step(pi, gi, state, s);
    p[i] = narrow<T>(pi);
    if constexpr (kStates > 0) s0[i] = narrow<T>(state[0]);
    if constexpr (kStates > 1) s1[i] = narrow<T>(state[1]);
    if constexpr (kStates > 2) s2[i] = narrow<T>(state[2]);
  }
}

// Clones cannot be templates, so each rule's are spelled by a macro.
#define STEEPEST_RULE_LOOPS(name, ...)                                                                            \
  STEEPEST_CLONES void name##_float32(const float *from, float *p, const float *g, float *const *states,          \
                                      int64_t n, const __VA_ARGS__::Scalars &s) {                                 \
    rule_loop<__VA_ARGS__>(from, p, g, states, n, s);                                                             \
  }                                                                                                               \
  STEEPEST_CLONES void name##_bfloat16(bfloat16 *p, const bfloat16 *g, bfloat16 *const *states, int64_t n,        \
                                       const __VA_ARGS__::Scalars &s) {                                           \
    rule_loop<__VA_ARGS__>(p, p, g, states, n, s);                                                                \
  }
#define STEEPEST_FOR_EACH_RULE(_)                \
  _(sgd, Sgd<false>)                             \
  _(sgd_momentum, Sgd<true>)                     \
  _(adagrad, Adagrad)                            \
  _(rmsprop, Rmsprop<false, false>)              \
  _(rmsprop_momentum, Rmsprop<false, true>)      \
  _(rmsprop_centered, Rmsprop<true, false>)      \
  _(rmsprop_centered_momentum, Rmsprop<true, true>) \
  _(adam, Adam<false>)                           \
  _(adam_amsgrad, Adam<true>)                    \
  _(lion, Lion)                                  \
  _(sign_descent, Sign)                          \
  _(perturb, Perturb<false, false>)              \
  _(perturb_backup, Perturb<false, true>)        \
  _(perturb_power, Perturb<true, false>)         \
  _(perturb_power_backup, Perturb<true, true>)   \
  _(restore, Restore)
STEEPEST_FOR_EACH_RULE(STEEPEST_RULE_LOOPS)

STEEPEST_CLONES void gradient_loop(const float *g, float *out, int64_t n, GradientStage stage) {
  // `out` may be `g` itself: element i depends on element i alone.
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = stage(g[i]);
}

STEEPEST_CLONES void shrink_loop(float *p, const float *before, int64_t n, Shrink s) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    float pi = p[i];
    shrink_after(pi, before[i], s);
    p[i] = pi;
  }
}

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

}  // namespace

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

#if STEEPEST_HAS_SSE2
void stream(const float *from, float *to, int64_t n) {
  constexpr uintptr_t kLine = 64;
  int64_t i = 0;
  for (; i < n && reinterpret_cast<uintptr_t>(to + i) % kLine != 0; ++i) to[i] = from[i];
  for (; i + 16 <= n; i += 16)
    for (int k = 0; k < 16; k += 4) _mm_stream_ps(to + i + k, _mm_loadu_ps(from + i + k));
  for (; i < n; ++i) to[i] = from[i];
}

void flush_streams() { _mm_sfence(); }
#else
void stream(const float *from, float *to, int64_t n) { std::copy_n(from, n, to); }

void flush_streams() {}
#endif

void load(int32_t dtype, const void *from, float *to, int64_t n) {
  if (dtype == STEEPEST_BFLOAT16) return load_bfloat16(static_cast<const bfloat16 *>(from), to, n);
#if STEEPEST_HAS_F16C
  if (has_f16c()) return load_float16_f16c(static_cast<const float16 *>(from), to, n);
#endif
  load_float16(static_cast<const float16 *>(from), to, n);
}

void store(int32_t dtype, const float *from, void *to, int64_t n) {
  if (dtype == STEEPEST_BFLOAT16) return store_bfloat16(from, static_cast<bfloat16 *>(to), n);
#if STEEPEST_HAS_F16C
  if (has_f16c()) return store_float16_f16c(from, static_cast<float16 *>(to), n);
#endif
  store_float16(from, static_cast<float16 *>(to), n);
}

void prepare_gradient(const float *g, float *out, int64_t n, const GradientStage &stage) {
  gradient_loop(g, out, n, stage);
}

void shrink_tile(float *p, const float *before, int64_t n, const Shrink &s) { shrink_loop(p, before, n, s); }

#define STEEPEST_RULE_TILES(name, ...)                                                                             \
  template <>                                                                                                      \
  void rule_tile<__VA_ARGS__>(const float *from, float *p, const float *g, float *const *states, int64_t n,        \
                              const __VA_ARGS__::Scalars &s) {                                                     \
    name##_float32(from, p, g, states, n, s);                                                                      \
  }                                                                                                                \
  template <>                                                                                                      \
  void rule_bfloat16<__VA_ARGS__>(bfloat16 *p, const bfloat16 *g, bfloat16 *const *states, int64_t n,              \
                                  const __VA_ARGS__::Scalars &s) {                                                 \
    name##_bfloat16(p, g, states, n, s);                                                                           \
  }
STEEPEST_FOR_EACH_RULE(STEEPEST_RULE_TILES)

const char *clone_name() {
#if STEEPEST_HAS_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return "x86-64-v4";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return "x86-64-v3";
#endif
  return "default";
}

}  // namespace steepest::cpu
