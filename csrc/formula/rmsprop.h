// RMSprop, centered or not, with or without momentum, in the operation order of torch.optim.RMSprop's for-loop (see
// steepest.h).
#pragma once

#include "formula/options.h"

namespace steepest {

struct RmspropScalars {
  Shrink shrink;
  float alpha;
  float rest;       // 1 - alpha
  float lerp_rest;  // 1 - rest, for the mean gradient's lerp
  float eps;
  float momentum;
  float negative_lr;
};

// States: square_avg, then grad_avg if centered, then momentum_buffer with momentum.
template <bool kCentered, bool kMomentum>
struct Rmsprop {
  static constexpr int kStates = 1 + kCentered + kMomentum;
  static constexpr uint32_t kMagnitudes = 1u;  // bit k: state k is never negative
  using Scalars = RmspropScalars;

  STEEPEST_HD static Scalars scalars(const steepest_hyper &h, uint32_t flags) {
    Scalars s;
    s.shrink = shrink_scalars(h, flags);
    s.alpha = static_cast<float>(h.alpha);
    s.rest = static_cast<float>(1.0 - h.alpha);
    s.lerp_rest = 1.0f - s.rest;
    s.eps = static_cast<float>(h.eps);
    s.momentum = static_cast<float>(h.momentum);
    s.negative_lr = static_cast<float>(-h.lr);
    return s;
  }

  STEEPEST_HD static void step(float &p, float g, float *state, const Scalars &s) {
    float second = state[0] * s.alpha + (s.rest * g) * g;
    state[0] = second;
    if constexpr (kCentered) {
      state[1] = lerp(state[1], g, s.rest, s.lerp_rest);
      second = second - state[1] * state[1];
    }
    const float denominator = sqrtf(second) + s.eps;
    if constexpr (kMomentum) {
      float &buffer = state[1 + kCentered];
      buffer = buffer * s.momentum + g / denominator;
      p = p + s.negative_lr * buffer;
    } else {
      p = p + (s.negative_lr * g) / denominator;
    }
  }
};

}  // namespace steepest
