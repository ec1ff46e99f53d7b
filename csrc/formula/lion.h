// Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2), and plain sign descent.
#pragma once

#include "formula/options.h"

namespace steepest {

// -1, 0 or 1; NaN stays.
STEEPEST_HD float sign(float x) { return x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : x); }

struct LionScalars {
  Shrink shrink;
  float beta1, beta1_rest;
  float beta2, beta2_rest;
  float negative_lr;
};

// State: exp_avg.
struct Lion {
  static constexpr int kStates = 1;
  static constexpr uint32_t kMagnitudes = 0u;  // bit k: state k is never negative
  using Scalars = LionScalars;

  STEEPEST_HD static Scalars scalars(const steepest_hyper &h, uint32_t flags) {
    Scalars s;
    s.shrink = shrink_scalars(h, flags);
    s.beta1 = static_cast<float>(h.beta1);
    s.beta1_rest = static_cast<float>(1.0 - h.beta1);
    s.beta2 = static_cast<float>(h.beta2);
    s.beta2_rest = static_cast<float>(1.0 - h.beta2);
    s.negative_lr = static_cast<float>(-h.lr);
    return s;
  }

  STEEPEST_HD static void step(float &p, float g, float *state, const Scalars &s) {
    p = p + s.negative_lr * sign(state[0] * s.beta1 + s.beta1_rest * g);
    state[0] = state[0] * s.beta2 + s.beta2_rest * g;
  }
};

struct SignScalars {
  Shrink shrink;
  float negative_lr;
};

// Steepest descent in the max norm: every element moves by lr.
struct Sign {
  static constexpr int kStates = 0;
  static constexpr uint32_t kMagnitudes = 0u;  // of no states
  using Scalars = SignScalars;

  STEEPEST_HD static Scalars scalars(const steepest_hyper &h, uint32_t flags) {
    return {shrink_scalars(h, flags), static_cast<float>(-h.lr)};
  }

  STEEPEST_HD static void step(float &p, float g, float *, const Scalars &s) { p = p + s.negative_lr * sign(g); }
};

}  // namespace steepest
