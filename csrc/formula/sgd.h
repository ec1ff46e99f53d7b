// Stochastic gradient descent with momentum, dampening and Nesterov's form, in the operation order of torch.optim.SGD's
// for-loop (see steepest.h).
#pragma once

#include "formula/options.h"

namespace steepest {

struct SgdScalars {
  Shrink shrink;
  float carry;     // momentum; 0 in the first step, where the buffer becomes the gradient
  float take;      // 1 - dampening; 1 in the first step
  float nesterov;  // momentum in Nesterov's form, else 0
  float negative_lr;
};

// State: momentum_buffer, with momentum.
template <bool kMomentum>
struct Sgd {
  static constexpr int kStates = kMomentum ? 1 : 0;
  static constexpr uint32_t kMagnitudes = 0u;  // bit k: state k is never negative
  using Scalars = SgdScalars;

  STEEPEST_HD static Scalars scalars(const steepest_hyper &h, uint32_t flags) {
    const bool first = h.step == 1;
    Scalars s;
    s.shrink = shrink_scalars(h, flags);
    s.carry = first ? 0.0f : static_cast<float>(h.momentum);
    s.take = first ? 1.0f : static_cast<float>(1.0 - h.dampening);
    s.nesterov = flags & STEEPEST_NESTEROV ? static_cast<float>(h.momentum) : 0.0f;
    s.negative_lr = static_cast<float>(-h.lr);
    return s;
  }

  STEEPEST_HD static void step(float &p, float g, float *state, const Scalars &s) {
    if constexpr (kMomentum) {
      state[0] = state[0] * s.carry + s.take * g;
      g = s.nesterov != 0.0f ? g + s.nesterov * state[0] : state[0];
    }
    p = p + s.negative_lr * g;
  }
};

}  // namespace steepest
