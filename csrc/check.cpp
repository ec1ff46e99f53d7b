#include "check.h"

namespace steepest {

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

steepest_status check_address(const char *op, const char *role, long long row, const void *address, int size) {
  STEEPEST_REQUIRE(address, "%s: %s[%lld] is NULL", op, role, row);
  STEEPEST_REQUIRE(reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(size) == 0,
                   "%s: %s[%lld] is at %p, expected a multiple of %d bytes", op, role, row, address, size);
  return STEEPEST_OK;
}

steepest_status check_workspace(const char *op, const void *workspace, uint64_t available, uint64_t needed) {
  if (needed == 0 || (workspace && available >= needed)) return STEEPEST_OK;
  return fail(STEEPEST_ERROR_WORKSPACE, "%s: workspace of %llu bytes at %p, needed %llu", op,
              static_cast<unsigned long long>(available), workspace, static_cast<unsigned long long>(needed));
}

int size_of(int32_t dtype) { return dtype == STEEPEST_FLOAT32 ? 4 : dtype == STEEPEST_BLOCK8 ? 1 : 2; }

}  // namespace steepest
