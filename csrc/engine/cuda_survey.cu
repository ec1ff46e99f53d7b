// CUDA engine: norm, largest element and what follows from them, in the CPU's order of summation (formula/survey.h).
// Sixteen threads read a block of 8192 elements, one for each running sum: consecutive threads, consecutive elements.
#include "engine/cuda_block.h"
#include "engine/cuda_survey.h"
#include "engine/cuda_step.h"
#include "engine/status.h"

namespace steepest::cuda {
namespace {

constexpr int kUnroll = 16;  // loads that a thread has on their way
constexpr int kLanes = static_cast<int>(kSurveyLanes);

__device__ __forceinline__ float read(int dtype, const void *base, int64_t at) {
  if (dtype == STEEPEST_FLOAT32) return static_cast<const float *>(base)[at];
  if (dtype == STEEPEST_BFLOAT16) return widen(static_cast<const bfloat16 *>(base)[at]);
  return widen(static_cast<const float16 *>(base)[at]);
}

// Elements as they are, of type T.
template <class T>
struct Plain {
  const T *x;
  __device__ __forceinline__ float operator()(int64_t at) const { return widen(x[at]); }
};

// Any type, and times alpha * |weight| + eps where there are weights.
struct Weighed {
  const SurveyHeader &header;
  const SurveyTensor &tensor;
  __device__ __forceinline__ float operator()(int64_t at) const {
    const float x = read(header.dtype, tensor.x, at);
    if (tensor.weight == nullptr) return x;
    return x * (fabsf(read(header.weight_dtype, tensor.weight, at)) * header.alpha + header.eps);
  }
};

struct Largest {
  __device__ __forceinline__ double operator()(float, int64_t) const { return 0.0; }
};
struct Size {
  __device__ __forceinline__ double operator()(float x, int64_t) const { return fabs(static_cast<double>(x)); }
};
struct Square {
  __device__ __forceinline__ double operator()(float x, int64_t) const {
    return static_cast<double>(x) * static_cast<double>(x);
  }
};
struct Power {
  double scale, q;
  __device__ __forceinline__ double operator()(float x, int64_t) const {
    return power01(fabs(static_cast<double>(x)) / scale, q);
  }
};
struct Product {
  const SurveyHeader &header;
  const SurveyTensor &tensor;
  __device__ __forceinline__ double operator()(float x, int64_t at) const {
    return static_cast<double>(x) * static_cast<double>(read(header.weight_dtype, tensor.weight, at));
  }
};

// One of the sixteen running sums over elements [begin, end).
template <int kAtOnce, class Load, class Term>
__device__ __forceinline__ SurveyPart running(const Load &load, const Term &term, int64_t begin, int64_t end, int lane) {
  SurveyPart sum{0.0, 0};
  int64_t at = begin + lane;
  for (; at + (kAtOnce - 1) * kLanes < end; at += kAtOnce * kLanes) {
    float x[kAtOnce];
    STEEPEST_UNROLL
    for (int k = 0; k < kAtOnce; ++k) x[k] = load(at + k * kLanes);
    STEEPEST_UNROLL
    for (int k = 0; k < kAtOnce; ++k)
      add_part(sum, {term(x[k], at + k * kLanes), float_bits(x[k]) & 0x7fffffffu});
  }
  for (; at < end; at += kLanes) {
    const float x = load(at);
    add_part(sum, {term(x, at), float_bits(x) & 0x7fffffffu});
  }
  return sum;
}

// The block of elements that a thread takes part in, and its part of the work there.
template <class Sum>
__device__ __forceinline__ void survey(const SurveyLaunch &launch, const Sum &sum_of) {
  __shared__ SurveyPart sums[kSurveyThreads];
  const SurveyHeader &header = launch.header;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes;
  const uint32_t block = blockIdx.x * kGroups + static_cast<uint32_t>(thread / kLanes);
  if (block < header.num_blocks) {
    uint32_t low = 0, high = header.num_tensors;
    while (high - low > 1) {
      const uint32_t middle = (low + high) / 2;
      if (launch.tensors[middle].first_block <= block)
        low = middle;
      else
        high = middle;
    }
    const SurveyTensor &tensor = launch.tensors[low];
    const int64_t begin = static_cast<int64_t>(block - tensor.first_block) * kSurveyBlock;
    const int64_t end = tensor.numel - begin < kSurveyBlock ? tensor.numel : begin + kSurveyBlock;
    sums[thread] = sum_of(tensor, begin, end, lane);
  }
  __syncthreads();
  if (lane != 0 || block >= header.num_blocks) return;
  SurveyPart part{0.0, 0};
  for (int k = 0; k < kLanes; ++k) add_part(part, sums[thread + k]);
  header.parts[block] = part;
}

template <class T>
__global__ void __launch_bounds__(kSurveyThreads) survey_kernel(const SurveyLaunch __grid_constant__ launch) {
  survey(launch, [&](const SurveyTensor &tensor, int64_t begin, int64_t end, int lane) {
    const Plain<T> load{static_cast<const T *>(tensor.x)};
    if (launch.header.sum == kSumOfSquares) return running<kUnroll>(load, Square{}, begin, end, lane);
    if (launch.header.sum == kSumOfSizes) return running<kUnroll>(load, Size{}, begin, end, lane);
    return running<kUnroll>(load, Largest{}, begin, end, lane);
  });
}

// Everything else: powers, weights, inner products.
__global__ void __launch_bounds__(kSurveyThreads) survey_any_kernel(const SurveyLaunch __grid_constant__ launch) {
  const SurveyHeader &header = launch.header;
  survey(launch, [&](const SurveyTensor &tensor, int64_t begin, int64_t end, int lane) {
    if (header.sum == kSumOfProducts) {
      const Product term{header, tensor};
      return running<4>([&](int64_t at) { return read(header.dtype, tensor.x, at); }, term, begin, end, lane);
    }
    const Weighed load{header, tensor};
    if (header.sum == kSumOfSquares) return running<4>(load, Square{}, begin, end, lane);
    if (header.sum == kSumOfSizes) return running<4>(load, Size{}, begin, end, lane);
    if (header.sum == kNoSum) return running<4>(load, Largest{}, begin, end, lane);
    // Without a finite element > 0 there is nothing to be relative to: the largest says it all.
    const float scale = *header.largest;
    if (!finite_positive(scale)) return running<4>(load, Largest{}, begin, end, lane);
    return running<4>(load, Power{static_cast<double>(scale), header.q}, begin, end, lane);
  });
}

__global__ void __launch_bounds__(kSurveySums) finish_kernel(const FinishLaunch __grid_constant__ launch) {
  __shared__ SurveyPart sums[kSurveySums];
  const int thread = static_cast<int>(threadIdx.x);
  SurveyPart total{0.0, 0};
  int64_t begin = 0;
  for (uint32_t list = 0; list < launch.num_lists; ++list) {
    const int64_t end = launch.ends[list];
    sums[thread] = running_part(launch.parts + begin, end - begin, thread);
    for (int half = kSurveySums / 2; half > 0; half /= 2) {
      __syncthreads();
      if (thread < half) add_part(sums[thread], sums[thread + half]);
    }
    if (thread == 0) add_part(total, sums[0]);
    __syncthreads();
    begin = end;
  }
  if (thread != 0) return;
  steepest_measure_result &result = *launch.result;
  result.largest = bits_float(total.largest);
  if (!launch.only_largest)
    finish(launch.kind, total, launch.max_norm, launch.grad_scale ? *launch.grad_scale : 1.0f, result);
}

bool plain(const steepest_survey_args &list, SurveySum sum) {
  return !list.weights && sum != kSumOfPowers && sum != kSumOfProducts;
}

auto kernel_for(const steepest_survey_args &list, SurveySum sum) {
  if (!plain(list, sum)) return &survey_any_kernel;
  if (list.dtype == STEEPEST_FLOAT32) return &survey_kernel<float>;
  return list.dtype == STEEPEST_BFLOAT16 ? &survey_kernel<bfloat16> : &survey_kernel<float16>;
}

}  // namespace

// Calls read(sum, q, only_largest) once or twice.
template <class Read>
void for_reads(const SurveyKind &kind, Read read) {
  if (kind.relative()) {
    read(kNoSum, kind.q, true);
    read(kSumOfPowers, kind.maximum() ? kCountPower : kind.q, false);
  } else {
    read(kind.inner ? kSumOfProducts : kind.maximum() ? kNoSum : kind.q == 1.0 ? kSumOfSizes : kSumOfSquares, kind.q, false);
  }
}

int64_t measure_launches(const steepest_measure_args &args) {
  int64_t count = 0;
  for_reads({args.q, args.inner != 0, args.count_largest != 0}, [&](SurveySum sum, double q, bool) {
    for (int64_t i = 0; i < args.num_lists; ++i)
      for_survey_launches(args.lists[i], sum, q, nullptr, nullptr, [&](const SurveyLaunch &) { ++count; });
    ++count;
  });
  return count;
}

steepest_status measure(const steepest_exec &exec, const steepest_measure_args &args, SurveyPart *parts,
                        steepest_measure_result *result) {
  const DeviceGuard guard(exec.device_index);
  if (guard.error() != cudaSuccess)
    return fail(STEEPEST_ERROR_CUDA, "steepest_measure: device %d cannot be used: %s", exec.device_index,
                cudaGetErrorString(guard.error()));
  const auto stream = static_cast<cudaStream_t>(exec.stream);
  cudaError_t error = cudaSuccess;
  FinishLaunch finish{parts, result, args.grad_scale, {args.q, args.inner != 0, args.count_largest != 0},
                      static_cast<float>(args.max_norm), 0, static_cast<uint32_t>(args.num_lists), 0, {}};
  for_reads(finish.kind, [&](SurveySum sum, double q, bool only_largest) {
    SurveyPart *to = parts;
    for (int64_t i = 0; i < args.num_lists; ++i) {
      const auto kernel = kernel_for(args.lists[i], sum);
      for_survey_launches(args.lists[i], sum, q, to, &result->largest, [&](const SurveyLaunch &launch) {
        const unsigned grid = (launch.header.num_blocks + kGroups - 1) / kGroups;
        if (error == cudaSuccess) error = STEEPEST_LAUNCH(kernel, grid, kSurveyThreads, stream, launch);
      });
      for (int64_t k = 0; k < args.lists[i].num_tensors; ++k) to += survey_blocks(args.lists[i].numel[k]);
      finish.ends[i] = to - parts;
    }
    finish.only_largest = only_largest;
    if (error == cudaSuccess) error = STEEPEST_LAUNCH(&finish_kernel, 1u, kSurveySums, stream, finish);
  });
  if (error == cudaSuccess) return STEEPEST_OK;
  cudaGetLastError();  // reported here: the caller's next check must not find it again
  return fail(STEEPEST_ERROR_CUDA, "steepest_measure: launch on device %d failed: %s", exec.device_index,
              cudaGetErrorString(error));
}

}  // namespace steepest::cuda
