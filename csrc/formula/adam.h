// Adam and AdamW: one rule, which differs in how weights decay (see options.h).  Operation order: the for-loops of
// torch.optim.Adam and AdamW (see steepest.h), but for the correction of the second moment, which the step size and eps
// carry: a quotient and a rounding less per element.  (Zen 4, AVX-512, in cache: 0.30 ns per float32 element, 0.42 with
// that quotient: divisions and roots share one unit.)
#pragma once

#include <cmath>

#include "formula/options.h"

namespace steepest {

struct AdamScalars {
  Shrink shrink;
  float lerp;                // 1 - beta1
  float lerp_rest;           // 1 - lerp, exact for lerp >= 1/2, where alone it is used
  float beta2;
  float beta2_rest;          // 1 - beta2, from double: 1 - float(0.999) is off by 1.3e-5
  float negative_step_size;  // -lr sqrt(1 - beta2^t) / (1 - beta1^t)
  float eps;                 // eps sqrt(1 - beta2^t)
};

// States: exp_avg, exp_avg_sq and, with AMSGrad, the running maximum of exp_avg_sq.
template <bool kAmsgrad>
struct Adam {
  static constexpr int kStates = kAmsgrad ? 3 : 2;
  static constexpr uint32_t kMagnitudes = 6u;  // bit k: state k is never negative
  using Scalars = AdamScalars;

  STEEPEST_HD static Scalars scalars(const steepest_hyper &h, uint32_t flags) {
    const double bias1 = 1.0 - whole_power(h.beta1, h.step);
    const double bias2_sqrt = sqrt(1.0 - whole_power(h.beta2, h.step));
    Scalars s;
    s.shrink = shrink_scalars(h, flags);
    s.lerp = static_cast<float>(1.0 - h.beta1);
    s.lerp_rest = 1.0f - s.lerp;
    s.beta2 = static_cast<float>(h.beta2);
    s.beta2_rest = static_cast<float>(1.0 - h.beta2);
    s.negative_step_size = static_cast<float>(-(h.lr * bias2_sqrt / bias1));
    s.eps = static_cast<float>(h.eps * bias2_sqrt);
    return s;
  }

  STEEPEST_HD static void step(float &p, float g, float *state, const Scalars &s) {
    float &m = state[0], &v = state[1];
    m = lerp(m, g, s.lerp, s.lerp_rest);
    v = v * s.beta2 + (s.beta2_rest * g) * g;
    float second = v;
    if constexpr (kAmsgrad) {
      // NaN in either operand is kept, as torch.maximum keeps it.
      second = (v > state[2] || v != v) ? v : state[2];
      state[2] = second;
    }
    p = p + (s.negative_step_size * m) / (sqrtf(second) + s.eps);
  }
};

}  // namespace steepest
