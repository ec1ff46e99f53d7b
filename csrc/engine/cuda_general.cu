// CUDA engine, the calls that keep tensors in other ways than as numbers of one of the usual combinations of types: one
// kernel per rule, which asks at run time for everything that is the same for a whole launch.  A thread's elements are a
// block's width apart, so that a warp's accesses are consecutive whatever their size and alignment.
#include "engine/cuda_block.h"
#include "engine/cuda_step.h"
#include "formula/storage.h"

namespace steepest::cuda {
namespace {

// A thread keeps the new states of a chunk in registers, until the exponents of its 8-bit blocks are known.
template <class Rule>
constexpr int kChunk = std::max((Rule::kStates == 3 ? 2 : 4) * kBlock, static_cast<int>(kBlock8));
constexpr int kBlocks8 = kTile / static_cast<int>(kBlock8);  // 8-bit blocks of a tile

__device__ __forceinline__ float read(int dtype, const void *base, int64_t at) {
  if (dtype == STEEPEST_FLOAT32) return static_cast<const float *>(base)[at];
  if (dtype == STEEPEST_BFLOAT16) return widen(static_cast<const bfloat16 *>(base)[at]);
  return widen(static_cast<const float16 *>(base)[at]);
}

__device__ __forceinline__ void write(int dtype, void *base, int64_t at, float x, bool stochastic, uint32_t random16) {
  if (dtype == STEEPEST_FLOAT32)
    static_cast<float *>(base)[at] = x;
  else if (dtype == STEEPEST_BFLOAT16)
    static_cast<bfloat16 *>(base)[at] = stochastic ? narrow_stochastic(x, random16) : narrow<bfloat16>(x);
  else
    static_cast<float16 *>(base)[at] = narrow<float16>(x);
}

// Of the 64 random bits of an element, the parameter takes the first 16, states the others in their order.
__device__ __forceinline__ uint32_t lane_of(const RandomWords &words, int lane) {
  return (lane < 2 ? words.a : words.b) >> (lane % 2 * 16);
}

template <class Launch>
__device__ __forceinline__ float read_param(const Launch &launch, const typename Launch::Tensor &tensor, int64_t at) {
  const void *const from = tensor.source != nullptr ? tensor.source : tensor.param;
  if (tensor.kept == nullptr) return read(launch.storage.param_dtype, from, at);
  if (launch.storage.residual_bits == 0) return static_cast<const float *>(tensor.kept)[at];
  const bfloat16 high = static_cast<const bfloat16 *>(from)[at];
  return launch.storage.residual_bits == 16 ? join_residual(high, static_cast<const int16_t *>(tensor.kept)[at], 16)
                                            : join_residual(high, static_cast<const int8_t *>(tensor.kept)[at], 8);
}

template <class Launch>
__device__ __forceinline__ void write_param(const Launch &launch, const typename Launch::Tensor &tensor, int64_t at,
                                            float p, const RandomWords &words, bool temporary) {
  const int bits = launch.storage.residual_bits;
  if (bits != 0 && !temporary) {
    int32_t rest;
    static_cast<bfloat16 *>(tensor.param)[at] = split_residual(p, bits, rest);
    if (bits == 16)
      static_cast<int16_t *>(tensor.kept)[at] = static_cast<int16_t>(rest);
    else
      static_cast<int8_t *>(tensor.kept)[at] = static_cast<int8_t>(rest);
    return;
  }
  if (tensor.kept != nullptr && !temporary) static_cast<float *>(tensor.kept)[at] = p;
  const bool stochastic = launch.storage.stochastic && tensor.kept == nullptr;
  write(launch.storage.param_dtype, tensor.param, at, p, stochastic, lane_of(words, 0));
}

template <class Rule>
__device__ __forceinline__ float read_state(const GeneralLaunch<Rule> &launch,
                                            const typename GeneralLaunch<Rule>::Tensor &tensor, int k, int64_t at) {
  if (launch.storage.state_dtype != STEEPEST_BLOCK8) return read(launch.storage.state_dtype, tensor.state[k], at);
  const uint32_t code = static_cast<const uint8_t *>(tensor.state[k])[at];
  const uint32_t exponent = static_cast<const uint8_t *>(tensor.exponents[k])[at / kBlock8];
  return Rule::kMagnitudes >> k & 1u ? block8_magnitude(code, exponent) : block8_signed(code, exponent);
}

// All stages for one element.  New states are in `state`; those in 8 bits are stored when their blocks' exponents are
// known, the others here.
template <class Rule>
__device__ __forceinline__ void step(const GeneralLaunch<Rule> &launch, const Work<GeneralLaunch<Rule>> &work,
                                     const GradientStage &stage, int64_t at, float *state) {
  const auto &tensor = work.tensor;
  const auto &[scalars, extras] = work.scalars;
  const uint64_t index = tensor.first_index + static_cast<uint64_t>(at);
  float p = read_param(launch, tensor, at), g = stage(read(launch.storage.grad_dtype, tensor.grad, at));
  STEEPEST_UNROLL
  for (int k = 0; k < Rule::kStates; ++k) state[k] = read_state(launch, tensor, k, at);
  if (extras.noise != 0.0f) g = g + extras.noise * normal(extras.noise_stream(index).a);
  const float before = p;
  decay(p, g, scalars.shrink);
  Rule::step(p, g, state, scalars);
  if (launch.header.shrinks) shrink_after(p, before, scalars.shrink);
  if (tensor.average != nullptr) {
    float &average = static_cast<float *>(tensor.average)[at];
    average = lerp(average, p, extras.average_weight, extras.average_weight_rest);
  }
  RandomWords words{0, 0};
  if (launch.storage.draws) words = extras.rounding_stream(index);
  write_param(launch, tensor, at, p, words, kTemporary<Rule>);
  if (launch.storage.state_dtype == STEEPEST_BLOCK8) return;
  STEEPEST_UNROLL
  for (int k = 0; k < Rule::kStates; ++k)
    write(launch.storage.state_dtype, tensor.state[k], at, state[k], launch.storage.stochastic, lane_of(words, k + 1));
}

// An 8-bit state, and by the first thread of each block its exponent.
template <class Rule>
__device__ __forceinline__ void encode(const GeneralLaunch<Rule> &launch, const Work<GeneralLaunch<Rule>> &work,
                                       int64_t at, int k, float state, uint32_t largest) {
  const auto &tensor = work.tensor;
  const bool magnitude = Rule::kMagnitudes >> k & 1u;
  const uint32_t exponent = block8_exponent(largest, !magnitude);
  const RandomWords words = work.scalars.extras.rounding_stream(tensor.first_index + static_cast<uint64_t>(at));
  const uint32_t random16 = lane_of(words, k + 1);
  static_cast<uint8_t *>(tensor.state[k])[at] = magnitude ? block8_encode_magnitude(state, exponent, random16)
                                                          : block8_encode_signed(state, exponent, random16);
  if (at % kBlock8 == 0) static_cast<uint8_t *>(tensor.exponents[k])[at / kBlock8] = static_cast<uint8_t>(exponent);
}

// Four blocks per SM: left alone, ptxas aims at six or eight in some of the kernels, and spills.
template <class Rule>
__global__ void __launch_bounds__(kBlock, 4) general_kernel(const GeneralLaunch<Rule> __grid_constant__ launch) {
  constexpr int kStates = Rule::kStates, kArray = kStates > 0 ? kStates : 1, kPerThread = kChunk<Rule> / kBlock;
  static_assert(kTile % kChunk<Rule> == 0 && kChunk<Rule> % kBlock8 == 0, "chunks are whole blocks and make up a tile");
  if (skipped(launch.header)) return;

  const int thread = static_cast<int>(threadIdx.x);
  __shared__ Work<GeneralLaunch<Rule>> work;
  __shared__ uint32_t largest[kArray][kBlocks8];
  if (thread == 0) {
    work.fetch(launch);
    GradientStage absorbed = gradient_stage(launch.header);
    absorb(work.scalars.scalars, absorbed);
  }
  for (int i = thread; i < kArray * kBlocks8; i += kBlock) largest[i / kBlocks8][i % kBlocks8] = 0;
  __syncthreads();

  GradientStage stage = gradient_stage(launch.header);
  typename Rule::Scalars given = work.scalars.scalars;
  absorb(given, stage);  // what is left of the stage
  const bool block8 = launch.storage.state_dtype == STEEPEST_BLOCK8;
  const int64_t begin = static_cast<int64_t>(blockIdx.x - work.tensor.first_tile) * kTile;
  const int64_t left = work.tensor.numel - begin;
  const int end = left < kTile ? static_cast<int>(left) : kTile;
  for (int chunk = 0; chunk < end; chunk += kChunk<Rule>) {
    float state[kPerThread][kArray];
    STEEPEST_UNROLL
    for (int n = 0; n < kPerThread; ++n) {
      const int i = chunk + thread + n * kBlock;
      if (i >= end) continue;
      step(launch, work, stage, begin + i, state[n]);
      STEEPEST_UNROLL
      for (int k = 0; k < kStates; ++k)
        if (block8) atomicMax(&largest[k][i / kBlock8], float_bits(state[n][k]) & 0x7fffffffu);
    }
    if (!block8) continue;
    __syncthreads();
    STEEPEST_UNROLL
    for (int n = 0; n < kPerThread; ++n) {
      const int i = chunk + thread + n * kBlock;
      if (i >= end) continue;
      STEEPEST_UNROLL
      for (int k = 0; k < kStates; ++k) encode(launch, work, begin + i, k, state[n][k], largest[k][i / kBlock8]);
    }
  }
}

}  // namespace

steepest_status launch_general(const StepCall &call) {
  return with_rule(call.args->rule, call.args->flags, [&](auto rule) {
    using Rule = decltype(rule);
    return launch_all<GeneralLaunch<Rule>>(call, &general_kernel<Rule>);
  });
}

}  // namespace steepest::cuda
