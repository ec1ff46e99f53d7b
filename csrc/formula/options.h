// What all rules share: how the gradient is prepared before a rule sees it, and how weights shrink around it.
// Scalars are derived in double by functions that run on the host and on a device: where a step's number is known to the
// device alone, it gets the same bits.
// Compiled without contraction of a*b+c, so CPU clones and CUDA round alike.
#pragma once

#include <cmath>
#include <limits>

#include "formula/number.h"
#include "formula/power.h"
#include "formula/random.h"
#include "steepest/steepest.h"

namespace steepest {

// g / divisor * coefficient, clamped to [-limit, limit]; each part is left out where it would change nothing.
struct GradientStage {
  float divisor;      // the loss scale, negative to ascend: dividing by -x is dividing by x and negating
  float coefficient;  // of clipping by norm
  float limit;        // of clipping by value; inf for none

  STEEPEST_HD bool plain() const { return divisor == 1.0f && coefficient == 1.0f && !limited(); }
  // Whether all that it does is to multiply by factor(): dividing by -1 is multiplying by it.
  STEEPEST_HD bool is_factor() const { return (divisor == 1.0f || divisor == -1.0f) && !limited(); }
  STEEPEST_HD float factor() const { return divisor * coefficient; }
  STEEPEST_HD bool limited() const { return limit <= 3.402823466e+38f; }
  STEEPEST_HD float operator()(float g) const {
    if (divisor != 1.0f) g = g / divisor;
    if (coefficient != 1.0f) g = g * coefficient;
    if (limited()) g = g > limit ? limit : (g < -limit ? -limit : g);  // NaN passes
    return g;
  }
};

// Weight decay in its three forms, and the soft threshold of l1 decay; 1 or 0 where a form is not used.
struct Shrink {
  float decay;     // 1 - lr * weight_decay, decoupled
  float l2;        // weight_decay, added to the gradient as weight_decay * p
  float cautious;  // lr * weight_decay, decoupled, where the step moves towards zero anyway
  float l1;        // lr * l1
};

STEEPEST_HD Shrink shrink_scalars(const steepest_hyper &h, uint32_t flags) {
  const bool decoupled = flags & STEEPEST_DECOUPLED, cautious = flags & STEEPEST_CAUTIOUS;
  Shrink s;
  s.decay = decoupled && !cautious ? static_cast<float>(1.0 - h.lr * h.weight_decay) : 1.0f;
  s.l2 = decoupled ? 0.0f : static_cast<float>(h.weight_decay);
  s.cautious = decoupled && cautious ? static_cast<float>(h.lr * h.weight_decay) : 0.0f;
  s.l1 = static_cast<float>(h.lr * h.l1);
  return s;
}

// Before the rule.
STEEPEST_HD void decay(float &p, float &g, const Shrink &s) {
  if (s.l2 != 0.0f) g = g + s.l2 * p;
  p = p * s.decay;
}

// After the rule, which moved the parameter from `before` to `p`.
STEEPEST_HD bool shrinks_after(const Shrink &s) { return s.cautious != 0.0f || s.l1 != 0.0f; }

STEEPEST_HD void shrink_after(float &p, float before, const Shrink &s) {
  // Cautious weight decay (Chen et al. 2025): only where step and decay point the same way.
  if (s.cautious != 0.0f) {
    const float move = p - before;
    if ((move <= 0.0f && before >= 0.0f) || (move >= 0.0f && before <= 0.0f)) p = p - s.cautious * before;
  }
  if (s.l1 != 0.0f) p = p > s.l1 ? p - s.l1 : (p < -s.l1 ? p + s.l1 : p * 0.0f);  // NaN stays
}

// What only some calls ask for; kept apart from a rule's scalars, which every block of a GPU reads.
struct Extras {
  float noise;                               // standard deviation of what is added to the gradient
  float average_weight, average_weight_rest; // of the parameter in its average, and 1 - that
  RandomStream rounding_stream, noise_stream;
};

STEEPEST_HD Extras extras_of(const steepest_hyper &h, uint64_t seed) {
  Extras e;
  e.noise = static_cast<float>(sqrt(h.noise_eta * power01(1.0 / (1.0 + static_cast<double>(h.step)), h.noise_gamma)));
  e.average_weight = static_cast<float>(1.0 - h.average_decay);
  e.average_weight_rest = 1.0f - e.average_weight;
  e.rounding_stream = random_stream(seed, h.step, kForRounding);
  e.noise_stream = random_stream(seed, h.step, kForNoise);
  return e;
}

// torch's lerp: the form that is exact at its own end of [0, 1]; `rest` is 1 - weight.
STEEPEST_HD float lerp(float from, float to, float weight, float rest) {
  const uint32_t far = weight < 0.5f ? 0u : ~0u;
  const float base = bits_float((float_bits(from) & ~far) | (float_bits(to) & far));
  return base + (weight < 0.5f ? weight : -rest) * (to - from);
}

}  // namespace steepest
