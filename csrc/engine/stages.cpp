#include "engine/stages.h"

#include "engine/engine.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define STEEPEST_HAS_F16C 1
#else
#define STEEPEST_HAS_F16C 0
#endif

// One clone per x86-64 level, chosen at load time.  v3 is AVX2, v4 AVX-512; contraction is off (see CMakeLists.txt), so
// all clones round alike.  Elsewhere than GCC on ELF x86-64 the default build is used.
#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define STEEPEST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define STEEPEST_HAS_CLONES 1
#else
#define STEEPEST_CLONES
#define STEEPEST_HAS_CLONES 0
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

STEEPEST_CLONES void adamw_plain(float *__restrict p, const float *__restrict g, float *__restrict m,
                                 float *__restrict v, int64_t n, AdamWScalars s) {
  for (int64_t i = 0; i < n; ++i) adamw(p[i], g[i], m[i], v[i], nullptr, s);
}

STEEPEST_CLONES void adamw_16bit(bfloat16 *__restrict p, const bfloat16 *__restrict g, bfloat16 *__restrict m,
                                 bfloat16 *__restrict v, int64_t n, AdamWScalars s) {
  for (int64_t i = 0; i < n; ++i) {
    float pi = widen(p[i]), mi = widen(m[i]), vi = widen(v[i]);
    adamw(pi, widen(g[i]), mi, vi, nullptr, s);
    p[i] = narrow<bfloat16>(pi);
    m[i] = narrow<bfloat16>(mi);
    v[i] = narrow<bfloat16>(vi);
  }
}

STEEPEST_CLONES void adamw_amsgrad(float *__restrict p, const float *__restrict g, float *__restrict m,
                                   float *__restrict v, float *__restrict vmax, int64_t n, AdamWScalars s) {
  for (int64_t i = 0; i < n; ++i) adamw(p[i], g[i], m[i], v[i], &vmax[i], s);
}

STEEPEST_CLONES void divide(const float *g, float *out, int64_t n, float scale) {
  // `out` may be `g` itself: element i depends on element i alone.
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = g[i] / scale;
}

}  // namespace

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

// Negation commutes with rounding: dividing by -scale is dividing by scale and negating.
void scale_gradient(const float *g, float *out, int64_t n, float scale, bool negate) {
  divide(g, out, n, negate ? -scale : scale);
}

void adamw_bfloat16(void *p, const void *g, void *m, void *v, int64_t n, const AdamWScalars &s) {
  adamw_16bit(static_cast<bfloat16 *>(p), static_cast<const bfloat16 *>(g), static_cast<bfloat16 *>(m),
              static_cast<bfloat16 *>(v), n, s);
}

void adamw_tile(float *p, const float *g, float *m, float *v, float *vmax, int64_t n, const AdamWScalars &s) {
  if (vmax == nullptr)
    adamw_plain(p, g, m, v, n, s);
  else
    adamw_amsgrad(p, g, m, v, vmax, n, s);
}

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
