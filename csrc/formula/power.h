// x^a for x in [0, 1] and a > 0, from additions, multiplications and divisions alone: the same bits from every compiler,
// SIMD clone and GPU, and loops over it vectorise, which those over the C library's pow do not.
#pragma once

#include <cmath>

#include "formula/number.h"

namespace steepest {

STEEPEST_HD uint64_t double_bits(double x) {
  uint64_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

STEEPEST_HD double bits_double(uint64_t u) {
  double x;
  memcpy(&x, &u, sizeof x);
  return x;
}

// log2 of a normal number > 0, to about 2^-50 of max(|log2 x|, 1): x = 2^e m with m in [sqrt(1/2), sqrt(2)), and
// ln m = 2 atanh(s), s = (m - 1) / (m + 1), |s| <= 0.1716, by its series up to s^21 (the next term is below 2^-58).
STEEPEST_HD double log2_normal(double x) {
  constexpr uint64_t kRootHalf = 0x3fe6a09e667f3bcdull;  // bits of sqrt(1/2)
  // Counted from sqrt(1/2), the exponent field says which [sqrt(1/2), sqrt(2)) 2^e holds x; 2047 keeps it positive.
  const uint64_t shifted = double_bits(x) - kRootHalf + (2047ull << 52);
  const uint64_t field = shifted >> 52;
  const double m = bits_double((shifted & 0x000fffffffffffffull) + kRootHalf);
  const double e = bits_double(0x4330000000000000ull | field) - (4503599627370496.0 + 2047.0);
  const double s = (m - 1.0) / (m + 1.0), t = s * s;
  double series = 1.0 / 21.0;
  series = series * t + 1.0 / 19.0;
  series = series * t + 1.0 / 17.0;
  series = series * t + 1.0 / 15.0;
  series = series * t + 1.0 / 13.0;
  series = series * t + 1.0 / 11.0;
  series = series * t + 1.0 / 9.0;
  series = series * t + 1.0 / 7.0;
  series = series * t + 1.0 / 5.0;
  series = series * t + 1.0 / 3.0;
  series = series * t + 1.0;
  return e + 2.885390081777926814 * (s * series);  // 2 / ln 2
}

// 2^y for y <= 0, to about 2^-50 relative; 0 below 2^-1000.
STEEPEST_HD double exp2_negative(double y) {
  const double kept = y > -1000.0 ? y : -1000.0;
  const double shifted = kept + 6755399441055744.0;  // 1.5 * 2^52: the nearest integer sits in the low bits
  const double whole = shifted - 6755399441055744.0;
  const double z = (kept - whole) * 0.693147180559945309;  // |z| <= 0.3466: the Taylor series up to z^13
  double series = 1.0 / 6227020800.0;
  series = series * z + 1.0 / 479001600.0;
  series = series * z + 1.0 / 39916800.0;
  series = series * z + 1.0 / 3628800.0;
  series = series * z + 1.0 / 362880.0;
  series = series * z + 1.0 / 40320.0;
  series = series * z + 1.0 / 5040.0;
  series = series * z + 1.0 / 720.0;
  series = series * z + 1.0 / 120.0;
  series = series * z + 1.0 / 24.0;
  series = series * z + 1.0 / 6.0;
  series = series * z + 0.5;
  series = series * z + 1.0;
  series = series * z + 1.0;
  const uint64_t power = (double_bits(shifted) + 1023ull) << 52;  // the low 11 bits of `shifted` hold `whole`
  return y > -1000.0 ? series * bits_double(power) : 0.0;
}

// x^a for x in [0, 1] and a > 0, inf included: then 1 at 1 and 0 below.  Relative error at most 2^-48 (1 + a |log2 x|).
// NaN gives NaN.
STEEPEST_HD double power01(double x, double a) {
  const double exponent = a * log2_normal(x > 2.3e-308 ? x : 1.0);
  const double power = x < 1.0 ? exp2_negative(exponent) : 1.0;
  return x > 2.3e-308 ? power : x * 0.0;
}

// x^n for n >= 0 by repeated squaring: a product of the squares that n's bits name, exact for n <= 1.  Relative error at
// most n 2^-53, absolute for x in [0, 1) at most 2^-53 / (e |ln x|).  Of 1 - x^n that is at most 2^-53 / (1 - x), less than
// a fourth of a float's place for x up to 1 - 2^-26; beyond, with betas of 0.99999999, backends may round it differently.
STEEPEST_HD double whole_power(double x, int64_t n) {
  double power = 1.0;
  for (double square = x; n > 0; n >>= 1, square = square * square)
    if (n & 1) power = power * square;
  return power;
}

}  // namespace steepest
