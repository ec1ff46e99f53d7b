// The C interface's norms: arguments checked, work handed to the engine.
#include <cmath>

#include "check.h"
#include "engine/engine.h"
#include "steepest/steepest.h"

namespace steepest {
namespace {

steepest_status check_survey_args(const char *op, const steepest_survey_args &a) {
  STEEPEST_REQUIRE(a.struct_size >= sizeof(steepest_survey_args), "%s: args->struct_size is %llu, expected at least %zu",
                   op, static_cast<unsigned long long>(a.struct_size), sizeof(steepest_survey_args));
  STEEPEST_REQUIRE(a.num_tensors >= 0 && (a.num_tensors == 0 || (a.numel && a.tensors)),
                   "%s: num_tensors is %lld, numel and tensors must not be NULL", op,
                   static_cast<long long>(a.num_tensors));
  STEEPEST_REQUIRE(a.dtype >= STEEPEST_FLOAT32 && a.dtype <= STEEPEST_FLOAT16, "%s: dtype is %d", op, a.dtype);
  STEEPEST_REQUIRE(a.q >= 1, "%s: q is %g, expected >= 1 or inf", op, a.q);
  STEEPEST_REQUIRE(a.scale > 0 && a.scale <= 3.5e38, "%s: scale is %g, expected a finite number > 0", op, a.scale);
  if (a.weights)
    STEEPEST_REQUIRE(a.weight_dtype >= STEEPEST_FLOAT32 && a.weight_dtype <= STEEPEST_FLOAT16 && a.alpha >= 0 && a.eps >= 0,
                     "%s: weight_dtype is %d, alpha %g, eps %g; expected a steepest_dtype and numbers >= 0", op,
                     a.weight_dtype, a.alpha, a.eps);
  STEEPEST_REQUIRE(!a.inner || (a.weights && a.q == 1 && a.scale == 1),
                   "%s: an inner product with weights %p, q %g, scale %g; expected weights, 1 and 1", op,
                   static_cast<const void *>(a.weights), a.q, a.scale);
  for (int64_t i = 0; i < a.num_tensors; ++i) {
    const long long k = i;
    STEEPEST_REQUIRE(a.numel[i] >= 0, "%s: numel[%lld] is %lld, expected >= 0", op, k,
                     static_cast<long long>(a.numel[i]));
    if (a.numel[i] == 0) continue;
    if (const steepest_status status = check_address(op, "tensors", k, a.tensors[i], size_of(a.dtype))) return status;
    if (!a.weights) continue;
    if (const steepest_status status = check_address(op, "weights", k, a.weights[i], size_of(a.weight_dtype))) return status;
  }
  return STEEPEST_OK;
}

steepest_status check_survey(const char *op, const steepest_exec *exec, const steepest_survey_args *args) {
  clear_error();
  if (const steepest_status status = check_exec(op, exec)) return status;
  STEEPEST_REQUIRE(args, "%s: args is NULL", op);
  if (exec->device != STEEPEST_CPU)
    return fail(STEEPEST_ERROR_UNSUPPORTED, "%s: for the CPU only; steepest_measure is for both", op);
  return check_survey_args(op, *args);
}

steepest_status check_measure(const char *op, const steepest_exec *exec, const steepest_measure_args *args) {
  clear_error();
  if (const steepest_status status = check_exec(op, exec)) return status;
  STEEPEST_REQUIRE(args, "%s: args is NULL", op);
  const steepest_measure_args &a = *args;
  STEEPEST_REQUIRE(a.struct_size >= sizeof(steepest_measure_args), "%s: args->struct_size is %llu, expected at least %zu",
                   op, static_cast<unsigned long long>(a.struct_size), sizeof(steepest_measure_args));
  STEEPEST_REQUIRE(a.num_lists >= 0 && a.num_lists <= 1024 && (a.num_lists == 0 || a.lists),
                   "%s: num_lists is %lld, expected 0 to 1024 lists that are not NULL", op,
                   static_cast<long long>(a.num_lists));
  STEEPEST_REQUIRE(a.q >= 1 && a.max_norm >= 0, "%s: q is %g, max_norm %g; expected q >= 1 or inf, max_norm >= 0", op, a.q,
                   a.max_norm);
  STEEPEST_REQUIRE(!a.count_largest || std::isinf(a.q), "%s: count_largest with q %g, expected inf", op, a.q);
  for (int64_t i = 0; i < a.num_lists; ++i) {
    const steepest_survey_args &list = a.lists[i];
    if (const steepest_status status = check_survey_args(op, list)) return status;
    STEEPEST_REQUIRE(list.q == a.q && (list.inner != 0) == (a.inner != 0) && list.scale == 1,
                     "%s: lists[%lld] has q %g, inner %d, scale %g; expected %g, %d and 1", op, static_cast<long long>(i),
                     list.q, list.inner, list.scale, a.q, a.inner);
  }
  return STEEPEST_OK;
}

}  // namespace
}  // namespace steepest

using namespace steepest;

extern "C" {

steepest_status steepest_survey_workspace_size(const steepest_exec *exec, const steepest_survey_args *args,
                                               uint64_t *bytes) {
  if (const steepest_status status = check_survey("steepest_survey_workspace_size", exec, args)) return status;
  if (!bytes) return fail(STEEPEST_ERROR_INVALID, "steepest_survey_workspace_size: bytes is NULL");
  *bytes = static_cast<uint64_t>(cpu::survey_blocks(*args)) * sizeof(SurveyPart);
  return STEEPEST_OK;
}

steepest_status steepest_survey(const steepest_exec *exec, const steepest_survey_args *args, void *workspace,
                                uint64_t available, steepest_survey_result *result) {
  const char *op = "steepest_survey";
  if (const steepest_status status = check_survey(op, exec, args)) return status;
  if (!result) return fail(STEEPEST_ERROR_INVALID, "%s: result is NULL", op);
  const uint64_t needed = static_cast<uint64_t>(cpu::survey_blocks(*args)) * sizeof(SurveyPart);
  if (const steepest_status status = check_workspace(op, workspace, available, needed)) return status;
  *result = cpu::survey(*exec, *args, static_cast<SurveyPart *>(workspace));
  return STEEPEST_OK;
}

steepest_status steepest_measure_workspace_size(const steepest_exec *exec, const steepest_measure_args *args,
                                                uint64_t *bytes) {
  if (const steepest_status status = check_measure("steepest_measure_workspace_size", exec, args)) return status;
  if (!bytes) return fail(STEEPEST_ERROR_INVALID, "steepest_measure_workspace_size: bytes is NULL");
  *bytes = static_cast<uint64_t>(measure_blocks(*args)) * sizeof(SurveyPart);
  return STEEPEST_OK;
}

steepest_status steepest_measure(const steepest_exec *exec, const steepest_measure_args *args, void *workspace,
                                 uint64_t available, steepest_measure_result *result) {
  const char *op = "steepest_measure";
  if (const steepest_status status = check_measure(op, exec, args)) return status;
  if (const steepest_status status = check_address(op, "result", 0, result, 8)) return status;
  const uint64_t needed = static_cast<uint64_t>(measure_blocks(*args)) * sizeof(SurveyPart);
  if (const steepest_status status = check_workspace(op, workspace, available, needed)) return status;
  auto *parts = static_cast<SurveyPart *>(workspace);
#if STEEPEST_WITH_CUDA
  if (exec->device == STEEPEST_CUDA) return cuda::measure(*exec, *args, parts, result);
#endif
  cpu::measure(*exec, *args, parts, result);
  return STEEPEST_OK;
}

steepest_status steepest_measure_launches(const steepest_exec *exec, const steepest_measure_args *args,
                                          int64_t *launches) {
  if (const steepest_status status = check_measure("steepest_measure_launches", exec, args)) return status;
  if (!launches) return fail(STEEPEST_ERROR_INVALID, "steepest_measure_launches: launches is NULL");
  *launches = 0;
#if STEEPEST_WITH_CUDA
  if (exec->device == STEEPEST_CUDA) *launches = cuda::measure_launches(*args);
#endif
  return STEEPEST_OK;
}

steepest_status steepest_survey_traffic(const steepest_exec *exec, const steepest_survey_args *args, uint64_t *bytes) {
  if (const steepest_status status = check_survey("steepest_survey_traffic", exec, args)) return status;
  if (!bytes) return fail(STEEPEST_ERROR_INVALID, "steepest_survey_traffic: bytes is NULL");
  *bytes = survey_bytes(*args);
  return STEEPEST_OK;
}

}  // extern "C"
