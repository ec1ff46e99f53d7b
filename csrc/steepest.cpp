// ABI entry points: check every argument, compute derived scalars, dispatch to an engine.
#include "steepest/steepest.h"

#include <cmath>
#include <cstdio>

#include "engine/engine.h"
#include "engine/status.h"

namespace steepest {
namespace {

#define STEEPEST_REQUIRE(condition, ...)                                              \
  do {                                                                                \
    if (!(condition)) return fail(STEEPEST_ERROR_INVALID, __VA_ARGS__);               \
  } while (0)

const char *dtype_name(int32_t dtype) {
  switch (dtype) {
    case STEEPEST_FLOAT32: return "float32";
    case STEEPEST_BFLOAT16: return "bfloat16";
    case STEEPEST_FLOAT16: return "float16";
  }
  return "unknown";
}

steepest_status check_exec(const char *op, const steepest_exec *exec) {
  STEEPEST_REQUIRE(exec, "%s: exec is NULL", op);
  STEEPEST_REQUIRE(exec->struct_size >= sizeof(steepest_exec),
                   "%s: exec->struct_size is %llu, expected at least %zu (set it with sizeof; ABI version %d)", op,
                   static_cast<unsigned long long>(exec->struct_size), sizeof(steepest_exec), STEEPEST_ABI_VERSION);
  STEEPEST_REQUIRE(exec->device == STEEPEST_CPU || exec->device == STEEPEST_CUDA,
                   "%s: exec->device is %d, expected STEEPEST_CPU (0) or STEEPEST_CUDA (1)", op, exec->device);
  STEEPEST_REQUIRE(exec->num_threads >= 0, "%s: exec->num_threads is %d, expected >= 0", op, exec->num_threads);
#if !STEEPEST_WITH_CUDA
  if (exec->device == STEEPEST_CUDA)
    return fail(STEEPEST_ERROR_UNSUPPORTED, "%s: this build has no CUDA (configured without nvcc)", op);
#endif
  return STEEPEST_OK;
}

steepest_status check_hyper(const char *op, const steepest_adamw_hyper &h, int64_t row) {
  const long long k = row;
  // Negated comparisons, so that NaN fails too.
  STEEPEST_REQUIRE(h.lr >= 0, "%s: hyper[%lld].lr is %g, expected >= 0", op, k, h.lr);
  STEEPEST_REQUIRE(h.beta1 >= 0 && h.beta1 < 1, "%s: hyper[%lld].beta1 is %g, expected in [0, 1)", op, k, h.beta1);
  STEEPEST_REQUIRE(h.beta2 >= 0 && h.beta2 < 1, "%s: hyper[%lld].beta2 is %g, expected in [0, 1)", op, k, h.beta2);
  STEEPEST_REQUIRE(h.eps >= 0, "%s: hyper[%lld].eps is %g, expected >= 0", op, k, h.eps);
  STEEPEST_REQUIRE(h.weight_decay >= 0, "%s: hyper[%lld].weight_decay is %g, expected >= 0", op, k, h.weight_decay);
  STEEPEST_REQUIRE(h.step >= 1, "%s: hyper[%lld].step is %lld, expected >= 1 (the first step is 1)", op, k,
                   static_cast<long long>(h.step));
  return STEEPEST_OK;
}

// NULL, or an address that no element of that type can have (a GPU would fault on it).
steepest_status check_address(const char *op, const char *role, long long row, const void *address, int32_t dtype) {
  const uintptr_t size = dtype == STEEPEST_FLOAT32 ? 4 : 2;
  STEEPEST_REQUIRE(address, "%s: %s[%lld] is NULL", op, role, row);
  STEEPEST_REQUIRE(reinterpret_cast<uintptr_t>(address) % size == 0,
                   "%s: %s[%lld] is at %p, expected a multiple of %d bytes", op, role, row, address,
                   static_cast<int>(size));
  return STEEPEST_OK;
}

steepest_status check_tensors(const char *op, const steepest_adamw_args &a) {
  for (int64_t i = 0; i < a.num_tensors; ++i) {
    const long long k = i;
    STEEPEST_REQUIRE(a.numel[i] >= 0, "%s: numel[%lld] is %lld, expected >= 0", op, k,
                     static_cast<long long>(a.numel[i]));
    if (a.hyper_index)
      STEEPEST_REQUIRE(a.hyper_index[i] >= 0 && a.hyper_index[i] < a.num_hyper,
                       "%s: hyper_index[%lld] is %d, expected in [0, %lld)", op, k, a.hyper_index[i],
                       static_cast<long long>(a.num_hyper));
    if (a.numel[i] == 0) continue;
    const struct {
      const char *name;
      const void *address;
      int32_t dtype;
    } roles[5] = {{"params", a.params[i], a.param_dtype},
                  {"grads", a.grads[i], a.grad_dtype},
                  {"exp_avgs", a.exp_avgs[i], a.state_dtype},
                  {"exp_avg_sqs", a.exp_avg_sqs[i], a.state_dtype},
                  {"max_exp_avg_sqs", a.max_exp_avg_sqs ? a.max_exp_avg_sqs[i] : a.exp_avgs[i], a.state_dtype}};
    for (const auto &role : roles)
      if (const steepest_status status = check_address(op, role.name, k, role.address, role.dtype)) return status;
  }
  return STEEPEST_OK;
}

steepest_status check_args(const char *op, const steepest_adamw_args *args) {
  STEEPEST_REQUIRE(args, "%s: args is NULL", op);
  const steepest_adamw_args &a = *args;
  STEEPEST_REQUIRE(a.struct_size >= sizeof(steepest_adamw_args),
                   "%s: args->struct_size is %llu, expected at least %zu (set it with sizeof; ABI version %d)", op,
                   static_cast<unsigned long long>(a.struct_size), sizeof(steepest_adamw_args), STEEPEST_ABI_VERSION);
  STEEPEST_REQUIRE(a.num_tensors >= 0, "%s: num_tensors is %lld, expected >= 0", op,
                   static_cast<long long>(a.num_tensors));
  STEEPEST_REQUIRE(a.num_tensors == 0 || (a.numel && a.params && a.grads && a.exp_avgs && a.exp_avg_sqs),
                   "%s: numel, params, grads, exp_avgs and exp_avg_sqs must not be NULL", op);
  STEEPEST_REQUIRE(a.num_hyper >= 1 && a.num_hyper <= INT32_MAX && a.hyper,
                   "%s: hyper has %lld rows at %p, expected at least 1", op, static_cast<long long>(a.num_hyper),
                   static_cast<const void *>(a.hyper));
  STEEPEST_REQUIRE((a.flags & ~static_cast<uint32_t>(STEEPEST_MAXIMIZE)) == 0, "%s: flags is 0x%x, known: 0x%x", op,
                   a.flags, STEEPEST_MAXIMIZE);
  const int32_t dtypes[3] = {a.param_dtype, a.grad_dtype, a.state_dtype};
  const char *const roles[3] = {"param_dtype", "grad_dtype", "state_dtype"};
  for (int i = 0; i < 3; ++i)
    STEEPEST_REQUIRE(dtypes[i] >= STEEPEST_FLOAT32 && dtypes[i] <= STEEPEST_FLOAT16,
                     "%s: %s is %d, expected STEEPEST_FLOAT32 (0), STEEPEST_BFLOAT16 (1) or STEEPEST_FLOAT16 (2)", op,
                     roles[i], dtypes[i]);
  for (int64_t i = 0; i < a.num_hyper; ++i)
    if (const steepest_status status = check_hyper(op, a.hyper[i], i)) return status;
  return check_tensors(op, a);
}

steepest_status check_adamw(const char *op, const steepest_exec *exec, const steepest_adamw_args *args) {
  clear_error();
  if (const steepest_status status = check_exec(op, exec)) return status;
  if (const steepest_status status = check_args(op, args)) return status;
#if STEEPEST_WITH_CUDA
  if (exec->device == STEEPEST_CUDA && !cuda::adamw_supports(*args))
    return fail(STEEPEST_ERROR_UNSUPPORTED, "%s: no CUDA kernel for %s parameters, %s gradients, %s states", op,
                dtype_name(args->param_dtype), dtype_name(args->grad_dtype), dtype_name(args->state_dtype));
#else
  (void)dtype_name;
#endif
  return STEEPEST_OK;
}

uint64_t workspace_bytes(const steepest_adamw_args &args) {
  return static_cast<uint64_t>(args.num_hyper) * sizeof(AdamWScalars);
}

}  // namespace
}  // namespace steepest

using namespace steepest;

extern "C" {

uint32_t steepest_abi_version(void) { return STEEPEST_ABI_VERSION; }

const char *steepest_version(void) { return STEEPEST_VERSION; }

const char *steepest_build_info(void) {
  static thread_local char json[512];
  std::snprintf(json, sizeof json,
                "{\"version\": \"%s\", \"abi\": %d, \"compiler\": \"%s\", \"build_type\": \"%s\", \"cuda\": %s, "
                "\"cuda_architectures\": \"%s\", \"cuda_compiler\": \"%s\", \"simd\": \"%s\"}",
                STEEPEST_VERSION, STEEPEST_ABI_VERSION, STEEPEST_COMPILER, STEEPEST_BUILD_TYPE,
                STEEPEST_WITH_CUDA ? "true" : "false", STEEPEST_CUDA_ARCHITECTURES, STEEPEST_CUDA_COMPILER,
                cpu::clone_name());
  return json;
}

steepest_status steepest_adamw_workspace_size(const steepest_exec *exec, const steepest_adamw_args *args,
                                              uint64_t *bytes) {
  if (const steepest_status status = check_adamw("steepest_adamw_workspace_size", exec, args)) return status;
  if (!bytes) return fail(STEEPEST_ERROR_INVALID, "steepest_adamw_workspace_size: bytes is NULL");
  *bytes = workspace_bytes(*args);
  return STEEPEST_OK;
}

steepest_status steepest_adamw_step(const steepest_exec *exec, const steepest_adamw_args *args, void *workspace,
                                    uint64_t available) {
  const char *op = "steepest_adamw_step";
  if (const steepest_status status = check_adamw(op, exec, args)) return status;
  const uint64_t needed = workspace_bytes(*args);
  if (!workspace || available < needed)
    return fail(STEEPEST_ERROR_WORKSPACE, "%s: workspace of %llu bytes at %p, needed %llu", op,
                static_cast<unsigned long long>(available), workspace, static_cast<unsigned long long>(needed));
  AdamWScalars *scalars = static_cast<AdamWScalars *>(workspace);
  for (int64_t i = 0; i < args->num_hyper; ++i) scalars[i] = adamw_scalars(args->hyper[i]);
  const AdamWCall call{exec, args, scalars};
#if STEEPEST_WITH_CUDA
  if (exec->device == STEEPEST_CUDA) return cuda::adamw(call);
#endif
  return cpu::adamw(call);
}

steepest_status steepest_adamw_launches(const steepest_exec *exec, const steepest_adamw_args *args,
                                        int64_t *launches) {
  if (const steepest_status status = check_adamw("steepest_adamw_launches", exec, args)) return status;
  if (!launches) return fail(STEEPEST_ERROR_INVALID, "steepest_adamw_launches: launches is NULL");
  *launches = 0;
#if STEEPEST_WITH_CUDA
  if (exec->device == STEEPEST_CUDA) *launches = cuda::adamw_launches(*args);
#endif
  return STEEPEST_OK;
}

}  // extern "C"
