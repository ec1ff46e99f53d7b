// Sums over the elements of a block, in an order that does not depend on the width of the vectors: sixteen running sums in
// float64, element i to sum i % 16, added in order at the end.  The blocks' sums are added alike, in 256 running sums that
// end in a tree.
#pragma once

#include <cstdint>

#include "formula/number.h"

namespace steepest {

constexpr int64_t kSurveyLanes = 16;
constexpr int64_t kSurveyBlock = 8192;  // elements
constexpr int kSurveySums = 256;

// What one read of some elements says about them.
struct SurveyPart {
  double power_sum;    // sum of |x / scale|^q
  uint32_t largest;    // bits of the largest |x|; NaN counts as larger than inf
};

STEEPEST_HD void add_part(SurveyPart &to, const SurveyPart &part) {
  to.power_sum = to.power_sum + part.power_sum;
  to.largest = part.largest > to.largest ? part.largest : to.largest;
}

// Running sum i of `count` blocks' parts: blocks i, i + 256, ...
STEEPEST_HD SurveyPart running_part(const SurveyPart *parts, int64_t count, int64_t i) {
  SurveyPart sum{0.0, 0};
  for (; i < count; i += kSurveySums) add_part(sum, parts[i]);
  return sum;
}

// All of `count` blocks' parts.
inline SurveyPart total_part(const SurveyPart *parts, int64_t count) {
  SurveyPart sums[kSurveySums];
  const int64_t used = count < kSurveySums ? count : kSurveySums;
  for (int64_t i = 0; i < used; ++i) sums[i] = running_part(parts, count, i);
  for (int64_t half = kSurveySums / 2; half > 0; half /= 2)
    for (int64_t i = 0; i + half < used && i < half; ++i) add_part(sums[i], sums[i + half]);
  return used > 0 ? sums[0] : SurveyPart{0.0, 0};
}

}  // namespace steepest
