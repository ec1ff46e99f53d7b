// CUDA engine: one launch steps as many tensors as its argument holds (see cuda_plan.h); one block steps one tile.
#include "engine/cuda_block.h"
#include "engine/cuda_live.h"
#include "engine/cuda_step.h"
#include "engine/status.h"

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

// Every stage over kCount consecutive elements in registers.
template <class P, class G, class S, class Rule, int kCount>
__device__ __forceinline__ void step(const typename PlainLaunch<Rule>::Tensor &tensor, int64_t at,
                                     const GradientStage &stage, bool shrinks, const typename Rule::Scalars &scalars) {
  constexpr int kStates = Rule::kStates, kArray = kStates > 0 ? kStates : 1;
  Run<P, kCount> params;
  Run<G, kCount> grads;
  Run<S, kCount> states[kArray];
  params.load(tensor.address[kParam], at);
  grads.load(tensor.address[kGrad], at);
  if constexpr (kReadsStates<Rule>) {
    STEEPEST_UNROLL
    for (int k = 0; k < kStates; ++k) states[k].load(tensor.address[kFirstState + k], at);
  }
  STEEPEST_UNROLL
  for (int i = 0; i < kCount; ++i) {
    float p = params.get(i), g = stage(grads.get(i)), state[kArray];
    if constexpr (kReadsStates<Rule>) {
      STEEPEST_UNROLL
      for (int k = 0; k < kStates; ++k) state[k] = states[k].get(i);
    }
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

template <class P, class G, class S, class Rule>
__global__ void __launch_bounds__(kBlock) step_kernel(const PlainLaunch<Rule> __grid_constant__ launch) {
  constexpr int kVector = kWord / sizeof(P);  // P is the smallest type: one access of it, two of a float32 beside it
  if (skipped(launch.header)) return;

  __shared__ Work<PlainLaunch<Rule>> work;
  if (threadIdx.x == 0) work.fetch(launch);
  __syncthreads();

  typename Rule::Scalars scalars = work.scalars;
  GradientStage stage = gradient_stage(launch.header);
  absorb(scalars, stage);

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
    step<P, G, S, Rule, kVector>(work.tensor, begin + i, stage, launch.header.shrinks, scalars);
  const int before = head - first, loose = before + end - tail;
  for (int i = thread; i < loose; i += kBlock) {
    const int place = i < before ? first + i : tail + i - before;
    step<P, G, S, Rule, 1>(work.tensor, begin + place, stage, launch.header.shrinks, scalars);
  }
}

bool plain(const steepest_step_args &args) {
  for (int64_t i = 0; i < args.num_hyper; ++i)
    if (args.hyper[i].noise_eta != 0) return false;
  return !args.masters && !args.residuals && !args.sources && !args.averages && args.rounding == STEEPEST_NEAREST;
}

// Null for what the general kernel has to do (the same for every rule).
template <class Rule>
auto find_kernel(const steepest_step_args &args) {
  using Kernel = decltype(&step_kernel<float, float, float, Rule>);
  if (!plain(args)) return Kernel{nullptr};
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
  else if constexpr (std::is_same_v<Rule, Restore>) {  // a float32 master in the gradient's place
    if (is(STEEPEST_BFLOAT16, STEEPEST_FLOAT32, STEEPEST_FLOAT32))
      kernel = &step_kernel<bfloat16, float, float, Rule>;
    else if (is(STEEPEST_FLOAT16, STEEPEST_FLOAT32, STEEPEST_FLOAT32))
      kernel = &step_kernel<float16, float, float, Rule>;
  } else if constexpr (Rule::kStates > 0 && kReadsStates<Rule>) {  // a backup has its parameter's type
    if (is(STEEPEST_BFLOAT16, STEEPEST_BFLOAT16, STEEPEST_FLOAT32))
      kernel = &step_kernel<bfloat16, bfloat16, float, Rule>;
    else if (is(STEEPEST_FLOAT16, STEEPEST_FLOAT16, STEEPEST_FLOAT32))
      kernel = &step_kernel<float16, float16, float, Rule>;
  }
  return kernel;
}

}  // namespace

steepest_status step(const StepCall &call) {
  return with_rule(call.args->rule, call.args->flags, [&](auto rule) {
    using Rule = decltype(rule);
    const auto kernel = find_kernel<Rule>(*call.args);
    if (call.args->counters)
      if (const steepest_status status = launch_live(call, kernel == nullptr)) return status;
    return kernel ? launch_all<PlainLaunch<Rule>>(call, kernel) : launch_general(call);
  });
}

int64_t launches(const steepest_step_args &args) {
  const StepCall call{nullptr, &args, nullptr, nullptr};
  return with_rule(args.rule, args.flags, [&](auto rule) {
    using Rule = decltype(rule);
    const bool general = !find_kernel<Rule>(args);
    int64_t live = 0;
    if (args.counters) for_live_launches(args, general, [&](const LiveLaunch &) { ++live; });
    return live + (general ? count_launches<GeneralLaunch<Rule>>(call) : count_launches<PlainLaunch<Rule>>(call));
  });
}

}  // namespace steepest::cuda
