// What the kernels share: how a block finds its work.
#pragma once

#include "engine/cuda_plan.h"

#if defined(__CUDA_ARCH__)
#define STEEPEST_UNROLL _Pragma("unroll")
#else
#define STEEPEST_UNROLL
#endif

namespace steepest::cuda {

__device__ __forceinline__ bool skipped(const LaunchHeader &header) {
  return header.found_inf != nullptr && *header.found_inf != 0.0f;
}

__device__ __forceinline__ GradientStage gradient_stage(const LaunchHeader &header) {
  const float scale = header.grad_scale != nullptr ? *header.grad_scale : 1.0f;
  return {header.maximize ? -scale : scale, header.clip_coefficient != nullptr ? *header.clip_coefficient : 1.0f,
          header.clip_value};
}

// A block's tensor and its scalars, in shared memory.
template <class Launch>
struct Work {
  typename Launch::Tensor tensor;
  typename Launch::Row scalars;

  // The tensor that the block's tile belongs to is the last one whose first tile does not come after it.
  __device__ __forceinline__ void fetch(const Launch &launch) {
    uint32_t low = 0, high = launch.header.num_tensors;
    while (high - low > 1) {
      const uint32_t middle = (low + high) / 2;
      if (launch.slots[middle].tensor.first_tile <= blockIdx.x)
        low = middle;
      else
        high = middle;
    }
    tensor = launch.slots[low].tensor;
    scalars = launch.header.rows != nullptr ? static_cast<const typename Launch::Row *>(launch.header.rows)[tensor.scalars]
                                            : launch.slots[tensor.scalars].scalars;
  }
};

}  // namespace steepest::cuda
