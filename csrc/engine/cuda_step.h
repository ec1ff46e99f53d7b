// From a call to launches, for every kernel of the CUDA engine.
#pragma once

#include "engine/cuda_launch.h"
#include "engine/cuda_plan.h"
#include "engine/status.h"

namespace steepest::cuda {

// Calls that cuda.cu has no kernel for (cuda_general.cu).
steepest_status launch_general(const StepCall &call);

template <class Launch, class Kernel>
steepest_status launch_all(const StepCall &call, Kernel kernel) {
  const DeviceGuard guard(call.exec->device_index);
  if (guard.error() != cudaSuccess)
    return fail(STEEPEST_ERROR_CUDA, "steepest_step: device %d cannot be used: %s", call.exec->device_index,
                cudaGetErrorString(guard.error()));
  const auto stream = static_cast<cudaStream_t>(call.exec->stream);
  cudaError_t error = cudaSuccess;
  for_launches<Launch>(call, [&](const Launch &launch, int64_t tiles) {
    if (error == cudaSuccess) error = STEEPEST_LAUNCH(kernel, static_cast<unsigned>(tiles), kBlock, stream, launch);
  });
  if (error == cudaSuccess) return STEEPEST_OK;
  cudaGetLastError();  // reported here: the caller's next check must not find it again
  return fail(STEEPEST_ERROR_CUDA, "steepest_step: launch on device %d failed: %s", call.exec->device_index,
              cudaGetErrorString(error));
}

template <class Launch>
int64_t count_launches(const StepCall &call) {
  int64_t count = 0;
  for_launches<Launch>(call, [&](const Launch &, int64_t) { ++count; });
  return count;
}

}  // namespace steepest::cuda
