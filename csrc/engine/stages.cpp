#include "engine/stages.h"

#include "engine/engine.h"

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
  if (dtype == STEEPEST_BFLOAT16)
    load_bfloat16(static_cast<const bfloat16 *>(from), to, n);
  else
    load_float16(static_cast<const float16 *>(from), to, n);
}

void store(int32_t dtype, const float *from, void *to, int64_t n) {
  if (dtype == STEEPEST_BFLOAT16)
    store_bfloat16(from, static_cast<bfloat16 *>(to), n);
  else
    store_float16(from, static_cast<float16 *>(to), n);
}

// Negation commutes with rounding: dividing by -scale is dividing by scale and negating.
void scale_gradient(const float *g, float *out, int64_t n, float scale, bool negate) {
  divide(g, out, n, negate ? -scale : scale);
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
