// Sums over the elements of a block, in an order that does not depend on the width of the vectors: eight running sums in
// float64, element i to sum i % 8, added in order at the end.
#pragma once

#include <cmath>
#include <cstdint>

#include "formula/number.h"

namespace steepest {

constexpr int64_t kSurveyLanes = 8;

// What one read of some elements says about them.
struct SurveyPart {
  double power_sum;    // sum of |x / scale|^q
  uint32_t largest;    // bits of the largest |x|; NaN counts as larger than inf
};

struct PowerTwo {
  STEEPEST_HD double operator()(float x) const { return static_cast<double>(x) * static_cast<double>(x); }
};
struct PowerOne {
  STEEPEST_HD double operator()(float x) const { return std::fabs(static_cast<double>(x)); }
};
struct NoPower {
  STEEPEST_HD double operator()(float) const { return 0.0; }
};
// Relative to the largest element, so that no power overflows and none that counts underflows.
struct ScaledPower {
  double q, scale;
  STEEPEST_HD double operator()(float x) const {
    return scale > 0.0 ? std::pow(std::fabs(static_cast<double>(x)) / scale, q) : 0.0;
  }
};

}  // namespace steepest
