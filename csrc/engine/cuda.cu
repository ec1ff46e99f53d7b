// CUDA engine: one launch steps as many tensors as its argument holds (see cuda_plan.h); one block steps one tile.
#include "engine/cuda_launch.h"
#include "engine/cuda_plan.h"
#include "engine/engine.h"
#include "engine/status.h"

#if defined(__CUDA_ARCH__)
#define STEEPEST_UNROLL _Pragma("unroll")
#else
#define STEEPEST_UNROLL
#endif

namespace steepest::cuda {
namespace {

// kCount consecutive elements of one role in registers, as they are stored: widening all of them at once would take up
// to twice the registers.  Only constant indices keep them there, hence the unrolled loops.
// Memory is accessed 16 bytes at a time.  The intrinsics say what nvcc does not find out by itself, that this is global
// memory and one access: plain assignments became stores of 4 bytes.  (They also say that nothing is used twice.)
template <class T, int kCount>
struct Run {
  static constexpr int kWords = kCount * sizeof(T) / kWord;
  static_assert(kWords * kWord == kCount * sizeof(T), "a run is made of whole words");
  uint32_t bits[kWords * 4];

  __device__ __forceinline__ void load(const void *base, int64_t at) {
    const uint4 *from = reinterpret_cast<const uint4 *>(static_cast<const T *>(base) + at);
    STEEPEST_UNROLL
    for (int i = 0; i < kWords; ++i) {
      const uint4 word = __ldcs(from + i);
      bits[4 * i] = word.x, bits[4 * i + 1] = word.y, bits[4 * i + 2] = word.z, bits[4 * i + 3] = word.w;
    }
  }

  __device__ __forceinline__ void store(void *base, int64_t at) const {
    uint4 *to = reinterpret_cast<uint4 *>(static_cast<T *>(base) + at);
    STEEPEST_UNROLL
    for (int i = 0; i < kWords; ++i)
      __stcs(to + i, uint4{bits[4 * i], bits[4 * i + 1], bits[4 * i + 2], bits[4 * i + 3]});
  }

  __device__ __forceinline__ float get(int i) const {
    if constexpr (sizeof(T) == 4)
      return bits_float(bits[i]);
    else
      return widen(T{static_cast<uint16_t>(bits[i / 2] >> (i % 2 * 16))});
  }

  __device__ __forceinline__ void set(int i, float x) {
    if constexpr (sizeof(T) == 4) {
      bits[i] = float_bits(x);
    } else {
      const uint32_t half = narrow<T>(x).bits;
      uint32_t &pair = bits[i / 2];
      pair = i % 2 == 0 ? (pair & 0xffff0000u) | half : (pair & 0x0000ffffu) | (half << 16);
    }
  }
};

template <class T>
struct Run<T, 1> {
  T element;
  __device__ __forceinline__ void load(const void *base, int64_t at) { element = static_cast<const T *>(base)[at]; }
  __device__ __forceinline__ void store(void *base, int64_t at) const { static_cast<T *>(base)[at] = element; }
  __device__ __forceinline__ float get(int) const { return widen(element); }
  __device__ __forceinline__ void set(int, float x) { element = narrow<T>(x); }
};

// What a block works on, in shared memory.
template <class Rule>
struct Work {
  TensorSlot<kFirstState + Rule::kStates> tensor;
  typename Rule::Scalars scalars;
};

// Every stage over kCount consecutive elements in registers.
template <class P, class G, class S, class Rule, int kCount>
__device__ __forceinline__ void step(const TensorSlot<kFirstState + Rule::kStates> &tensor, int64_t at,
                                     const GradientStage &stage, bool shrinks, const typename Rule::Scalars &scalars) {
  constexpr int kStates = Rule::kStates, kArray = kStates > 0 ? kStates : 1;
  Run<P, kCount> params;
  Run<G, kCount> grads;
  Run<S, kCount> states[kArray];
  params.load(tensor.address[kParam], at);
  grads.load(tensor.address[kGrad], at);
  STEEPEST_UNROLL
  for (int k = 0; k < kStates; ++k) states[k].load(tensor.address[kFirstState + k], at);
  STEEPEST_UNROLL
  for (int i = 0; i < kCount; ++i) {
    float p = params.get(i), g = stage(grads.get(i)), state[kArray];
    STEEPEST_UNROLL
    for (int k = 0; k < kStates; ++k) state[k] = states[k].get(i);
    const float before = p;
    decay(p, g, scalars.shrink);
    Rule::step(p, g, state, scalars);
    if (shrinks) shrink_after(p, before, scalars.shrink);
    params.set(i, p);
    STEEPEST_UNROLL
    for (int k = 0; k < kStates; ++k) states[k].set(i, state[k]);
  }
  params.store(tensor.address[kParam], at);
  STEEPEST_UNROLL
  for (int k = 0; k < kStates; ++k) states[k].store(tensor.address[kFirstState + k], at);
}

// The tensor that a tile belongs to: the last one whose first tile does not come after it.
template <class Rule>
__device__ __forceinline__ uint32_t find_tensor(const Launch<Rule> &launch, uint32_t tile) {
  uint32_t low = 0, high = launch.num_tensors;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (launch.slots[middle].tensor.first_tile <= tile)
      low = middle;
    else
      high = middle;
  }
  return low;
}

template <class P, class G, class S, class Rule>
__global__ void __launch_bounds__(kBlock) step_kernel(const Launch<Rule> __grid_constant__ launch) {
  constexpr int kVector = kWord / sizeof(P);  // P is the smallest type: one access of it, two of a float32 beside it
  if (launch.found_inf != nullptr && *launch.found_inf != 0.0f) return;

  __shared__ Work<Rule> work;
  if (threadIdx.x == 0) {
    work.tensor = launch.slots[find_tensor(launch, blockIdx.x)].tensor;
    work.scalars = launch.slots[work.tensor.scalars].scalars;
  }
  __syncthreads();

  const typename Rule::Scalars scalars = work.scalars;
  const float scale = launch.grad_scale != nullptr ? *launch.grad_scale : 1.0f;
  const GradientStage stage{launch.maximize ? -scale : scale,
                            launch.clip_coefficient != nullptr ? *launch.clip_coefficient : 1.0f, launch.clip_value};

  // The tile's places are counted from a 16-byte boundary, `begin` (before element 0 in a shifted tensor's first tile).
  // Of its elements [first, end), whole vectors are [head, tail); the others are stepped one by one, and so are all
  // of them in a tensor whose roles are apart.
  const bool apart = work.tensor.shift == kApart;
  const uint32_t tile = blockIdx.x - work.tensor.first_tile;
  const int64_t begin = static_cast<int64_t>(tile) * kTile - (apart ? 0 : work.tensor.shift);
  const int64_t left = work.tensor.numel - begin;
  const int first = begin < 0 ? static_cast<int>(-begin) : 0;
  const int end = left < kTile ? static_cast<int>(left) : kTile;
  const int aligned = (first + kVector - 1) / kVector * kVector;
  const int head = apart || aligned > end ? end : aligned;
  const int tail = head + (end - head) / kVector * kVector;

  const int thread = static_cast<int>(threadIdx.x);
  for (int i = head + thread * kVector; i < tail; i += kBlock * kVector)
    step<P, G, S, Rule, kVector>(work.tensor, begin + i, stage, launch.shrinks, scalars);
  const int before = head - first, loose = before + end - tail;
  for (int i = thread; i < loose; i += kBlock) {
    const int place = i < before ? first + i : tail + i - before;
    step<P, G, S, Rule, 1>(work.tensor, begin + place, stage, launch.shrinks, scalars);
  }
}

// Null for a combination of types that has no kernel (the same ones for every rule).
template <class Rule>
auto find_kernel(const steepest_step_args &args) {
  using Kernel = decltype(&step_kernel<float, float, float, Rule>);
  const auto is = [&](int32_t p, int32_t g, int32_t s) {
    return args.param_dtype == p && args.grad_dtype == g && (Rule::kStates == 0 || args.state_dtype == s);
  };
  Kernel kernel = nullptr;
  if (is(STEEPEST_FLOAT32, STEEPEST_FLOAT32, STEEPEST_FLOAT32))
    kernel = &step_kernel<float, float, float, Rule>;
  else if (is(STEEPEST_BFLOAT16, STEEPEST_BFLOAT16, STEEPEST_BFLOAT16))
    kernel = &step_kernel<bfloat16, bfloat16, bfloat16, Rule>;
  else if (is(STEEPEST_FLOAT16, STEEPEST_FLOAT16, STEEPEST_FLOAT16))
    kernel = &step_kernel<float16, float16, float16, Rule>;
  else if constexpr (Rule::kStates > 0) {
    if (is(STEEPEST_BFLOAT16, STEEPEST_BFLOAT16, STEEPEST_FLOAT32))
      kernel = &step_kernel<bfloat16, bfloat16, float, Rule>;
    else if (is(STEEPEST_FLOAT16, STEEPEST_FLOAT16, STEEPEST_FLOAT32))
      kernel = &step_kernel<float16, float16, float, Rule>;
  }
  return kernel;
}

template <class Rule>
steepest_status run(const StepCall &call) {
  const DeviceGuard guard(call.exec->device_index);
  if (guard.error() != cudaSuccess)
    return fail(STEEPEST_ERROR_CUDA, "steepest_step: device %d cannot be used: %s", call.exec->device_index,
                cudaGetErrorString(guard.error()));
  const auto kernel = find_kernel<Rule>(*call.args);
  const auto stream = static_cast<cudaStream_t>(call.exec->stream);
  cudaError_t error = cudaSuccess;
  for_launches<Rule>(*call.args, call.rows<Rule>(), [&](const Launch<Rule> &launch, int64_t tiles) {
    if (error == cudaSuccess) error = STEEPEST_LAUNCH(kernel, static_cast<unsigned>(tiles), kBlock, stream, launch);
  });
  if (error == cudaSuccess) return STEEPEST_OK;
  cudaGetLastError();  // reported here: the caller's next check must not find it again
  return fail(STEEPEST_ERROR_CUDA, "steepest_step: launch on device %d failed: %s", call.exec->device_index,
              cudaGetErrorString(error));
}

}  // namespace

bool supports(const steepest_step_args &args) {
  bool plain = !args.masters && !args.residuals && !args.sources && !args.averages &&
               args.rounding == STEEPEST_NEAREST && args.state_dtype != STEEPEST_BLOCK8;
  for (int64_t i = 0; i < args.num_hyper; ++i) plain = plain && args.hyper[i].noise_eta == 0;
  if (!plain) return false;
  return with_rule(args.rule, args.flags, [&](auto rule) { return find_kernel<decltype(rule)>(args) != nullptr; });
}

steepest_status step(const StepCall &call) {
  return with_rule(call.args->rule, call.args->flags, [&](auto rule) { return run<decltype(rule)>(call); });
}

int64_t launches(const steepest_step_args &args) {
  return with_rule(args.rule, args.flags, [&](auto rule) {
    int64_t count = 0;
    using Rule = decltype(rule);
    for_launches<Rule>(args, nullptr, [&](const Launch<Rule> &, int64_t) { ++count; });
    return count;
  });
}

}  // namespace steepest::cuda
