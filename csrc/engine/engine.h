// What the ABI entry points dispatch to, after all arguments have been checked.
#pragma once

#include "formula/adamw.h"
#include "steepest/steepest.h"

namespace steepest {

struct AdamWCall {
  const steepest_exec *exec;
  const steepest_adamw_args *args;
  const AdamWScalars *scalars;  // [args->num_hyper]
};

namespace cpu {
steepest_status adamw(const AdamWCall &call);
// Name of the SIMD clone that the stage loops resolve to on this machine.
const char *clone_name();
}  // namespace cpu

namespace cuda {
bool adamw_supports(const steepest_adamw_args &args);
steepest_status adamw(const AdamWCall &call);
// Launches that adamw() makes for these tensors, from the same packing code.
int64_t adamw_launches(const steepest_adamw_args &args);
}  // namespace cuda

}  // namespace steepest
