// From a rule's number and flags to its type.
#pragma once

#include "formula/adagrad.h"
#include "formula/adam.h"
#include "formula/lion.h"
#include "formula/rmsprop.h"
#include "formula/sgd.h"

namespace steepest {

// Calls f(Rule{}); the rule has been checked.
template <class F>
auto with_rule(int32_t rule, uint32_t flags, F &&f) {
  const bool momentum = flags & STEEPEST_MOMENTUM;
  switch (rule) {
    case STEEPEST_SGD: return momentum ? f(Sgd<true>{}) : f(Sgd<false>{});
    case STEEPEST_ADAGRAD: return f(Adagrad{});
    case STEEPEST_RMSPROP:
      if (flags & STEEPEST_CENTERED) return momentum ? f(Rmsprop<true, true>{}) : f(Rmsprop<true, false>{});
      return momentum ? f(Rmsprop<false, true>{}) : f(Rmsprop<false, false>{});
    case STEEPEST_LION: return f(Lion{});
    case STEEPEST_SIGN: return f(Sign{});
    default: return flags & STEEPEST_AMSGRAD ? f(Adam<true>{}) : f(Adam<false>{});
  }
}

}  // namespace steepest
