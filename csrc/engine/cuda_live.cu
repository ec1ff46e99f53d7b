// CUDA engine: scalars of tensors whose steps or learning rates only the device knows, derived there before a step.
#include "engine/cuda_block.h"
#include "engine/cuda_live.h"
#include "engine/cuda_step.h"
#include "engine/status.h"

namespace steepest::cuda {
namespace {

// What the derived scalars of one tensor are written to.
struct Derive {
  const steepest_hyper &hyper;
  const LiveHeader &header;
  uint32_t place;

  template <class Rule>
  __device__ void operator()(Rule) const {
    if (header.general)
      static_cast<typename GeneralLaunch<Rule>::Row *>(header.rows)[place] = {Rule::scalars(hyper, header.flags),
                                                                             extras_of(hyper, header.seed)};
    else
      static_cast<typename PlainLaunch<Rule>::Row *>(header.rows)[place] = Rule::scalars(hyper, header.flags);
  }
};

// The user's numbers of a record, with those that live on the device.
__device__ __forceinline__ steepest_hyper read_record(const LiveLaunch &launch, uint32_t at) {
  const LiveRecord &record = *reinterpret_cast<const LiveRecord *>(launch.words + at);
  steepest_hyper h = record.hyper;
  for (uint64_t k = 0; k < record.num_values; ++k) {
    const LiveValue &live = reinterpret_cast<const LiveValue *>(launch.words + at + kRecordWords)[k];
    set_field(h, live.field, live_value(live.value, live.is_float64));
  }
  return h;
}

__global__ void __launch_bounds__(kBlock) live_kernel(const LiveLaunch __grid_constant__ launch) {
  const uint32_t i = blockIdx.x * kBlock + threadIdx.x;
  if (i >= launch.header.num_items) return;
  if (launch.header.found_inf != nullptr && *launch.header.found_inf != 0.0f) return;
  const LiveItem &item = reinterpret_cast<const LiveItem *>(launch.words)[i];
  const float behind = *item.counter;
  steepest_hyper hyper = read_record(launch, item.record);
  hyper.step = next_step(behind);
  with_rule(launch.header.rule, launch.header.flags, Derive{hyper, launch.header, i});
  *item.counter = behind + 1.0f;
}

}  // namespace

steepest_status launch_live(const StepCall &call, bool general) {
  const DeviceGuard guard(call.exec->device_index);
  if (guard.error() != cudaSuccess)
    return fail(STEEPEST_ERROR_CUDA, "steepest_step: device %d cannot be used: %s", call.exec->device_index,
                cudaGetErrorString(guard.error()));
  const auto stream = static_cast<cudaStream_t>(call.exec->stream);
  cudaError_t error = cudaSuccess;
  for_live_launches(*call.args, general, [&](const LiveLaunch &launch) {
    const unsigned blocks = (launch.header.num_items + kBlock - 1) / kBlock;
    if (error == cudaSuccess) error = STEEPEST_LAUNCH(&live_kernel, blocks, kBlock, stream, launch);
  });
  if (error == cudaSuccess) return STEEPEST_OK;
  cudaGetLastError();  // reported here: the caller's next check must not find it again
  return fail(STEEPEST_ERROR_CUDA, "steepest_step: launch on device %d failed: %s", call.exec->device_index,
              cudaGetErrorString(error));
}

}  // namespace steepest::cuda
