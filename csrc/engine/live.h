// Hyper-parameters that are known where the tensors live only: a row as the user states it, with the numbers that are read
// there put in, and the number of the step from a counter there.
#pragma once

#include "engine/rules.h"

namespace steepest {

constexpr int kLiveFields = 10;  // lr to lr_decay may be live
constexpr int kLiveL1 = 2;       // the number of l1 among them

// The next step of a tensor that has *counter steps behind it.
STEEPEST_HD int64_t next_step(float counter) { return static_cast<int64_t>(counter) + 1; }

STEEPEST_HD double live_value(const void *value, bool is_float64) {
  return is_float64 ? *static_cast<const double *>(value) : static_cast<double>(*static_cast<const float *>(value));
}

// `field`: a constant index wherever this is inlined, so that a GPU keeps the row in registers.
STEEPEST_HD void set_field(steepest_hyper &h, int field, double value) {
  switch (field) {
    case 0: h.lr = value; break;
    case 1: h.weight_decay = value; break;
    case kLiveL1: h.l1 = value; break;
    case 3: h.beta1 = value; break;
    case 4: h.beta2 = value; break;
    case 5: h.eps = value; break;
    case 6: h.momentum = value; break;
    case 7: h.dampening = value; break;
    case 8: h.alpha = value; break;
    case 9: h.lr_decay = value; break;
    default: break;
  }
}

// Whether a tensor of the call may shrink after its step: asked before the numbers are known.
inline bool may_shrink_after(const steepest_step_args &a) {
  bool may = a.flags & STEEPEST_CAUTIOUS;
  for (int64_t i = 0; i < a.num_hyper; ++i) may = may || a.hyper[i].l1 > 0;
  for (int64_t i = 0; i < a.num_live; ++i) may = may || a.live[i].field == kLiveL1;
  return may;
}

}  // namespace steepest
