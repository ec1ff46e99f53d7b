// Sharpness-aware minimisation (Foret et al. 2021; adaptive: Kwon et al. 2021): the steepest ascent of length rho in the
// p-norm, and the way back.  With q the dual exponent, T = alpha |p| + eps and x = T g,
//   p = p + rho T sign(x) (|x| / norm_q(x))^(q-1),
// where the norm is taken over all tensors together and reaches the rule through two numbers on the device: *grad_scale
// is the largest |x|, and *clip_coefficient that divided by the norm.  (|x| / largest and largest / norm are at most 1:
// nothing overflows, whatever the gradients are.)
#pragma once

#include "formula/options.h"

namespace steepest {

struct PerturbScalars {
  Shrink shrink;
  float rho;              // negative to descend
  float alpha, eps;       // T = alpha |p| + eps
  float weigh, base;      // the same for x, except that a sign needs no weight: 0, 1
  float threshold;        // above it |x| / largest counts as `flat`
  float flat, slope;      // what |x| / largest becomes: flat above the threshold, else itself times the slope
  float divisor, coefficient;
  double exponent;        // q - 1, for powers
  bool proportional, largest_only;
};

// What stands in the way of NaN: a gradient or norm that is not finite, or zero, moves nothing.
template <bool kPower, bool kBackup>
struct Perturb {
  static constexpr int kStates = kBackup ? 1 : 0;
  static constexpr uint32_t kMagnitudes = 0u;  // bit k: state k is never negative
  using Scalars = PerturbScalars;

  STEEPEST_HD static Scalars scalars(const steepest_hyper &h, uint32_t) {
    Scalars s{};
    s.shrink = {1.0f, 0.0f, 0.0f, 0.0f};
    s.rho = static_cast<float>(h.lr);
    s.alpha = static_cast<float>(h.alpha);
    s.eps = static_cast<float>(h.eps);
    const bool sign = h.q == 1.0;
    s.weigh = sign ? 0.0f : s.alpha;
    s.base = sign ? 1.0f : s.eps;
    s.largest_only = h.q > 1.7e308;
    s.proportional = !sign && !s.largest_only;
    // |x| / largest is 1 for the largest alone: the quotient of two different floats never rounds to 1.
    s.threshold = s.proportional ? 2.0f : sign ? 0.0f : 0.99999994f;
    s.flat = 1.0f;
    s.exponent = h.q - 1.0;
    return s;
  }

  STEEPEST_HD static void step(float &p, float g, float *state, const Scalars &s) {
    if constexpr (kBackup) state[0] = p;
    const float size = fabsf(p);
    const float x = g * (size * s.weigh + s.base);
    const float relative = fabsf(x) / s.divisor;
    float direction;
    if constexpr (kPower)
      direction = static_cast<float>(power01(static_cast<double>(relative * s.coefficient), s.exponent));
    else
      direction = relative > s.threshold ? s.flat : relative * s.slope;
    const float length = s.rho * ((size * s.alpha + s.eps) * direction);
    const float move = bits_float(float_bits(length) ^ (float_bits(x) & 0x80000000u));
    p = move == move ? p + move : p;
  }
};

// The numbers that other rules' gradient stage divides and multiplies by are this rule's own.
STEEPEST_HD void absorb(PerturbScalars &s, GradientStage &stage) {
  s.rho = stage.divisor < 0.0f ? -s.rho : s.rho;
  s.divisor = fabsf(stage.divisor);
  s.coefficient = stage.coefficient;
  s.slope = s.proportional ? s.coefficient : 0.0f;
  s.flat = s.largest_only ? s.coefficient : s.flat;
  stage.divisor = stage.coefficient = 1.0f;
}

template <class Scalars>
STEEPEST_HD void absorb(Scalars &, GradientStage &) {}

struct RestoreScalars {
  Shrink shrink;
};

// The parameter becomes its copy, which is passed as the gradient; a float32 copy is rounded.
struct Restore {
  static constexpr int kStates = 0;
  static constexpr uint32_t kMagnitudes = 0u;  // bit k: state k is never negative
  using Scalars = RestoreScalars;
  STEEPEST_HD static Scalars scalars(const steepest_hyper &, uint32_t) { return {{1.0f, 0.0f, 0.0f, 0.0f}}; }
  STEEPEST_HD static void step(float &p, float copy, float *, const Scalars &) { p = copy; }
};

}  // namespace steepest
