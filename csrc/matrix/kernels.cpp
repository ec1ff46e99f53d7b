// The instruction sets.  This file alone is compiled with contraction on (CMakeLists.txt): a product's sum is meant to
// be fused, and its error bound does not ask for one order of roundings as the elementwise rules do.
#include "matrix/kernels.h"

// As in engine/stages.cpp: elsewhere than GCC on ELF x86-64, and under sanitizers, the default build is used.
#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define STEEPEST_HAS_CLONES 1
#else
#define STEEPEST_HAS_CLONES 0
#endif

namespace steepest::matrix {
namespace {

#if STEEPEST_HAS_CLONES
// 32 registers of 16 floats: 24 sums, 3 rows of b.  (Zen 4: 114 GFLOP/s a core; MKL's products 97 to 104.)
#define STEEPEST_ISA v4
#define STEEPEST_TARGET __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#define STEEPEST_BYTES 64
#define STEEPEST_ROWS 8
#include "matrix/kernels.inc"

// 16 registers of 8 floats: 12 sums, 3 rows of b, 1 element of a.
#define STEEPEST_ISA v3
#define STEEPEST_TARGET __attribute__((target("arch=x86-64-v3")))
#define STEEPEST_BYTES 32
#define STEEPEST_ROWS 4
#include "matrix/kernels.inc"
#endif

#define STEEPEST_ISA base
#define STEEPEST_TARGET
#define STEEPEST_BYTES 16
#define STEEPEST_ROWS 4
#include "matrix/kernels.inc"

enum class Isa { base, v3, v4 };

Isa best() {
#if STEEPEST_HAS_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::v4;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return Isa::v3;
#endif
  return Isa::base;
}

Isa isa() {
  static const Isa found = best();
  return found;
}

}  // namespace

template <class T>
const Kernels<T> &kernels() {
#if STEEPEST_HAS_CLONES
  if (isa() == Isa::v4) return v4::kSet<T>;
  if (isa() == Isa::v3) return v3::kSet<T>;
#endif
  return base::kSet<T>;
}

template const Kernels<float> &kernels<float>();
template const Kernels<double> &kernels<double>();

const char *clone_name() {
  switch (isa()) {
    case Isa::v4: return "x86-64-v4";
    case Isa::v3: return "x86-64-v3";
    default: return "default";
  }
}

}  // namespace steepest::matrix
