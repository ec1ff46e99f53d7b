// Random numbers that depend on a seed, a step and the number of an element alone: the same on the CPU, on a GPU, in any
// split over threads, launches or ranks, and with nothing to keep in a checkpoint.
#pragma once

#include <cmath>
#include <cstdint>

#include "formula/number.h"

namespace steepest {

struct RandomWords {
  uint32_t a, b;
};

// Philox-2x32-10 (Salmon, Moraes, Dror & Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"): passes BigCrush, and
// needs nothing but 32-bit multiplications, which vectorise.
constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxFactor = 0xd256d193u, kPhiloxStep = 0x9e3779b9u;

STEEPEST_HD RandomWords philox(uint32_t a, uint32_t b, uint32_t key) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product = static_cast<uint64_t>(a) * kPhiloxFactor;
    a = static_cast<uint32_t>(product >> 32) ^ key ^ b;
    b = static_cast<uint32_t>(product);
    key += kPhiloxStep;
  }
  return {a, b};
}

// What the words of one step are drawn for; each purpose has a stream of its own.
enum RandomPurpose : uint32_t { kForRounding = 1, kForNoise = 2 };

// The words of one step.  The counter holds 40 bits of the element's number and 24 of the step; what is left of the step
// goes into the key.
struct RandomStream {
  uint32_t key, step;
  STEEPEST_HD RandomWords operator()(uint64_t index) const {
    return (*this)(static_cast<uint32_t>(index >> 32), static_cast<uint32_t>(index));
  }
  STEEPEST_HD RandomWords operator()(uint32_t index_high, uint32_t index_low) const {
    return philox(index_low, second_word(index_high), key);
  }
  STEEPEST_HD uint32_t second_word(uint32_t index_high) const { return (index_high & 0xffu) | step << 8; }
};

STEEPEST_HD RandomStream random_stream(uint64_t seed, int64_t step, RandomPurpose purpose) {
  // Every bit of the seed reaches the key (the finaliser of splitmix64, Steele et al. 2014).
  uint64_t x = seed + 0x9e3779b97f4a7c15u * ((static_cast<uint64_t>(step) >> 24) * 4 + purpose);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return {static_cast<uint32_t>(x >> 32), static_cast<uint32_t>(step) & 0xffffffu};
}

// log(x) for x in [2^-126, 1].  x = 2^e m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s) with s = (m - 1) / (m + 1),
// |s| < 0.172, by its series up to s^9: the first term left out is 6e-10.
STEEPEST_HD float log_of(float x) {
  const uint32_t u = float_bits(x) - 0x3f3504f3u;  // bits of sqrt(1/2)
  const float e = static_cast<float>(static_cast<int32_t>(u) >> 23);
  const float m = bits_float((u & 0x007fffffu) + 0x3f3504f3u);
  const float s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
  const float series = 2.0f + s2 * (0.6666666865f + s2 * (0.4000000060f + s2 * (0.2857142985f + s2 * 0.2222222239f)));
  return e * 0.6931471825f + s * series;
}

// Standard normal from a word: sqrt(2) erfinv(x) for x = (2 k + 1 - 2^23) / 2^23, k the word's upper 23 bits, with
// erfinv in single precision after Giles 2010, "Approximating the erfinv function".  |result| <= 5.4; its error, some
// 1e-6, is far below what 2^23 values resolve.
STEEPEST_HD float normal(uint32_t word) {
  const int32_t k = static_cast<int32_t>(word >> 9);
  const float x = static_cast<float>(2 * k + 1 - (1 << 23)) * 1.1920928955078125e-7f;
  const float w = -log_of((1.0f - x) * (1.0f + x));
  const float c = w - 2.5f;
  float centre = 2.81022636e-08f;
  centre = centre * c + 3.43273939e-07f;
  centre = centre * c + -3.5233877e-06f;
  centre = centre * c + -4.39150654e-06f;
  centre = centre * c + 0.00021858087f;
  centre = centre * c + -0.00125372503f;
  centre = centre * c + -0.00417768164f;
  centre = centre * c + 0.246640727f;
  centre = centre * c + 1.50140941f;
  const float t = sqrtf(w > 0.0f ? w : 0.0f) - 3.0f;
  float tail = -0.000200214257f;
  tail = tail * t + 0.000100950558f;
  tail = tail * t + 0.00134934322f;
  tail = tail * t + -0.00367342844f;
  tail = tail * t + 0.00573950773f;
  tail = tail * t + -0.0076224613f;
  tail = tail * t + 0.00943887047f;
  tail = tail * t + 1.00167406f;
  tail = tail * t + 2.83297682f;
  return 1.4142135624f * ((w < 5.0f ? centre : tail) * x);
}

}  // namespace steepest
