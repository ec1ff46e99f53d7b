#include "engine/stages.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

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
// With intrinsics, because compilers do not turn the integer conversion into F16C's instructions, which give the same
// bits (signalling NaNs apart, which the first operation would quiet) in a third of the time.
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

[[maybe_unused]] bool has_v3() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool found = (__builtin_cpu_init(), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                                       __builtin_cpu_supports("bmi2"));
  return found;
#else
  return false;
#endif
}

STEEPEST_CLONES void store_bfloat16(const float *__restrict from, bfloat16 *__restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = narrow<bfloat16>(from[i]);
}

STEEPEST_CLONES void store_float16(const float *__restrict from, float16 *__restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = narrow<float16>(from[i]);
}

// A parameter that is restored as it was keeps its bits, also those of a signalling NaN.
template <class Rule>
__attribute__((always_inline)) inline float multiplied(float g, float factor) {
  return std::is_same_v<Rule, Restore> && factor == 1.0f ? g : g * factor;
}

constexpr int64_t kChunk = 64;  // elements

template <class T>
__attribute__((always_inline)) inline void prefetch_chunk(const T *from, int64_t ahead) {
  for (int64_t line = 0; line < static_cast<int64_t>(kChunk * sizeof(T)); line += 64)
    __builtin_prefetch(reinterpret_cast<const char *>(from) + ahead + line);
}

template <int kStates, class T>
__attribute__((always_inline)) inline void prefetch_chunks(int64_t ahead, int64_t at, const T *p, const T *g,
                                                           const T *s0, const T *s1, const T *s2) {
  prefetch_chunk(p + at, ahead), prefetch_chunk(g + at, ahead);
  if constexpr (kStates > 0) prefetch_chunk(s0 + at, ahead);
  if constexpr (kStates > 1) prefetch_chunk(s1 + at, ahead);
  if constexpr (kStates > 2) prefetch_chunk(s2 + at, ahead);
}

// An element's way through a rule, over float32 tiles or over another type, converted in registers.  `from` may be p.
template <class Rule, class T>
__attribute__((always_inline)) inline void rule_loop(const T *from, T *p, const T *__restrict g, T *const *states,
                                                     int64_t n, typename Rule::Scalars s, float factor,
                                                     int64_t ahead = kNear) {
  constexpr int kStates = Rule::kStates;
  T *__restrict s0 = kStates > 0 ? states[0] : nullptr;
  T *__restrict s1 = kStates > 1 ? states[1] : nullptr;
  T *__restrict s2 = kStates > 2 ? states[2] : nullptr;
  for (int64_t c = 0; c < n; c += kChunk) {
    const int64_t end = c + kChunk < n ? c + kChunk : n;
    prefetch_chunks<kStates>(ahead, c, from, g, s0, s1, s2);
#pragma GCC ivdep
    for (int64_t i = c; i < end; ++i) {
      float pi = widen(from[i]), gi = multiplied<Rule>(widen(g[i]), factor), state[3] = {};
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
}

// Two neighbours in one 32-bit lane: widening is a shift for one and a mask for the other, and nothing is shuffled.
// (AdamW in cache, AVX-512: 0.49 ns per element, 0.54 with lanes of one element, which are packed and unpacked.)
typedef uint32_t __attribute__((may_alias, aligned(2))) bfloat16_pair;
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first of two neighbours is taken for the lower half");

__attribute__((always_inline)) inline void widen_pair(bfloat16_pair x, float &low, float &high) {
  low = bits_float(x << 16), high = bits_float(x & 0xffff0000u);
}

__attribute__((always_inline)) inline bfloat16_pair narrow_pair(float low, float high) {
  return (narrow_bits(low) >> 16) | (narrow_bits(high) & 0xffff0000u);
}

template <class Rule>
__attribute__((always_inline)) inline void pair_loop(bfloat16_pair *__restrict p, const bfloat16_pair *__restrict g,
                                                     bfloat16_pair *__restrict s0, bfloat16_pair *__restrict s1,
                                                     bfloat16_pair *__restrict s2, int64_t n,
                                                     typename Rule::Scalars s, float factor) {
  constexpr int kStates = Rule::kStates;
  for (int64_t c = 0; c < n; c += kChunk) {
    const int64_t end = c + kChunk < n ? c + kChunk : n;
    prefetch_chunks<kStates>(kNear, c, p, g, s0, s1, s2);
#pragma GCC ivdep
    for (int64_t i = c; i < end; ++i) {
      float pl, ph, gl, gh, low[3] = {}, high[3] = {};
      widen_pair(p[i], pl, ph);
      widen_pair(g[i], gl, gh);
      if constexpr (kStates > 0) widen_pair(s0[i], low[0], high[0]);
      if constexpr (kStates > 1) widen_pair(s1[i], low[1], high[1]);
      if constexpr (kStates > 2) widen_pair(s2[i], low[2], high[2]);
      gl = multiplied<Rule>(gl, factor), gh = multiplied<Rule>(gh, factor);
      decay(pl, gl, s.shrink);
      decay(ph, gh, s.shrink);
      Rule::step(pl, gl, low, s);
      Rule::step(ph, gh, high, s);
      p[i] = narrow_pair(pl, ph);
      if constexpr (kStates > 0) s0[i] = narrow_pair(low[0], high[0]);
      if constexpr (kStates > 1) s1[i] = narrow_pair(low[1], high[1]);
      if constexpr (kStates > 2) s2[i] = narrow_pair(low[2], high[2]);
    }
  }
}

template <class Rule>
__attribute__((always_inline)) inline void bfloat16_loop(bfloat16 *p, const bfloat16 *g, bfloat16 *const *states,
                                                         int64_t n, typename Rule::Scalars s, float factor) {
  constexpr int kStates = Rule::kStates;
  const auto pairs = [](const bfloat16 *x) { return reinterpret_cast<bfloat16_pair *>(const_cast<bfloat16 *>(x)); };
  bfloat16_pair *k[3] = {};
  bfloat16 *rest[3] = {};
  for (int i = 0; i < kStates; ++i) k[i] = pairs(states[i]), rest[i] = states[i] + n / 2 * 2;
  if (s.shrink.l2 == 0.0f) {
    s.shrink.l2 = 0.0f;  // known to the compiler
    pair_loop<Rule>(pairs(p), pairs(g), k[0], k[1], k[2], n / 2, s, factor);
  } else {
    pair_loop<Rule>(pairs(p), pairs(g), k[0], k[1], k[2], n / 2, s, factor);
  }
  rule_loop<Rule>(p + n / 2 * 2, p + n / 2 * 2, g + n / 2 * 2, rest, n % 2, s, factor);
}

#if STEEPEST_HAS_F16C
// Eight elements at a time through arrays that the compiler keeps in registers.  (AdamW in cache on a Zen 4: 0.50 ns per
// element, 0.38 with AVX-512's sixteen, 0.70 by way of float32 tiles; two threads are held up by memory at 0.3.)
template <class Rule>
__attribute__((target("arch=x86-64-v3"))) void float16_loop(float16 *p, const float16 *g, float16 *const *states,
                                                            int64_t n, typename Rule::Scalars s, float factor) {
  constexpr int kStates = Rule::kStates, kLanes = 8;
  const auto read = [](const float16 *from, float *to) __attribute__((target("arch=x86-64-v3"), always_inline)) {
    _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from))));
  };
  const auto write = [](const float *from, float16 *to) __attribute__((target("arch=x86-64-v3"), always_inline)) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    float pi[kLanes], gi[kLanes], k0[kLanes] = {}, k1[kLanes] = {}, k2[kLanes] = {};
    read(p + i, pi), read(g + i, gi);
    if constexpr (kStates > 0) read(states[0] + i, k0);
    if constexpr (kStates > 1) read(states[1] + i, k1);
    if constexpr (kStates > 2) read(states[2] + i, k2);
#pragma GCC ivdep
    for (int j = 0; j < kLanes; ++j) {
      float state[3] = {k0[j], k1[j], k2[j]};
      gi[j] = multiplied<Rule>(gi[j], factor);
      decay(pi[j], gi[j], s.shrink);
      Rule::step(pi[j], gi[j], state, s);
      k0[j] = state[0], k1[j] = state[1], k2[j] = state[2];
    }
    write(pi, p + i);
    if constexpr (kStates > 0) write(k0, states[0] + i);
    if constexpr (kStates > 1) write(k1, states[1] + i);
    if constexpr (kStates > 2) write(k2, states[2] + i);
  }
  float16 *rest[3] = {};
  for (int k = 0; k < kStates; ++k) rest[k] = states[k] + i;
  rule_loop<Rule>(p + i, p + i, g + i, rest, n - i, s, factor);
}
#else
template <class Rule>
void float16_loop(float16 *p, const float16 *g, float16 *const *states, int64_t n, typename Rule::Scalars s,
                  float factor) {
  rule_loop<Rule>(p, p, g, states, n, s, factor);
}
#endif

// Clones cannot be templates, so each rule's are spelled by a macro.
#define STEEPEST_RULE_LOOPS(name, ...)                                                                            \
  STEEPEST_CLONES void name##_float32(const float *from, float *p, const float *g, float *const *states,          \
                                      int64_t n, const __VA_ARGS__::Scalars &s, float factor, int64_t ahead) {    \
    rule_loop<__VA_ARGS__>(from, p, g, states, n, s, factor, ahead);                                              \
  }                                                                                                               \
  STEEPEST_CLONES void name##_bfloat16(bfloat16 *p, const bfloat16 *g, bfloat16 *const *states, int64_t n,        \
                                       const __VA_ARGS__::Scalars &s, float factor) {                             \
    bfloat16_loop<__VA_ARGS__>(p, g, states, n, s, factor);                                                       \
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

}  // namespace

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
                              const __VA_ARGS__::Scalars &s, float factor, int64_t ahead) {                        \
    name##_float32(from, p, g, states, n, s, factor, ahead);                                                       \
  }                                                                                                                \
  template <>                                                                                                      \
  void rule_bfloat16<__VA_ARGS__>(bfloat16 *p, const bfloat16 *g, bfloat16 *const *states, int64_t n,              \
                                  const __VA_ARGS__::Scalars &s, float factor) {                                   \
    name##_bfloat16(p, g, states, n, s, factor);                                                                   \
  }                                                                                                                \
  template <>                                                                                                      \
  void rule_float16<__VA_ARGS__>(float16 *p, const float16 *g, float16 *const *states, int64_t n,                  \
                                 const __VA_ARGS__::Scalars &s, float factor) {                                    \
    float16_loop<__VA_ARGS__>(p, g, states, n, s, factor);                                                         \
  }
STEEPEST_FOR_EACH_RULE(STEEPEST_RULE_TILES)

bool float16_in_registers() {
#if STEEPEST_HAS_F16C
  return has_v3() && has_f16c();
#else
  return false;
#endif
}

bool has_v4() {
#if STEEPEST_HAS_CLONES
  static const bool found =
      (__builtin_cpu_init(), __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                                 __builtin_cpu_supports("avx512vl"));
  return found;
#else
  return false;
#endif
}

const char *clone_name() {
#if STEEPEST_HAS_CLONES
  if (has_v4()) return "x86-64-v4";
  if (has_v3()) return "x86-64-v3";
#endif
  return "default";
}

}  // namespace steepest::cpu
