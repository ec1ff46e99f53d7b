// How a float32 result may be kept in less memory: rounded stochastically, split over a bfloat16 and correction bits, or as
// eight bits that share an exponent with their block.
#pragma once

#include "formula/number.h"

namespace steepest {

// --- stochastic rounding -----------------------------------------------------------------------------------------------
// To one of the two neighbours, the nearer the likelier, so that the expectation is x: what the low 16 bits say becomes
// the probability of a carry.  Finite x stay on their side of inf unless they lie beyond the largest bfloat16.
STEEPEST_HD bfloat16 narrow_stochastic(float x, uint32_t random16) {
  const uint32_t u = float_bits(x);
  const uint32_t rounded = (u + (random16 & 0xffffu)) >> 16;
  const bool finite = (u & 0x7f800000u) != 0x7f800000u;
  const uint32_t special = (u >> 16) | ((u & 0x007fffffu) != 0 ? 0x0040u : 0u);  // inf; a NaN stays one
  return bfloat16{static_cast<uint16_t>(finite ? rounded : special)};
}

// --- bfloat16 with correction bits -------------------------------------------------------------------------------------
// The bits of a float32 as a number, less those of its bfloat16, rounded to nearest (halves up, so that the difference
// always fits): 16 bits keep all of the float32, 8 bits its upper 24, i.e. 16 of 24 bits of significand.
STEEPEST_HD float join_residual(bfloat16 high, int32_t residual, int bits) {
  // split_residual never leaves less than zero; a parameter that somebody has zeroed must not become NaN.
  if (residual < 0 && (high.bits & 0x7fffu) == 0) residual = 0;
  return bits_float((static_cast<uint32_t>(high.bits) << 16) + (static_cast<uint32_t>(residual) << (16 - bits)));
}

// `residual` gets the correction, in [-2^(bits-1), 2^(bits-1)).
STEEPEST_HD bfloat16 split_residual(float x, int bits, int32_t &residual) {
  uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) u = 0x7fc00000u;  // adding to another NaN's bits could wrap
  const int dropped = 16 - bits;
  const uint32_t kept = dropped > 0 ? (u + (1u << (dropped - 1))) >> dropped : u;
  const uint32_t high = (kept + (1u << (bits - 1))) >> bits;
  residual = static_cast<int32_t>(kept - (high << bits));
  return bfloat16{static_cast<uint16_t>(high)};
}

// --- 8-bit blocks ------------------------------------------------------------------------------------------------------
// 128 consecutive elements share the biased exponent E of the largest magnitude (a byte, as in the OCP microscaling
// formats: it spans all of float32, so no scale can over- or underflow).  An element is 8 bits of floating point below it:
//   signed     sign, 4 bits of exponent, 3 of significand: 16 octaves;   code c > 0 is 2^(E-142) * (1 + c%8/8) * 2^(c/8)
//   magnitude  5 bits of exponent, 3 of significand: 32 octaves;         code c > 0 is 2^(E-158) * (1 + c%8/8) * 2^(c/8)
// and code 0 is zero.  Neighbouring codes are 6 to 12 % apart, so rounding is stochastic: to nearest, a second moment that
// decays by 0.1 % per step would never move.  Signed values below the smallest code become it or 0; magnitudes become it,
// for a second moment of 0 under a first that is not would blow the step up.  A NaN or inf makes its block NaN.
constexpr int64_t kBlock8 = 128;
constexpr uint32_t kBlock8NotFinite = 255;

// E from the bits of the largest magnitude: half a code more, so that the largest element's code cannot overflow.
STEEPEST_HD uint32_t block8_exponent(uint32_t largest_bits, bool is_signed) {
  if (largest_bits >= 0x7f800000u) return kBlock8NotFinite;
  const uint32_t exponent = (largest_bits + 0x000fffffu) >> 23;
  const uint32_t lowest = is_signed ? 17u : 33u;  // the smallest code must be a normal number
  // 255 stands for NaN: the topmost binade, which only values above 1.9e38 round up to, saturates instead.
  return exponent < lowest ? lowest : (exponent > 254u ? 254u : exponent);
}

STEEPEST_HD uint32_t block8_base(uint32_t exponent, bool is_signed) {
  return (exponent - (is_signed ? 15u : 31u)) << 23;
}

// Decodes 7 or 8 bits of magnitude.
STEEPEST_HD float block8_value(uint32_t code, uint32_t base) {
  return bits_float(code == 0 ? 0u : (code << 20) + base);
}

STEEPEST_HD float block8_signed(uint32_t code, uint32_t exponent) {
  const float magnitude = block8_value(code & 0x7fu, block8_base(exponent, true));
  const uint32_t sign = (code & 0x80u) << 24;
  return bits_float(exponent == kBlock8NotFinite ? 0x7fc00000u : float_bits(magnitude) | sign);
}

STEEPEST_HD float block8_magnitude(uint32_t code, uint32_t exponent) {
  return exponent == kBlock8NotFinite ? bits_float(0x7fc00000u) : block8_value(code, block8_base(exponent, false));
}

// The code of magnitude `u` (bits) between two codes of `top` + 1; the 20 bits that a code drops against 16 random ones.
STEEPEST_HD uint32_t block8_round(uint32_t u, uint32_t base, uint32_t random16, uint32_t top) {
  const uint32_t code = (u - base + ((random16 & 0xffffu) << 4) + 8u) >> 20;
  return code > top ? top : code;
}

STEEPEST_HD uint8_t block8_encode_signed(float x, uint32_t exponent, uint32_t random16) {
  const uint32_t bits = float_bits(x), u = bits & 0x7fffffffu, base = block8_base(exponent, true);
  const uint32_t smallest = (1u << 20) + base;
  // Below the smallest code: it, with probability x / smallest, else 0.
  const float share = static_cast<float>(random16 & 0xffffu) * 1.52587890625e-5f;  // in [0, 1)
  const uint32_t low = bits_float(u) > share * bits_float(smallest) ? 1u : 0u;
  const uint32_t code = u < smallest ? low : block8_round(u, base, random16, 0x7fu);
  return static_cast<uint8_t>(exponent == kBlock8NotFinite ? 0u : code | ((bits >> 24) & 0x80u));
}

STEEPEST_HD uint8_t block8_encode_magnitude(float x, uint32_t exponent, uint32_t random16) {
  const uint32_t u = float_bits(x) & 0x7fffffffu, base = block8_base(exponent, false);
  const uint32_t smallest = (1u << 20) + base;
  const uint32_t low = u > 0u ? 1u : 0u;
  const uint32_t code = u < smallest ? low : block8_round(u, base, random16, 0xffu);
  return static_cast<uint8_t>(exponent == kBlock8NotFinite ? 0u : code);
}

}  // namespace steepest
