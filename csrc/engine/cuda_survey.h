// The plan of the launches that survey tensors on the device (cuda_survey.cu): sixteen threads for each block of 8192
// elements, as many tensors in one launch as an argument holds.
#pragma once

#include <algorithm>

#include "engine/cuda_plan.h"
#include "engine/measure.h"

namespace steepest::cuda {

constexpr int kSurveyThreads = kBlock < kSurveyLanes ? static_cast<int>(kSurveyLanes) : kBlock;
constexpr int kGroups = kSurveyThreads / static_cast<int>(kSurveyLanes);  // blocks of elements per block of threads

enum SurveySum : int32_t { kNoSum, kSumOfSizes, kSumOfSquares, kSumOfPowers, kSumOfProducts };

struct SurveyHeader {
  SurveyPart *parts;      // of the launch's first block of elements
  const float *largest;   // kSumOfPowers: what elements are relative to, in device memory
  double q;
  float alpha, eps;       // with weights
  int32_t dtype, weight_dtype;
  int32_t sum;            // SurveySum
  uint32_t num_tensors;
  uint32_t num_blocks;    // of elements
  uint32_t reserved;
};

struct SurveyTensor {
  const void *x, *weight;
  int64_t numel;         // >= 1
  uint32_t first_block;  // blocks of elements of this launch that come before this tensor's
  uint32_t reserved;
};

struct SurveyLaunch {
  static constexpr int kTensors = static_cast<int>((kArgumentBytes - sizeof(SurveyHeader)) / sizeof(SurveyTensor));
  SurveyHeader header;
  SurveyTensor tensors[kTensors];
};

constexpr int kMaxLists = 1024;

// The launch that makes numbers of the parts.
struct FinishLaunch {
  const SurveyPart *parts;
  steepest_measure_result *result;
  const float *grad_scale;
  SurveyKind kind;
  float max_norm;
  uint32_t only_largest;  // a first read: nothing but the largest element is wanted yet
  uint32_t num_lists;
  uint32_t reserved;
  int64_t ends[kMaxLists];  // of each list's parts
};

static_assert(sizeof(SurveyLaunch) <= kArgumentBytes && sizeof(FinishLaunch) <= kArgumentBytes,
              "too large for an argument");

inline int64_t survey_blocks(int64_t numel) { return (numel + kSurveyBlock - 1) / kSurveyBlock; }

// One read of a list: fills one launch after another and calls emit(launch) with each.
template <class Emit>
void for_survey_launches(const steepest_survey_args &a, SurveySum sum, double q, SurveyPart *parts, const float *largest,
                         Emit emit) {
  constexpr int64_t kMaxBlocks = kMaxGrid * kGroups < UINT32_MAX ? kMaxGrid * kGroups : UINT32_MAX;
  SurveyLaunch launch;
  launch.header = {parts, largest, q, static_cast<float>(a.alpha), static_cast<float>(a.eps), a.dtype, a.weight_dtype,
                   sum, 0, 0, 0};
  SurveyHeader &header = launch.header;
  const auto flush = [&] {
    emit(launch);
    header.parts += header.num_blocks;
    header.num_tensors = header.num_blocks = 0;
  };
  const auto size_of = [](int32_t dtype) { return dtype == STEEPEST_FLOAT32 ? 4 : 2; };
  for (int64_t i = 0; i < a.num_tensors; ++i) {
    const char *x = static_cast<const char *>(a.tensors[i]);
    const char *weight = a.weights ? static_cast<const char *>(a.weights[i]) : nullptr;
    for (int64_t left = a.numel[i]; left > 0;) {
      if (header.num_tensors == SurveyLaunch::kTensors || header.num_blocks == kMaxBlocks) flush();
      const int64_t blocks = std::min(survey_blocks(left), kMaxBlocks - header.num_blocks);
      const int64_t numel = std::min(left, blocks * kSurveyBlock);
      launch.tensors[header.num_tensors++] = {x, weight, numel, header.num_blocks, 0};
      header.num_blocks += static_cast<uint32_t>(blocks);
      left -= numel;
      x += numel * size_of(a.dtype);
      if (weight) weight += numel * size_of(a.weight_dtype);
    }
  }
  if (header.num_tensors > 0) flush();
}

}  // namespace steepest::cuda
