// Sums over the elements of a block, in an order that does not depend on the width of the vectors: sixteen running sums in
// float64, element i to sum i % 16, added in order at the end.
#pragma once

#include <cstdint>

#include "formula/number.h"

namespace steepest {

constexpr int64_t kSurveyLanes = 16;

// What one read of some elements says about them.
struct SurveyPart {
  double power_sum;    // sum of |x / scale|^q
  uint32_t largest;    // bits of the largest |x|; NaN counts as larger than inf
};

}  // namespace steepest
