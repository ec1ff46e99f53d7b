// The C interface's weight normalisation: arguments checked, work handed to the engine.
#include "check.h"
#include "engine/engine.h"
#include "steepest/steepest.h"

namespace steepest {
namespace {

steepest_status check_weight_norm(const char *op, const steepest_exec *exec, const steepest_weight_norm_args *args,
                                  bool backward) {
  clear_error();
  if (const steepest_status status = check_exec(op, exec)) return status;
  STEEPEST_REQUIRE(args, "%s: args is NULL", op);
  const steepest_weight_norm_args &a = *args;
  STEEPEST_REQUIRE(a.struct_size >= sizeof(steepest_weight_norm_args), "%s: args->struct_size is %llu, expected at least %zu",
                   op, static_cast<unsigned long long>(a.struct_size), sizeof(steepest_weight_norm_args));
  if (exec->device != STEEPEST_CPU) return fail(STEEPEST_ERROR_UNSUPPORTED, "%s: there is a kernel for the CPU only", op);
  STEEPEST_REQUIRE(a.rows >= 0 && a.columns >= 0, "%s: rows is %lld, columns %lld, expected >= 0", op,
                   static_cast<long long>(a.rows), static_cast<long long>(a.columns));
  if (a.rows == 0 || a.columns == 0) return STEEPEST_OK;
  const struct {
    const char *name;
    const void *address;
    bool needed;
  } lists[] = {{"v", a.v, true},           {"g", a.g, true},           {"norms", a.norms, true},  {"w", a.w, !backward},
               {"grad_w", a.grad_w, backward}, {"grad_v", a.grad_v, backward}, {"grad_g", a.grad_g, backward}};
  for (const auto &[name, address, needed] : lists)
    if (needed)
      if (const steepest_status status = check_address(op, name, 0, address, 4)) return status;
  return STEEPEST_OK;
}

}  // namespace
}  // namespace steepest

using namespace steepest;

extern "C" {

steepest_status steepest_weight_norm(const steepest_exec *exec, const steepest_weight_norm_args *args) {
  if (const steepest_status status = check_weight_norm("steepest_weight_norm", exec, args, false)) return status;
  cpu::weight_norm(*exec, *args);
  return STEEPEST_OK;
}

steepest_status steepest_weight_norm_backward(const steepest_exec *exec, const steepest_weight_norm_args *args) {
  if (const steepest_status status = check_weight_norm("steepest_weight_norm_backward", exec, args, true)) return status;
  cpu::weight_norm_backward(*exec, *args);
  return STEEPEST_OK;
}

}  // extern "C"
