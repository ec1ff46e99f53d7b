// What a measure makes of the total of a survey, on the host and on a device: norms and coefficients.
#pragma once

#include <cmath>

#include "formula/power.h"
#include "formula/survey.h"
#include "steepest/steepest.h"

namespace steepest {

// A sum relative to the largest element that counts how many are as large: |x / largest|^1e300 is 1 for them, else 0.
constexpr double kCountPower = 1e300;

// How a call is surveyed: q = 1, 2 and inf in one read, others relative to the largest element that a first read finds.
struct SurveyKind {
  double q;
  bool inner;        // the sum of products with the weights
  bool count;        // q = inf: also how many elements are the largest
  STEEPEST_HD bool maximum() const { return q > 1.7e308; }
  STEEPEST_HD bool relative() const { return maximum() ? count : !inner && q != 1.0 && q != 2.0; }
};

STEEPEST_HD bool finite_positive(float x) { return x > 0.0f && x <= 3.402823466e+38f; }

// The norm of order q from the sum, which is relative to the largest element where the kind says so.
STEEPEST_HD double norm_of(const SurveyKind &kind, const SurveyPart &total) {
  const float largest = bits_float(total.largest);
  if (kind.inner) return total.power_sum;
  if (kind.maximum() || !finite_positive(largest)) return static_cast<double>(largest);
  if (kind.q == 1.0) return total.power_sum;
  if (kind.q == 2.0) return sqrt(total.power_sum);
  // The sum is at least 1, its inverse a number that power01 takes.
  return static_cast<double>(largest) / power01(1.0 / total.power_sum, 1.0 / kind.q);
}

// What torch.nn.utils.clip_grad_norm_ multiplies gradients by, in its rounding order; NaN stays.
STEEPEST_HD float clip_coefficient(float norm, float max_norm) {
  const float coefficient = (1.0f / (norm + 1e-6f)) * max_norm;
  return coefficient > 1.0f ? 1.0f : coefficient;
}

// largest / norm; for q = inf 1 / how many elements are the largest.
STEEPEST_HD float steepness_of(const SurveyKind &kind, const SurveyPart &total, double norm) {
  if (!kind.maximum()) return static_cast<float>(static_cast<double>(bits_float(total.largest)) / norm);
  const bool counted = kind.count && finite_positive(bits_float(total.largest));
  return static_cast<float>(1.0 / (counted ? total.power_sum : 1.0));
}

// All that is said about a total.
STEEPEST_HD void finish(const SurveyKind &kind, const SurveyPart &total, float max_norm, float grad_scale,
                        steepest_measure_result &result) {
  const double norm = norm_of(kind, total);
  result.norm = norm;
  result.norm32 = static_cast<float>(norm) / grad_scale;
  result.largest = bits_float(total.largest);
  result.clip_coefficient = clip_coefficient(result.norm32, max_norm);
  result.steepness = steepness_of(kind, total, norm);
  result.nonfinite = total.largest >= 0x7f800000u;
  result.reserved = 0;
}

}  // namespace steepest
