// CPU stages that few steps need: random numbers, averages, and storage other than one number per element.
#include <algorithm>

#include "engine/clones.h"
#include "engine/stages.h"
#include "formula/storage.h"

namespace steepest::cpu {
namespace {

STEEPEST_CLONES void random_loop(RandomStream stream, uint64_t index, int64_t n, uint32_t *__restrict a,
                                 uint32_t *__restrict b) {
  for (int64_t i = 0; i < n; ++i) {
    const RandomWords words = stream(index + static_cast<uint64_t>(i));
    a[i] = words.a;
    b[i] = words.b;
  }
}

STEEPEST_CLONES void noise_loop(const float *g, float *out, int64_t n, RandomStream stream, uint64_t index,
                                float deviation) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i)
    out[i] = g[i] + deviation * normal(stream(index + static_cast<uint64_t>(i)).a);
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

}  // namespace

void random_tile(const RandomStream &stream, uint64_t index, int64_t n, uint32_t *a, uint32_t *b) {
  random_loop(stream, index, n, a, b);
}

void noise_tile(const float *g, float *out, int64_t n, const RandomStream &stream, uint64_t index, float deviation) {
  noise_loop(g, out, n, stream, index, deviation);
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
