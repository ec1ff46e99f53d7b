// What entry points of the C interface share.
#pragma once

#include "steepest/steepest.h"

namespace steepest {

// Of steepest_step, for arguments whose rule, flags and numbers have been checked.
uint64_t step_workspace_bytes(const steepest_exec &exec, const steepest_step_args &args);

}  // namespace steepest
