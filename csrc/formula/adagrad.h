// Adagrad, in the operation order of torch.optim.Adagrad's for-loop (see steepest.h).
#pragma once

#include "formula/options.h"

namespace steepest {

struct AdagradScalars {
  Shrink shrink;
  float negative_lr;  // -lr / (1 + (t - 1) * lr_decay)
  float eps;
};

// State: sum of squared gradients.
struct Adagrad {
  static constexpr int kStates = 1;
  static constexpr uint32_t kMagnitudes = 1u;  // bit k: state k is never negative
  using Scalars = AdagradScalars;

  STEEPEST_HD static Scalars scalars(const steepest_hyper &h, uint32_t flags) {
    Scalars s;
    s.shrink = shrink_scalars(h, flags);
    s.negative_lr = static_cast<float>(-(h.lr / (1.0 + static_cast<double>(h.step - 1) * h.lr_decay)));
    s.eps = static_cast<float>(h.eps);
    return s;
  }

  STEEPEST_HD static void step(float &p, float g, float *state, const Scalars &s) {
    state[0] = state[0] + g * g;
    p = p + (s.negative_lr * g) / (sqrtf(state[0]) + s.eps);
  }
};

}  // namespace steepest
