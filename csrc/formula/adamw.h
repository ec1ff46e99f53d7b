// AdamW, the only place where C++ and CUDA spell it.  Operation order: torch.optim.AdamW's for-loop (see steepest.h).
// Compiled without contraction of a*b+c, so CPU clones and CUDA round alike.
#pragma once

#include <cmath>

#include "formula/number.h"
#include "steepest/steepest.h"

namespace steepest {

struct AdamWScalars {
  float decay;              // 1 - lr * weight_decay
  float lerp;               // 1 - beta1
  float lerp_rest;          // 1 - lerp, exact for lerp >= 1/2, where alone it is used
  float beta2;
  float beta2_rest;         // 1 - beta2, from double: 1 - float(0.999) is off by 1.3e-5
  float bias2_sqrt;         // sqrt(1 - beta2^t)
  float negative_step_size; // -lr / (1 - beta1^t)
  float eps;
};

inline AdamWScalars adamw_scalars(const steepest_adamw_hyper &h) {
  const double t = static_cast<double>(h.step);
  const double bias1 = 1.0 - std::pow(h.beta1, t);
  const double bias2 = 1.0 - std::pow(h.beta2, t);
  AdamWScalars s;
  s.decay = static_cast<float>(1.0 - h.lr * h.weight_decay);
  s.lerp = static_cast<float>(1.0 - h.beta1);
  s.lerp_rest = 1.0f - s.lerp;
  s.beta2 = static_cast<float>(h.beta2);
  s.beta2_rest = static_cast<float>(1.0 - h.beta2);
  s.bias2_sqrt = static_cast<float>(std::sqrt(bias2));
  s.negative_step_size = static_cast<float>(-(h.lr / bias1));
  s.eps = static_cast<float>(h.eps);
  return s;
}

// Steps one element in registers.  `vmax` is AMSGrad's running maximum, or null.
STEEPEST_HD void adamw(float &p, float g, float &m, float &v, float *vmax, const AdamWScalars &s) {
  p = p * s.decay;
  // torch's lerp: the form that is exact at its own end of [0, 1].
  const float toward = g - m;
  m = s.lerp < 0.5f ? m + s.lerp * toward : g - toward * s.lerp_rest;
  v = v * s.beta2 + (s.beta2_rest * g) * g;
  float second = v;
  if (vmax != nullptr) {
    // NaN in either operand is kept, as torch.maximum keeps it.
    second = (v > *vmax || v != v) ? v : *vmax;
    *vmax = second;
  }
  const float denominator = sqrtf(second) / s.bias2_sqrt + s.eps;
  p = p + (s.negative_step_size * m) / denominator;
}

}  // namespace steepest
