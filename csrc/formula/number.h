// Number formats shared by every kernel: float32 in registers, 16-bit formats in memory.
// On the host conversions are integer arithmetic and plain float additions, so that all SIMD clones agree bit for bit
// and nothing depends on a flush-to-zero setting.  On a GPU they are one instruction each with the same results, a NaN
// becoming the canonical one: the integer form would need 138 instructions per float16 element of AdamW, against 51,
// and make it compute-bound.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define STEEPEST_HD __host__ __device__ __forceinline__
#else
#define STEEPEST_HD __attribute__((always_inline)) inline
#endif

namespace steepest {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

STEEPEST_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

STEEPEST_HD float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

STEEPEST_HD float widen(float x) { return x; }

STEEPEST_HD float widen(bfloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

STEEPEST_HD float widen(float16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu);
  const uint32_t normal = (rest << 13) + (112u << 23);               // exponent bias 127 - 15
  const uint32_t special = (rest << 13) | 0x7f800000u;               // inf, NaN
  // Subnormals: 2^-14 * (1 + f) - 2^-14, both normal floats, is exact.
  const uint32_t small = float_bits(bits_float((rest << 13) + (113u << 23)) - bits_float(113u << 23));
  const uint32_t magnitude = rest >= 0x7c00u ? special : (rest < 0x0400u ? small : normal);
  return bits_float(sign | magnitude);
#endif
}

template <class T>
STEEPEST_HD T narrow(float x);

template <>
STEEPEST_HD float narrow<float>(float x) {
  return x;
}

// The bits of x rounded to a bfloat16 in the upper half, and anything in the lower: to nearest, ties to even; a NaN stays
// a NaN (a payload that fits in the low half must not become inf).
STEEPEST_HD uint32_t narrow_bits(float x) {
  const uint32_t u = float_bits(x);
  return x != x ? u | 0x00400000u : u + ((u >> 16) & 1u) + 0x7fffu;
}

template <>
STEEPEST_HD bfloat16 narrow<bfloat16>(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t b;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b) : "f"(x));
  return bfloat16{b};
#else
  return bfloat16{static_cast<uint16_t>(narrow_bits(x) >> 16)};
#endif
}

template <>
STEEPEST_HD float16 narrow<float16>(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t b;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(b) : "f"(x));
  return float16{b};
#else
  const uint32_t u = float_bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t rest = u & 0x7fffffffu;
  const uint32_t normal = (rest - (112u << 23) + 0x0fffu + ((rest >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 puts the last place of the sum at 2^-24, float16's subnormal unit.
  const uint32_t small = float_bits(bits_float(rest) + 0.5f) - float_bits(0.5f);
  const uint32_t special = rest > 0x7f800000u ? (0x7e00u | ((rest >> 13) & 0x03ffu)) : 0x7c00u;
  // 65520 = 0x477ff000 and above round to inf.
  const uint32_t magnitude = rest >= 0x477ff000u ? special : (rest < (113u << 23) ? small : normal);
  return float16{static_cast<uint16_t>(sign | magnitude)};
#endif
}

}  // namespace steepest
