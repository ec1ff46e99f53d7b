// From a rule's number and flags to its type.
#pragma once

#include "formula/adagrad.h"
#include "formula/adam.h"
#include "formula/lion.h"
#include "formula/perturb.h"
#include "formula/rmsprop.h"
#include "formula/sgd.h"

namespace steepest {

// Whether a rule moves parameters for a while only: masters and residuals, which hold their values, are left alone.
template <class Rule>
constexpr bool kTemporary = false;
template <bool kPower, bool kBackup>
constexpr bool kTemporary<Perturb<kPower, kBackup>> = true;

// Whether a rule uses what its states held before; a backup is only written.
template <class Rule>
constexpr bool kReadsStates = true;
template <bool kPower, bool kBackup>
constexpr bool kReadsStates<Perturb<kPower, kBackup>> = false;

// Calls f(Rule{}); the rule has been checked.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // f runs where this is called
#endif
template <class F>
STEEPEST_HD auto with_rule(int32_t rule, uint32_t flags, F &&f) {
  const bool momentum = flags & STEEPEST_MOMENTUM;
  switch (rule) {
    case STEEPEST_SGD: return momentum ? f(Sgd<true>{}) : f(Sgd<false>{});
    case STEEPEST_ADAGRAD: return f(Adagrad{});
    case STEEPEST_RMSPROP:
      if (flags & STEEPEST_CENTERED) return momentum ? f(Rmsprop<true, true>{}) : f(Rmsprop<true, false>{});
      return momentum ? f(Rmsprop<false, true>{}) : f(Rmsprop<false, false>{});
    case STEEPEST_LION: return f(Lion{});
    case STEEPEST_SIGN: return f(Sign{});
    case STEEPEST_RESTORE: return f(Restore{});
    case STEEPEST_PERTURB:
      if (flags & STEEPEST_BACKUP) return flags & STEEPEST_POWER ? f(Perturb<true, true>{}) : f(Perturb<false, true>{});
      return flags & STEEPEST_POWER ? f(Perturb<true, false>{}) : f(Perturb<false, false>{});
    default: return flags & STEEPEST_AMSGRAD ? f(Adam<true>{}) : f(Adam<false>{});
  }
}

}  // namespace steepest
