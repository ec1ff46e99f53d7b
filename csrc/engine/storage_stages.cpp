// CPU stages that few steps need: random numbers, averages, and storage other than one number per element.
#include <algorithm>

#include "engine/clones.h"
#include "engine/stages.h"
#include "formula/storage.h"

#ifndef STEEPEST_HAS_AVX2  // 0: tests of what runs elsewhere
#if defined(__x86_64__) && defined(__GNUC__)
#define STEEPEST_HAS_AVX2 1
#else
#define STEEPEST_HAS_AVX2 0
#endif
#endif
#if STEEPEST_HAS_AVX2
#include <immintrin.h>
#endif

namespace steepest::cpu {
namespace {

// Words of elements whose numbers have the same upper 32 bits.
STEEPEST_CLONES void random_loop(RandomStream stream, uint32_t high, uint32_t low, int64_t n, uint32_t *__restrict a,
                                 uint32_t *__restrict b) {
  for (int64_t i = 0; i < n; ++i) {
    const RandomWords words = stream(high, low + static_cast<uint32_t>(i));
    a[i] = words.a;
    b[i] = words.b;
  }
}

#if STEEPEST_HAS_AVX2
// The same with intrinsics: compilers multiply 64 by 64 bits, and shuffle in between.  Here even and odd elements have
// lanes of 64 bits each, of which the multiplication reads the lower halves; what is in the upper ones does not matter.
// (Zen 4: 1.2 ns per element against 2.1.)
__attribute__((target("arch=x86-64-v3"))) void random_avx2(RandomStream stream, uint32_t high, uint32_t low, int64_t n,
                                                           uint32_t *a, uint32_t *b) {
  const __m256i factor = _mm256_set1_epi64x(kPhiloxFactor);
  const auto interleave = [](uint32_t *to, const __m256i &even,
                             const __m256i &odd) __attribute__((target("arch=x86-64-v3"), always_inline)) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
  };
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i first = _mm256_set1_epi64x(low + i), second = _mm256_set1_epi64x(stream.second_word(high));
    __m256i even = _mm256_add_epi64(first, _mm256_set_epi64x(6, 4, 2, 0)), even_b = second;
    __m256i odd = _mm256_add_epi64(first, _mm256_set_epi64x(7, 5, 3, 1)), odd_b = second;
    uint32_t key = stream.key;
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round, key += kPhiloxStep) {
      const __m256i keys = _mm256_set1_epi64x(key);
      const __m256i product = _mm256_mul_epu32(even, factor), odd_product = _mm256_mul_epu32(odd, factor);
      even = _mm256_xor_si256(_mm256_srli_epi64(product, 32), _mm256_xor_si256(keys, even_b)), even_b = product;
      odd = _mm256_xor_si256(_mm256_srli_epi64(odd_product, 32), _mm256_xor_si256(keys, odd_b)), odd_b = odd_product;
    }
    interleave(a + i, even, odd);
    interleave(b + i, even_b, odd_b);
  }
  random_loop(stream, high, low + static_cast<uint32_t>(i), n - i, a + i, b + i);
}
#endif

STEEPEST_CLONES void noise_loop(const float *g, float *out, int64_t n, const uint32_t *words, float deviation) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = g[i] + deviation * normal(words[i]);
}

STEEPEST_CLONES void average_loop(float *__restrict average, const float *__restrict p, int64_t n, float weight,
                                  float rest) {
  for (int64_t i = 0; i < n; ++i) average[i] = lerp(average[i], p[i], weight, rest);
}

STEEPEST_CLONES void stochastic_loop(const float *__restrict from, bfloat16 *__restrict to, int64_t n,
                                     const uint32_t *__restrict random, int shift) {
  for (int64_t i = 0; i < n; ++i) to[i] = narrow_stochastic(from[i], random[i] >> shift);
}

template <class Residual>
__attribute__((always_inline)) inline void join_loop(const bfloat16 *__restrict high, const Residual *__restrict residual,
                                                     float *__restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = join_residual(high[i], residual[i], 8 * sizeof(Residual));
}

template <class Residual>
__attribute__((always_inline)) inline void split_loop(const float *__restrict from, bfloat16 *__restrict high,
                                                      Residual *__restrict residual, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    int32_t rest;
    high[i] = split_residual(from[i], 8 * sizeof(Residual), rest);
    residual[i] = static_cast<Residual>(rest);
  }
}

STEEPEST_CLONES void join16(const bfloat16 *high, const int16_t *residual, float *to, int64_t n) {
  join_loop(high, residual, to, n);
}
STEEPEST_CLONES void join8(const bfloat16 *high, const int8_t *residual, float *to, int64_t n) {
  join_loop(high, residual, to, n);
}
STEEPEST_CLONES void split16(const float *from, bfloat16 *high, int16_t *residual, int64_t n) {
  split_loop(from, high, residual, n);
}
STEEPEST_CLONES void split8(const float *from, bfloat16 *high, int8_t *residual, int64_t n) {
  split_loop(from, high, residual, n);
}

STEEPEST_CLONES void decode_signed(const uint8_t *__restrict codes, uint32_t exponent, float *__restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = block8_signed(codes[i], exponent);
}
STEEPEST_CLONES void decode_magnitude(const uint8_t *__restrict codes, uint32_t exponent, float *__restrict to,
                                      int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = block8_magnitude(codes[i], exponent);
}

STEEPEST_CLONES uint32_t largest_of(const float *from, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, float_bits(from[i]) & 0x7fffffffu);
  return largest;
}

STEEPEST_CLONES void encode_signed(const float *__restrict from, uint32_t exponent, uint8_t *__restrict codes, int64_t n,
                                   const uint32_t *__restrict random, int shift) {
  for (int64_t i = 0; i < n; ++i) codes[i] = block8_encode_signed(from[i], exponent, random[i] >> shift);
}
STEEPEST_CLONES void encode_magnitude(const float *__restrict from, uint32_t exponent, uint8_t *__restrict codes,
                                      int64_t n, const uint32_t *__restrict random, int shift) {
  for (int64_t i = 0; i < n; ++i) codes[i] = block8_encode_magnitude(from[i], exponent, random[i] >> shift);
}

void random_run(const RandomStream &stream, uint32_t high, uint32_t low, int64_t n, uint32_t *a, uint32_t *b) {
#if STEEPEST_HAS_AVX2
  static const bool has_v3 = (__builtin_cpu_init(), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                                        __builtin_cpu_supports("bmi2"));
  if (has_v3) return random_avx2(stream, high, low, n, a, b);
#endif
  random_loop(stream, high, low, n, a, b);
}

}  // namespace

void random_tile(const RandomStream &stream, uint64_t index, int64_t n, uint32_t *a, uint32_t *b) {
  while (n > 0) {
    const uint32_t low = static_cast<uint32_t>(index);
    const int64_t count = std::min(n, (int64_t{1} << 32) - low);
    random_run(stream, static_cast<uint32_t>(index >> 32), low, count, a, b);
    index += static_cast<uint64_t>(count), a += count, b += count, n -= count;
  }
}

void noise_tile(const float *g, float *out, int64_t n, const RandomStream &stream, uint64_t index, float deviation) {
  uint32_t words[2][kTile];
  random_tile(stream, index, n, words[0], words[1]);
  noise_loop(g, out, n, words[0], deviation);
}

void average_tile(float *average, const float *p, int64_t n, float weight, float rest) {
  average_loop(average, p, n, weight, rest);
}

void store_stochastic(const float *from, bfloat16 *to, int64_t n, const uint32_t *random, int shift) {
  stochastic_loop(from, to, n, random, shift);
}

void load_residual(const bfloat16 *high, const void *residual, int bits, float *to, int64_t n) {
  if (bits == 16) return join16(high, static_cast<const int16_t *>(residual), to, n);
  join8(high, static_cast<const int8_t *>(residual), to, n);
}

void store_residual(const float *from, bfloat16 *high, void *residual, int bits, int64_t n) {
  if (bits == 16) return split16(from, high, static_cast<int16_t *>(residual), n);
  split8(from, high, static_cast<int8_t *>(residual), n);
}

void load_block8(const uint8_t *codes, const uint8_t *exponents, bool magnitude, float *to, int64_t n) {
  for (int64_t at = 0; at < n; at += kBlock8) {
    const int64_t count = std::min(kBlock8, n - at);
    const uint32_t exponent = exponents[at / kBlock8];
    magnitude ? decode_magnitude(codes + at, exponent, to + at, count)
              : decode_signed(codes + at, exponent, to + at, count);
  }
}

void store_block8(const float *from, uint8_t *codes, uint8_t *exponents, bool magnitude, int64_t n,
                  const uint32_t *random, int shift) {
  for (int64_t at = 0; at < n; at += kBlock8) {
    const int64_t count = std::min(kBlock8, n - at);
    const uint32_t exponent = block8_exponent(largest_of(from + at, count), !magnitude);
    exponents[at / kBlock8] = static_cast<uint8_t>(exponent);
    magnitude ? encode_magnitude(from + at, exponent, codes + at, count, random + at, shift)
              : encode_signed(from + at, exponent, codes + at, count, random + at, shift);
  }
}

}  // namespace steepest::cpu
